"""The exceptions that a caller would want to catch."""


class BatchError(ValueError):
    """A batch, or what a task made of it, lacks something or does not fit together."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, cannot be read, or belongs to something else."""


class ResumeError(RuntimeError):
    """A run cannot go on from where it stands with what it was given."""


class LostRankError(RuntimeError):
    """A rank has waited for the others in vain: one of them failed, ended, or did not come."""
