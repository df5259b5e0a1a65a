"""The certificate: does how you run your own training change what you get?"""

from __future__ import annotations

from typing import Any

from diptych.engine.certificate.interruption import Build, InterruptionReport, check_interruption
from diptych.engine.certificate.invariances import check_invariances
from diptych.engine.certificate.report import InvarianceReport
from diptych.engine.trainer import Trainer


class Certificate:
    """Runs a training in several ways and compares what comes out."""

    def __call__(
        self,
        trainer: Trainer,
        batch: Any,
        *,
        microbatch_size: int | None = None,
        ranks: bool = True,
    ) -> InvarianceReport:
        """Compare one update as it is with the same in pieces, in tiles, on ranks, and unwatched.

        The gradient of the user's own model, loss and batch is taken whole, in micro-batches, with
        the loss in tiles, and on two ranks in processes of their own; the update is made with and
        without the attached handlers. Copies are compared in float64 where the model can compute
        in that; layers of dropout are off where they would draw other numbers for other shapes.
        The trainer is left as it was.

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
            The report: `report.passed`, and as text a table that names what breaks the promise:
            batch norm, random draws that nobody replays, a loss that ignores the other ranks, a
            factor of their number, a handler that writes where it should look.

        Raises:
            ValueError: if the batch is too small to be cut, or the model is sharded.
        """
        return check_invariances(trainer, batch, microbatch_size=microbatch_size, ranks=ranks)

    def interruption(self, build: Build, *, steps: int = 20, at: int = 7) -> InterruptionReport:
        """Compare a run that is interrupted and resumed with one that is not, bit for bit.

        The trainer is built three times, each from the same random state; no `CheckpointManager`
        is needed, and none should be attached. Exact on a CPU; on an accelerator as far as its
        kernels are deterministic.

        Args:
            build: makes a trainer and its loader.
            steps: iterations of the whole run.
            at: iterations before the interruption, 1 <= at < steps.

        Returns:
            The report; `report.passed` and `str(report)` say what it found.

        Raises:
            ValueError: if `at` is not inside the run, or the model is sharded.
            ResumeError: if the loader cannot go to a position inside an epoch.
        """
        return check_interruption(build, steps, at)


certify = Certificate()
"""The certificate, ready to use."""
