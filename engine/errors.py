"""The exceptions of the library that callers may want to catch."""


class BatchError(ValueError):
    """A batch, or a task's output, lacks a part or has parts that do not fit together."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read, or belongs to another model."""


class ResumeError(RuntimeError, ValueError):
    """A run cannot continue from its position with the given arguments."""


class LostRankError(RuntimeError):
    """A rank waited for other ranks, and one of them failed, ended or did not arrive."""
