"""The collectives of a handler, observed in one process that counts as one of two ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import MagicMock, patch

import attrs
import torch.distributed as dist

from diptych.engine import Trainer
from diptych.engine.distributed import agreement, hang_report
from diptych.engine.loop.listener import Listener
from diptych.engine.loop.periodic import Periodic
from diptych.engine.metrics import metrics_buffer


class Done:
    """The work of a collective that has ended."""

    def wait(self, *_: Any) -> None:
        """Return at once."""


@attrs.define(eq=False)
class CollectiveObserver:
    """Records the collectives of handlers, and the tags that are published at log points.

    The other rank holds the same as this one, and a sum is this rank's part of it.

    Attributes:
        called: the names of the collectives in the handlers' own functions.
        tags: the tags that the ranks compare at log points.
    """

    called: set[str] = attrs.field(factory=set)
    tags: set[str] = attrs.field(factory=set)
    _acting: list[bool] = attrs.field(factory=lambda: [False])

    @contextmanager
    def world_of_two(self) -> Iterator[None]:
        """Count this process as rank 0 of 2, whose collectives return at once."""
        answers: dict[str, Callable[..., Any]] = {
            "all_reduce": lambda *_, **__: Done(),
            "broadcast": lambda *_, **__: Done(),
            "broadcast_object_list": lambda *_, **__: None,
            "all_gather": lambda parts, own, **_: [part.copy_(own) for part in parts],
            "all_gather_object": lambda parts, own, **_: parts.__setitem__(slice(None), [own] * 2),
            "barrier": lambda *_, **__: None,
            "new_group": lambda *_, **__: None,
        }
        with ExitStack() as stack:
            for name, answer in answers.items():
                stack.enter_context(patch.object(dist, name, self._recorded(name, answer)))
            for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 0}.items():
                stack.enter_context(patch.object(dist, name, lambda *_, _value=value: _value))
            stack.enter_context(patch.object(dist, "get_backend", lambda *_: "gloo"))
            stack.enter_context(patch.object(dist, "group", MagicMock()))
            for module in (hang_report, agreement):
                stack.enter_context(patch.object(module, "has_others", lambda: False))
            stack.enter_context(
                patch.object(metrics_buffer, "check_equal_over_ranks", self._check_tags)
            )
            yield

    def run(self, trainer: Trainer, loader: Any, *handlers: Any, **limits: Any) -> None:
        """Attach the handlers and run, recording what their functions call."""
        with self._acts():
            trainer.attach(*handlers)
        with trainer.calling(partial(self._call, trainer)):
            trainer.run(loader, **limits)

    def _call(self, trainer: Trainer, listener: Listener) -> None:
        owner = listener.owner
        with self._acts(acting=owner is not trainer and not isinstance(owner, Periodic)):
            listener.call(trainer, (), {})

    @contextmanager
    def _acts(self, *, acting: bool = True) -> Iterator[None]:
        self._acting.append(acting)
        try:
            yield
        finally:
            self._acting.pop()

    def _recorded(self, name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._acting[-1]:
                self.called.add(name)
            return answer(*args, **kwargs)

        return call

    def _check_tags(self, _: str, values: dict[str, str], __: str) -> None:
        self.tags.update(values["tags"].split(", "))
