"""The state of a run, as a checkpoint holds it."""
