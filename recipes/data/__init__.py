"""A user's images and captions: layouts, checks, pixels, batches."""
