"""Losses between modalities, one paper per file."""
