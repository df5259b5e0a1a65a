"""Batches: loaders with a position, moving, cutting, prefetching, transforms."""
