"""The parts of a trainer, preserved while a trial trains them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from diptych.engine.random_state import preserved_random_state
from diptych.engine.trials.restored import modules_restored, optimizer_restored


@contextmanager
def parts_preserved(trainer: Any) -> Iterator[None]:
    """Restore model, loss, task, transform, optimizer and random generators of a trainer."""
    parts = (trainer.model, trainer.loss, trainer.task, trainer.transform)
    modules = [part for part in parts if isinstance(part, nn.Module)]
    with ExitStack() as contexts:
        contexts.enter_context(preserved_random_state())
        contexts.enter_context(modules_restored(*modules))
        for optimizer in getattr(trainer, "optimizers", [trainer.optimizer]):
            contexts.enter_context(optimizer_restored(optimizer))
        yield
