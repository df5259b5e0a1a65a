"""DINOLoss: a student predicts the sharpened, centred assignments of a momentum teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.losses.base.gather import GlobalBatch, global_batch, sum_over_ranks
from diptych.losses.base.loss import Loss
from diptych.losses.base.validation import (
    check_at_least,
    check_choice,
    check_floating,
    check_fraction,
    check_positive,
    working_dtype,
)
from diptych.losses.registry import register_loss

SINKHORN_STEPS = 3


@register_loss("dino")
class DINOLoss(Loss):
    """Cross entropy of a student's views with a teacher's other views (DINO, DINOv2).

    Called ``loss(student, teacher)`` with the logits over `dim` prototypes: the mean over samples
    and over all pairs of a teacher's view v and a student's view u != v of
    -sum_k p_k(v) log softmax_k(student_u / tau_s). The first student's views are the teacher's, in
    the same order. p = softmax((teacher - c) / tau_t) with ``centering="mean"``; with
    ``"sinkhorn"`` it is exp(teacher / tau_t) after three alternating normalisations, over the
    samples of each prototype and over the prototypes of each sample. The teacher gets no gradient.
    It is >= 0 and ln(dim) for uniform assignments.

    In training mode each call uses the centre and then moves it,
    c <- m c + (1 - m) mean(teacher), the mean over all views of the global batch: call the loss
    exactly once per update. In evaluation mode the centre does not change. The centre is a buffer.

    `student_temperature` and `teacher_temperature` are plain attributes and may be changed during
    training; the paper raises the teacher's from 0.04 to 0.07 over the first 30 epochs.

    Across ranks: the sums of the centre (`dim` numbers) and those of Sinkhorn (`dim` numbers from
    each rank, three times) run over all ranks. Exact for uneven local batches.

    Source: Caron et al. 2021, arXiv:2104.14294; Sinkhorn: Oquab et al. 2023, arXiv:2304.07193.

    Args:
        dim: K, the number of prototypes: the dimension of the heads' outputs.
        centering: ``"mean"`` or ``"sinkhorn"``, which has no centre and couples the samples.
        student_temperature: tau_s, > 0.
        teacher_temperature: tau_t, > 0.
        center_momentum: m, in [0, 1).

    Raises:
        ValueError: If an argument is out of range.
    """

    center: Tensor
    without_gradient = ("teacher",)

    def __init__(
        self,
        *,
        dim: int,
        centering: str = "mean",
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        check_at_least("dim", dim, 1)
        check_choice("centering", centering, ("mean", "sinkhorn"))
        check_positive("student_temperature", student_temperature)
        check_positive("teacher_temperature", teacher_temperature)
        check_fraction("center_momentum", center_momentum)
        self.centering = centering
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(dim))

    def terms(self, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        """Return {"dino": the loss}, and move the centre if training.

        Args:
            student: Logits of V views, [b, V, K].
            teacher: Logits of the first G of these views, [b, G, K]; gets no gradient.

        Raises:
            ValueError: If shapes do not fit, or no pair of different views exists.
            TypeError: If logits are not floating point.
        """
        self._check(student, teacher)
        size, views, _ = student.shape
        targets = teacher.shape[1]
        batch = global_batch(size, student_views=views, teacher_views=targets)
        with torch.autocast(student.device.type, enabled=False):
            dtype = working_dtype(student, teacher)
            predicted = F.log_softmax(student.to(dtype) / self.student_temperature, dim=2)
            assigned = self._assign(teacher.detach().to(dtype), batch)
            entropies = -(predicted @ assigned.transpose(1, 2))
            same = torch.eye(views, targets, dtype=torch.bool, device=student.device)
            pairs = views * targets - targets
            return {"dino": batch.mean(entropies.masked_fill(same, 0).sum((1, 2)) / pairs)}

    @torch.no_grad()
    def _assign(self, teacher: Tensor, batch: GlobalBatch) -> Tensor:
        """Return the teacher's assignments [b, G, K]; move the centre if training."""
        if self.centering == "sinkhorn":
            return sinkhorn(teacher / self.teacher_temperature, batch)
        assigned = ((teacher - self.center) / self.teacher_temperature).softmax(dim=2)
        if self.training:
            count = batch.total * teacher.shape[1]
            mean = sum_over_ranks(teacher.sum((0, 1))) / count
            self.center.lerp_(mean.to(self.center.dtype), 1 - self.center_momentum)
        return assigned

    def _check(self, student: Tensor, teacher: Tensor) -> None:
        for name, logits in (("student", student), ("teacher", teacher)):
            check_floating(name, logits)
            if logits.dim() != 3 or logits.shape[2] != len(self.center):
                raise ValueError(
                    f"{name} must be [batch, views, {len(self.center)}], got shape"
                    f" {tuple(logits.shape)}. Construct the loss with the dim of the heads."
                )
        if len(student) != len(teacher):
            raise ValueError(
                "student and teacher must have equal batches, got"
                f" {len(student)} and {len(teacher)} samples"
            )
        views, targets = student.shape[1], teacher.shape[1]
        if not 1 <= targets <= views or views < 2:
            raise ValueError(
                "student must have at least two views, and the teacher's views first, got"
                f" {views} views for {targets} of the teacher"
            )

    @classmethod
    def example(cls) -> DINOLoss:
        """Return a small instance with a centre that has moved."""
        loss = cls(dim=8)
        loss.center.copy_(torch.linspace(-1, 1, 8))
        return loss

    def example_inputs(
        self, batch: int, *, dim: int = 8, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Return logits of three and two views, [batch, 3, dim] and [batch, 2, dim]."""
        student = torch.randn(batch, 3, dim, generator=generator)
        return student, torch.randn(batch, 2, dim, generator=generator)


def sinkhorn(logits: Tensor, batch: GlobalBatch) -> Tensor:
    """Return assignments of all ranks' views that use all prototypes about equally.

    Args:
        logits: [b, G, K].
        batch: Sizes of all ranks.

    Returns:
        Probabilities [b, G, K], each sample's sum 1. In logarithms, so that nothing overflows.
    """
    one_of_each_rank = GlobalBatch((1,) * batch.world_size, batch.rank)
    for _ in range(SINKHORN_STEPS):
        local = logits.flatten(0, 1).logsumexp(0, keepdim=True)
        logits = logits - one_of_each_rank.gather(local).logsumexp(0)
        logits = logits.log_softmax(2)
    return logits.exp()
