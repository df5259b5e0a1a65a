"""Parameters that the optimizer holds and no gradient reaches."""

from __future__ import annotations

import logging
from itertools import chain
from typing import Any

from torch import nn

from diptych.engine.distributed.collectives import rank
from diptych.engine.modules import named_parameters

logger = logging.getLogger(__name__)

MOST = 8
"""The most names in a message."""


class Untrained:
    """Names, once, each trainable parameter without a gradient from one log point to the next.

    torch raises a tensor's version with each update in place, so nothing is done in an iteration.

    Args:
        trainer: the trainer whose optimizer holds the parameters.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._named: set[int] = set()
        self.start()

    def start(self) -> None:
        """Start a window after the current iteration."""
        self._since = self._trainer.state.iteration
        self._versions = {id(p): p._version for p in self._held()}  # noqa: SLF001

    def report(self) -> None:
        """Log the parameters without a gradient in the window, on rank 0, and start the next one.

        None is logged if the window has no update at all.
        """
        before, held = self._versions, self._held()
        same = [p for p in held if before.get(id(p)) == p._version]  # noqa: SLF001
        found = {id(p) for p in same if p.grad is None and p.requires_grad} - self._named
        if found and len(same) < len(held) and rank() == 0:
            self._named |= found
            parts = named_parameters(self._trainer.model, self._trainer.loss).items()
            names = [name for name, p in parts if id(p) in found]
            names += ["parameters of neither model nor loss"] * (len(names) < len(found))
            more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
            logger.warning(
                "In iterations %d to %d no gradient reached %s%s: the loss does not depend on it. "
                "Freeze what is not to be trained with requires_grad_(False).",
                self._since + 1,
                self._trainer.state.iteration,
                ", ".join(names[:MOST]),
                more,
            )
        self.start()

    def _held(self) -> list[nn.Parameter]:
        return list(chain.from_iterable(g["params"] for g in self._trainer.optimizer.param_groups))
