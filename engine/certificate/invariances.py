"""One update of the user's own training, run in pieces, in tiles, on two ranks, and watched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import nn

from diptych.engine.certificate.observation import check_handlers
from diptych.engine.certificate.report import Check, InvarianceReport, shortened
from diptych.engine.certificate.two_ranks import check_ranks
from diptych.engine.certificate.update_copy import (
    BATCH_NORM,
    DROPOUT,
    Specimen,
    check_whole,
    in_double,
    in_evaluation_mode,
    names_of,
    relative_error,
)
from diptych.engine.data.batches import batch_size
from diptych.engine.step.loss_contract import set_tile, tiled_parts
from diptych.engine.trainer import Trainer

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Relative, of gradients; half precision is looser still."""
LOOSE = 5e-2


def check_invariances(
    trainer: Trainer, batch: Any, *, microbatch_size: int | None, ranks: bool
) -> InvarianceReport:
    """Run every check.

    Args:
        trainer: as it was built, or after some training; what it holds is the same afterwards.
        batch: one of its batches, of at least four samples.
        microbatch_size: samples of a piece; None: about a third of the batch, so that the last
            piece is smaller.
        ranks: whether to start two processes.

    Raises:
        ValueError: if the batch is too small to be cut, or the model is sharded.
    """
    check_whole(trainer)
    size = batch_size(batch)
    if size < 4:
        raise ValueError(f"a batch to certify must hold at least 4 samples, got {size}")
    specimen, batch_there = _exact(trainer, batch)
    quiet, noise = _quiet(specimen, batch_there)
    exam = Exam(specimen, quiet, batch_there, microbatch_size or -(-size // 3), noise)
    checks = [exam.whole(), exam.micro_batched(), *exam.replayed(), exam.tiled()]
    if ranks:
        checks += check_ranks(quiet, batch_there, exam.tolerance)
    return InvarianceReport((*checks, check_handlers(trainer, batch)))


@attrs.frozen
class Exam:
    """The checks that one process makes.

    Attributes:
        specimen: the training as it is.
        quiet: the same with dropout off, where it has any.
        batch: in the specimen's precision.
        piece: samples of a micro-batch.
        noise: what was turned off, for people.
    """

    specimen: Specimen
    quiet: Specimen
    batch: Any
    piece: int
    noise: str

    @property
    def tolerance(self) -> float:
        """The relative error that is rounding in the specimen's precision."""
        parameters = [*self.specimen.model.parameters(), *self.specimen.loss.parameters()]
        return max((TOLERANCES.get(p.dtype, LOOSE) for p in parameters), default=LOOSE)

    def whole(self) -> Check:
        """The trainer's step against one forward and backward pass by hand."""
        size = batch_size(self.batch)
        expected = self.specimen.plain_gradients(self.batch, size)
        error = relative_error(self.specimen.gradients(self.batch), expected)
        remark = "the step does not take the gradient of the loss"
        return self._check("the whole batch", error, remark)

    def micro_batched(self) -> Check:
        """Pieces against the whole batch."""
        way = f"micro-batches of {self.piece}"
        error = self._error_in_pieces(self.quiet)
        if error <= self.tolerance:
            return Check(way, error, passed=True, remark=self.noise)
        return Check(way, error, passed=False, remark=self._culprit_in_pieces())

    def replayed(self) -> Iterator[Check]:
        """Both passes over a piece see the same random numbers, where there are any."""
        if self.quiet is self.specimen:
            return
        expected = self.specimen.plain_gradients(self.batch, self.piece)
        found = self.specimen.gradients(self.batch, microbatch_size=self.piece)
        remark = "dropout draws other numbers when a piece runs again: nobody replays them"
        yield self._check("micro-batches, dropout on", relative_error(found, expected), remark)

    def tiled(self) -> Check:
        """The loss in tiles against the loss at once."""
        tile = max(1, batch_size(self.batch) // 3)
        way = f"tiles of {tile}"
        if not tiled_parts(self.quiet.loss):
            return Check(way, None, passed=True, remark="the loss has no tiles")
        plain = self.quiet.changed(lambda _, loss: set_tile(loss, None))
        tiled = self.quiet.changed(lambda _, loss: set_tile(loss, tile))
        error = relative_error(tiled.gradients(self.batch), plain.gradients(self.batch))
        return self._check(way, error, "the loss gives another gradient in tiles")

    def _check(self, way: str, error: float, culprit: str) -> Check:
        passed = error <= self.tolerance
        return Check(way, error, passed, "" if passed else culprit)

    def _error_in_pieces(self, specimen: Specimen) -> float:
        expected = specimen.gradients(self.batch)
        return relative_error(specimen.gradients(self.batch, microbatch_size=self.piece), expected)

    def _culprit_in_pieces(self) -> str:
        norms = names_of(self.quiet.model, BATCH_NORM)
        calm = self.quiet.changed(in_evaluation_mode(BATCH_NORM))
        if norms and self._error_in_pieces(calm) <= self.tolerance:
            return f"batch norm sees one piece at a time: {shortened(norms)}"
        coupled = self.quiet.changed(_couple)
        if self._error_in_pieces(coupled) <= self.tolerance:
            return "the loss couples samples and says couples_samples=False"
        return "the model mixes the samples of a batch, or the step does not join its pieces"


def _exact(trainer: Trainer, batch: Any) -> tuple[Specimen, Any]:
    """Return a specimen in float64, or as it is where it cannot compute in that."""
    specimen = Specimen.of(trainer, trainer.device, torch.float64)
    precise = in_double(batch)
    try:
        specimen.gradients(precise)
    except (RuntimeError, TypeError):  # a model that holds on to its own precision
        return Specimen.of(trainer, trainer.device, None), batch
    return specimen, precise


def _quiet(specimen: Specimen, batch: Any) -> tuple[Specimen, str]:
    """Return the specimen without dropout where it draws random numbers, and the remark on it."""
    first, second = (specimen.gradients(batch, seed=seed) for seed in (0, 1))
    if relative_error(first, second) == 0.0:
        return specimen, ""
    return specimen.changed(in_evaluation_mode(DROPOUT)), "with dropout off"


def _couple(_: nn.Module, loss: Any) -> None:
    loss.couples_samples = True
