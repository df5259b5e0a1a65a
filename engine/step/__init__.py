"""The training step: one update for each batch."""
