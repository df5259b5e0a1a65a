"""Trainings that do not train: parameters that no gradient reaches, and a loss that is NaN."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
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

    The first NaN among the logged losses is reported too, unless a guard looks after them.

    torch raises a tensor's version with each update in place, so nothing is done in an iteration.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._named: set[int] = set()
        self._is_nan = False
        self.start()

    def start(self) -> None:
        """Start a window after the current iteration."""
        self._since = self._trainer.state.iteration
        self._versions = {id(p): p._version for p in self._held()}  # noqa: SLF001

    def report(self) -> None:
        """Log the parameters without a gradient in the window, on rank 0, and start the next one.

        None is logged if the window has no update at all.
        """
        self._report_nan(self._trainer.metrics.record.values)
        found = self._without_gradient() - self._named
        if found and rank() == 0:
            self._named |= found
            parts = named_parameters(self._trainer.model, self._trainer.loss).items()
            names = [name for name, p in parts if id(p) in found]
            names += ["parameters of neither model nor loss"] * (len(names) < len(found))
            more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
            logger.warning(
                "In iterations %d to %d no gradient reached %s%s: the loss does not depend on it.\n"
                "If it is not to be trained, freeze it with requires_grad_(False).",
                self._since + 1,
                self._trainer.state.iteration,
                ", ".join(names[:MOST]),
                more,
            )
        self.start()

    def _without_gradient(self) -> set[int]:
        """Return the ids of the parameters without a gradient; none if no update was made."""
        same, moved = list[nn.Parameter](), list[nn.Parameter]()
        for parameter in self._held():
            is_same = self._versions.get(id(parameter)) == parameter._version  # noqa: SLF001
            (same if is_same else moved).append(parameter)
        if all(p.grad is None for p in moved):  # at most the loss has clamped its own
            return set()
        return {id(p) for p in same if p.grad is None and p.requires_grad}

    def _report_nan(self, logged: Mapping[str, float]) -> None:
        if (
            self._is_nan
            or not math.isnan(logged.get("train/loss", 0.0))
            or "guard/caught" in logged
        ):
            return
        self._is_nan = True
        if rank() == 0:
            logger.warning(
                "train/loss is NaN in iterations %d to %d, and the weights may be NaN too.\n"
                "Resume from an earlier checkpoint, with LossGuard() to skip such updates.",
                self._since + 1,
                self._trainer.state.iteration,
            )

    def _held(self) -> list[nn.Parameter]:
        return list(chain.from_iterable(g["params"] for g in self._trainer.optimizer.param_groups))
