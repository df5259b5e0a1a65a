"""Losses between modalities, one paper a file."""
