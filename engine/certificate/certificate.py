"""The certificate: checks that how a training runs does not change its result."""

from __future__ import annotations

from typing import Any

from diptych.engine.certificate.interruption import Build, InterruptionReport, check_interruption
from diptych.engine.certificate.invariances import check_invariances
from diptych.engine.certificate.report import InvarianceReport
from diptych.engine.trainer import Trainer


class Certificate:
    """Runs a training in several ways and compares the results."""

    def __call__(
        self,
        trainer: Trainer,
        batch: Any,
        *,
        microbatch_size: int | None = None,
        ranks: bool = True,
    ) -> InvarianceReport:
        """Compare one update with the same in micro-batches, in tiles, on ranks, and unobserved.

        It compares the gradients of copies of the trainer's model and loss: of the whole batch, in
        micro-batches, with the loss in tiles, and on two ranks in processes of their own. It also
        compares the update with and without the attached handlers. Copies compute in float64 if the
        model can. Dropout is off where other shapes would draw other numbers. The trainer is not
        changed.

        ```python
        report = certify(trainer, batch)
        print(report)
        assert report.passed
        ```

        Args:
            trainer: with everything attached, before or after some training.
            batch: one of its batches, of at least 4 samples.
            microbatch_size: samples of a piece; None: about a third of the batch, so that the
                last piece is smaller.
            ranks: whether to start two processes for the check on two ranks.

        Returns:
            The report: `report.passed`, and as text a table that names each cause: batch norm,
            random draws without a replay, a loss that ignores the other ranks, a factor of the
            number of ranks, a handler with an undeclared change.

        Raises:
            ValueError: if the batch has fewer than 4 samples, or the model is sharded.
        """
        return check_invariances(trainer, batch, microbatch_size=microbatch_size, ranks=ranks)

    def interruption(self, build: Build, *, steps: int = 20, at: int = 7) -> InterruptionReport:
        """Compare a run that is interrupted and resumed with an uninterrupted one, bit for bit.

        The trainer is built three times, each from the same random state. Attach no
        `CheckpointManager`; the check needs none. Exact on a CPU; on an accelerator as far as its
        kernels are deterministic.

        Args:
            build: returns a new trainer and its loader.
            steps: iterations of the whole run.
            at: iterations before the interruption, 1 <= at < steps.

        Returns:
            The report: `report.passed`, and as text the values that differ and their likely cause.

        Raises:
            ValueError: if `at` is outside the run, or the model is sharded.
            ResumeError: if the interruption is inside an epoch and the loader has no position.
        """
        return check_interruption(build, steps, at)


certify = Certificate()
"""The certificate, ready to use."""
