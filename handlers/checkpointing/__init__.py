"""Saving and resuming runs; exporting weights."""
