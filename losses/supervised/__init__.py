"""Losses with labels, one paper a file."""
