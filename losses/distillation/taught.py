"""TaughtLoss: base of the losses on pairs of features that a teacher computes too."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diptych.losses.base.contrastive import BaseContrastiveLoss, Pairs
from diptych.losses.base.loss import sum_of_terms
from diptych.losses.base.normalization import normalize
from diptych.losses.base.validation import check_pair, working_dtype


class TeacherPairs(NamedTuple):
    """The teacher's features of this rank's pairs.

    Attributes:
        first: [b, E], float32 or float64, normalised, detached.
        second: [b, E], likewise.
    """

    first: Tensor
    second: Tensor


class TaughtLoss(BaseContrastiveLoss):
    """Base of the losses on the features of a student and of its teacher.

    Called ``loss(first, second, teacher_first, teacher_second, groups=None)``. A subclass defines
    `taught_objective`. The teacher's features get no gradient and may have another dimension than
    the student's.
    """

    without_gradient = ("teacher_first", "teacher_second")

    def forward(  # type: ignore[override]  # two more sides
        self,
        first: Tensor,
        second: Tensor,
        teacher_first: Tensor,
        teacher_second: Tensor,
        groups: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, a scalar that averages over ranks to that of the global batch.

        Args:
            first: [b, D], floating point.
            second: [b, D], floating point.
            teacher_first: [b, E], the teacher's features of `first`; no gradient.
            teacher_second: [b, E], the teacher's features of `second`; no gradient.
            groups: Integers [b]; pairs with equal ids match one another.

        Raises:
            ValueError: If shapes do not fit.
            TypeError: If features are not floating point or groups not integers.
        """
        return sum_of_terms(self.terms(first, second, teacher_first, teacher_second, groups))

    def terms(  # type: ignore[override]  # two more sides
        self,
        first: Tensor,
        second: Tensor,
        teacher_first: Tensor,
        teacher_second: Tensor,
        groups: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the named, weighted parts whose sum is the loss. Arguments as for `forward`."""
        pairs = self.prepare(first, second, groups)
        check_pair(self.without_gradient, teacher_first, teacher_second)
        if len(teacher_first) != len(first):
            raise ValueError(
                f"teacher_first and teacher_second must have a row for each of {len(first)} pairs,"
                f" got {len(teacher_first)}"
            )
        dtype = working_dtype(first, teacher_first, teacher_second)
        with torch.autocast(first.device.type, enabled=False):
            sides = [normalize(x.detach().to(dtype)) for x in (teacher_first, teacher_second)]
            return self.taught_objective(pairs, TeacherPairs(*sides))

    def taught_objective(self, pairs: Pairs, teacher: TeacherPairs) -> dict[str, Tensor]:
        """Return the named terms; they average over ranks to those of the global batch."""
        raise NotImplementedError

    def example_inputs(
        self, batch: int, *, dim: int = 8, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Return the sides of student and teacher [batch, dim] for the contract test."""
        return tuple(torch.randn(batch, dim, generator=generator) for _ in range(4))
