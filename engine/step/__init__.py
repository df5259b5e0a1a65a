"""The step: one batch becomes one update."""
