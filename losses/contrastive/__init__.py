"""Losses on pairs of features, one paper per file."""
