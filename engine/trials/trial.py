"""A dry run's scratch directory, and the copies of handlers that write into it."""

from __future__ import annotations

import copy
import io
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import attrs
from torch import nn

from diptych.engine.trials.restored import modules_restored

T = TypeVar("T")


@attrs.define(eq=False)
class Trial:
    """Copies handlers for a dry run; a handler's `for_trial` gets it.

    Attributes:
        directory: the scratch directory, which is removed after the run.
        batches: batches of an evaluation.
        contexts: what a copy shares with its original is restored when these contexts end.
        left_out: the handlers that are not copied, in words.
    """

    directory: Path
    batches: int
    contexts: ExitStack
    left_out: list[str] = attrs.field(factory=list)
    _copies: dict[int, Any] = attrs.field(factory=dict, repr=False)

    def copied(self, handler: Any) -> Any:
        """Return the copy of a handler, the same each time; None: it is left out."""
        if id(handler) not in self._copies:
            make = getattr(handler, "for_trial", None)
            self._copies[id(handler)] = None if make is None else make(self)
            if self._copies[id(handler)] is None:
                self.left_out.append(getattr(handler, "key", type(handler).__name__))
        return self._copies[id(handler)]

    def rebuilt(self, handler: T, **changes: Any) -> T:
        """Return a new handler with the arguments of a handler, in its first state.

        Paths among the arguments lead into the scratch directory, streams into memory, and handlers
        to their copies; modules are restored. A handler that is no attrs class is copied with its
        attributes.

        Args:
            handler: the handler.
            changes: arguments to override.
        """
        kind: Any = type(handler)
        author = next(base for base in kind.__mro__ if "__init__" in vars(base))
        if "__attrs_attrs__" in vars(author):  # not a plain class with arguments of its own
            fields = [field for field in attrs.fields(kind) if field.init]
            names = {field.alias or field.name: field.name for field in fields}
            given = {alias: getattr(handler, name) for alias, name in names.items()}
            moved = {name: self._moved(name, value) for name, value in given.items()}
            made: Any = kind(**{**moved, **changes})
            return made  # type: ignore[no-any-return]
        other = copy.copy(handler)
        vars(other).update(vars(handler))  # an attrs class copies its own attributes alone
        for name, value in list(vars(other).items()):
            own = copy.copy(value) if isinstance(value, (list, dict, set)) else value
            setattr(other, name, changes.get(name, self._moved(name, own)))
        return other

    def _moved(self, name: str, value: Any) -> Any:
        """Return the replacement of an argument."""
        if isinstance(value, Path):
            return self.path(value)
        if isinstance(value, os.PathLike):
            return type(value)(self.path(value))  # type: ignore[call-arg]
        if isinstance(value, nn.Module):
            self.contexts.enter_context(modules_restored(value))
        if name == "stream":
            return io.StringIO()
        return self.copied(value) if hasattr(value, "for_trial") else value

    def path(self, path: str | os.PathLike[str]) -> Path:
        """Return the place of a file or directory in the scratch directory."""
        absolute = Path(path).absolute()
        return self.directory / absolute.relative_to(absolute.anchor)

    def files(self) -> list[tuple[Path, int]]:
        """Return the files that have been written, by the paths that a run would use; and sizes."""
        found = sorted(path for path in self.directory.rglob("*") if path.is_file())
        return [
            (Path("/", path.relative_to(self.directory)), path.stat().st_size) for path in found
        ]
