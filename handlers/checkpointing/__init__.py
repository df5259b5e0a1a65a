"""Checkpoints: saving and resuming runs, exporting weights.

A save goes through six modules, each of which calls the next: `checkpoint_manager` (the trainer's
events), `run_savers` (all managers of a trainer, signals), `directory_saver` (when to save into a
directory, under which name), `save_policy` (the decision, a pure function), `checkpoint_writer` (at
once or in a thread), `checkpoint_store` (the files).
"""
