"""Contrastive losses in tiles, in memory linear in the batch."""
