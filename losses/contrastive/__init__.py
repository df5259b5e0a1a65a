"""Losses on pairs of features, one paper a file."""
