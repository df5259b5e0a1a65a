"""The checks of one update: in pieces, in tiles, on two ranks, and with handlers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import nn

from diptych.engine.certificate.handler_changes import check_handlers
from diptych.engine.certificate.report import Check, InvarianceReport
from diptych.engine.certificate.training_copy import (
    BATCH_NORM,
    DROPOUT,
    TrainingCopy,
    as_double,
    check_not_sharded,
    in_evaluation_mode,
    names_in_training,
    relative_error,
)
from diptych.engine.certificate.two_ranks import check_ranks
from diptych.engine.data.batches import batch_size
from diptych.engine.name_patterns import listed
from diptych.engine.step.loss_contract import set_tile, tiled_parts
from diptych.engine.trainer import Trainer

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Largest relative errors of gradients that count as rounding."""
LOOSE = 5e-2
"""The same in other precisions."""


def check_invariances(
    trainer: Trainer, batch: Any, *, microbatch_size: int | None, ranks: bool
) -> InvarianceReport:
    """Run every check; see `Certificate.__call__` for the arguments.

    Raises:
        ValueError: if the batch has fewer than 4 samples, or the model is sharded.
    """
    check_not_sharded(trainer)
    size = batch_size(batch)
    if size < 4:
        raise ValueError(f"batch must have at least 4 samples, got {size}")
    training, exact = _most_exact(trainer, batch)
    checks = LocalChecks(
        training, _without_draws(training, exact), exact, microbatch_size or -(-size // 3)
    )
    found = [checks.whole(), checks.in_pieces(), *checks.with_draws(), checks.in_tiles()]
    if ranks:
        found += check_ranks(checks.without_draws, exact, checks.tolerance)
    return InvarianceReport((*found, check_handlers(trainer, batch)))


@attrs.frozen
class LocalChecks:
    """The checks that run in this process.

    Attributes:
        training: a copy of the training as it is.
        without_draws: the same object, or a copy with dropout off if the training has dropout.
        batch: in the precision of the training.
        size: samples of a piece.
    """

    training: TrainingCopy
    without_draws: TrainingCopy
    batch: Any
    size: int

    @property
    def tolerance(self) -> float:
        """The largest relative error that counts as rounding in the training's precision."""
        parameters = [*self.training.model.parameters(), *self.training.loss.parameters()]
        return max((TOLERANCES.get(p.dtype, LOOSE) for p in parameters), default=LOOSE)

    def whole(self) -> Check:
        """Compare the trainer's step with a plain forward and backward pass."""
        expected = self.training.plain_gradients(self.batch, batch_size(self.batch))
        error = relative_error(self.training.gradients(self.batch), expected)
        remark = "the step does not take the gradient of the loss"
        return self._check("the whole batch", error, remark)

    def in_pieces(self) -> Check:
        """Compare micro-batches with the whole batch."""
        name, error = f"micro-batches of {self.size}", self._error_in_pieces(self.without_draws)
        if error <= self.tolerance:
            same = self.without_draws is self.training
            return Check(name, error, passed=True, remark="" if same else "with dropout off")
        return Check(name, error, passed=False, remark=self._cause_in_pieces())

    def with_draws(self) -> Iterator[Check]:
        """Check that both passes over a piece draw the same numbers, if there is dropout."""
        if self.without_draws is self.training:
            return
        expected = self.training.plain_gradients(self.batch, self.size)
        found = self.training.gradients(self.batch, microbatch_size=self.size)
        remark = "dropout draws other numbers in the second pass over a piece: no replay"
        yield self._check("micro-batches, dropout on", relative_error(found, expected), remark)

    def in_tiles(self) -> Check:
        """Compare the loss in tiles with the loss of the whole matrix."""
        tile, training = max(1, batch_size(self.batch) // 3), self.without_draws
        name = f"tiles of {tile}"
        if not tiled_parts(training.loss):
            return Check(name, None, passed=True, remark="the loss has no tiles")
        plain = training.changed(lambda _, loss: set_tile(loss, None))
        tiled = training.changed(lambda _, loss: set_tile(loss, tile))
        error = relative_error(tiled.gradients(self.batch), plain.gradients(self.batch))
        return self._check(name, error, "the loss has another gradient in tiles")

    def _check(self, name: str, error: float, cause: str) -> Check:
        passed = error <= self.tolerance
        return Check(name, error, passed, "" if passed else cause)

    def _error_in_pieces(self, training: TrainingCopy) -> float:
        expected = training.gradients(self.batch)
        return relative_error(training.gradients(self.batch, microbatch_size=self.size), expected)

    def _cause_in_pieces(self) -> str:
        norms = names_in_training(self.without_draws.model, BATCH_NORM)
        without_norms = self.without_draws.changed(in_evaluation_mode(BATCH_NORM))
        if norms and self._error_in_pieces(without_norms) <= self.tolerance:
            return f"batch norm sees one piece at a time: {listed(norms, 3)}"
        coupled = self.without_draws.changed(_declare_coupled)
        if self._error_in_pieces(coupled) <= self.tolerance:
            return "the loss couples samples and declares couples_samples=False"
        return "the model mixes the samples of a batch, or the step does not join its pieces"


def _most_exact(trainer: Trainer, batch: Any) -> tuple[TrainingCopy, Any]:
    """Return a copy and a batch in float64, or in their own precision if float64 fails."""
    training, double = TrainingCopy.of(trainer, trainer.device, torch.float64), as_double(batch)
    try:
        training.gradients(double)
    except (RuntimeError, TypeError):  # a model with a precision of its own
        return TrainingCopy.of(trainer, trainer.device, None), batch
    return training, double


def _without_draws(training: TrainingCopy, batch: Any) -> TrainingCopy:
    """Return the training, or a copy with dropout off if its gradients depend on the seed."""
    first, second = (training.gradients(batch, seed=seed) for seed in (0, 1))
    if relative_error(first, second) == 0.0:
        return training
    return training.changed(in_evaluation_mode(DROPOUT))


def _declare_coupled(_: nn.Module, loss: nn.Module) -> None:
    # A class attribute, since some losses compute it in a property.
    kind = type(loss)
    loss.__class__ = type(kind.__name__, (kind,), {"couples_samples": True})
