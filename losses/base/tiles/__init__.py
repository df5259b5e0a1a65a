"""Losses in tiles, in memory linear in the batch: PyTorch and Triton kernels."""
