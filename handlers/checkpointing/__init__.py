"""Checkpoints: saving and resuming runs, exporting weights."""
