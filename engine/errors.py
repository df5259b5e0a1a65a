"""The exceptions of the library that callers may want to catch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class BatchError(ValueError):
    """A batch, or a task's output, lacks a part or has parts that do not fit together."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read, or belongs to another model."""


class ResumeError(RuntimeError, ValueError):
    """A run cannot continue from its position with the given arguments."""


class LostRankError(RuntimeError):
    """A rank waited for other ranks, and one of them failed, ended or did not arrive."""


class UnknownNameError(KeyError):
    """Nothing has the given name: a metric, an output. Its text is the message itself."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError returns the repr: in quotes, on one line


@contextmanager
def checkpoint_errors(
    failure: str, kind: type[Exception] = OSError, *others: type[Exception], way_out: str = ""
) -> Iterator[None]:
    """Raise errors of these kinds as a `CheckpointError`: what failed, the error, the way out."""
    try:
        yield
    except (kind, *others) as error:
        raise CheckpointError(f"{failure}: {error}{way_out}") from error
