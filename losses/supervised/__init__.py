"""Losses with labels, one paper per file."""
