"""CLIPDistillationLoss: a teacher's similarities or features as the target of a student."""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.losses.base.contrastive import Pairs
from diptych.losses.base.objectives import contrast
from diptych.losses.base.positives import pair_positives
from diptych.losses.base.validation import check_choice, check_positive
from diptych.losses.distillation.taught import TaughtLoss, TeacherPairs
from diptych.losses.registry import register_loss

KINDS = ("similarity", "feature", "interactive")


@register_loss("clip_distillation")
class CLIPDistillationLoss(TaughtLoss):
    """Distillation of a two-tower model into a smaller one (TinyCLIP, MobileCLIP, CLIP-KD).

    Called ``loss(first, second, teacher_first, teacher_second, groups=None)``. With S the student's
    similarities / `temperature` in the global batch, T the teacher's / `teacher_temperature`:

    - ``similarity``: 1/2 [mean_i KL(softmax(T_i) || softmax(S_i)) + the same over columns]. The
      dimensions of teacher and student may differ.
    - ``feature``: 1/2 [mean_i |f_i - F_i|^2 + mean_i |s_i - S_i|^2] of normalised features, the
      teacher's in capitals.
    - ``interactive``: 1/2 [InfoNCE of the student's first with the teacher's second sides + the
      student's second with the teacher's first sides], at the student's temperature. Only this kind
      uses `groups`.

    Each is >= 0, and ``similarity`` and ``feature`` are 0 if the student equals its teacher. Add
    the contrastive loss with weight 1, for example in a `WeightedSum`.

    Across ranks: features of student and teacher are gathered, the student's with gradient; a rank
    computes its b rows and its b columns against all B. Exact for uneven local batches.

    Source: Wu et al. 2023, arXiv:2309.12314; Vasu et al. 2023, arXiv:2311.17049; Yang et al. 2023,
    arXiv:2307.12732, for ``feature`` and ``interactive``. Papers that minimise the cross entropy
    have the same gradient: it is the KL divergence plus the teacher's entropy.

    Args:
        kind: ``"similarity"``, ``"feature"`` or ``"interactive"``.
        temperature: The student's tau, > 0.
        teacher_temperature: The teacher's tau, > 0, with which it was trained; never learned.
        learn_temperature: Whether ln(1 / temperature) is a parameter, bounded to [0, ln 100]. To
            use that of the model, see `share_logit_scale`.

    Raises:
        ValueError: If an argument is out of range; when called, if teacher and student differ in
            dimension and the kind compares their features.
    """

    def __init__(
        self,
        *,
        kind: str = "similarity",
        temperature: float = 0.07,
        teacher_temperature: float = 0.01,
        learn_temperature: bool = True,
    ) -> None:
        check_choice("kind", kind, KINDS)
        check_positive("teacher_temperature", teacher_temperature)
        super().__init__(
            temperature=temperature, learn_temperature=learn_temperature and kind != "feature"
        )
        self.kind = kind
        self.teacher_temperature = teacher_temperature

    def taught_objective(self, pairs: Pairs, teacher: TeacherPairs) -> dict[str, Tensor]:
        """Return {"distillation": the loss}."""
        if self.kind != "similarity" and pairs.first.shape != teacher.first.shape:
            raise ValueError(
                f"teacher_first must be {list(pairs.first.shape)} as the student's features for"
                f" kind={self.kind!r}, got {list(teacher.first.shape)}. Add a Projection to the"
                " student, or choose kind='similarity'."
            )
        losses = {
            "similarity": self._similarity,
            "feature": self._feature,
            "interactive": self._interactive,
        }[self.kind](pairs, teacher)
        return {"distillation": 0.5 * pairs.batch.mean(losses)}

    def _similarity(self, pairs: Pairs, teacher: TeacherPairs) -> Tensor:
        """Return the divergences of this rank's rows and columns, added, [b]."""
        student = self._logits(
            pairs.first, pairs.second, pairs, self.temperature.scale(pairs.first)
        )
        target = self._logits(teacher.first, teacher.second, pairs, 1 / self.teacher_temperature)
        return torch.stack([_divergence(t, s) for t, s in zip(target, student, strict=True)]).sum(0)

    @staticmethod
    def _logits(
        first: Tensor, second: Tensor, pairs: Pairs, scale: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Return this rank's rows and columns of the similarity matrix, both [b, B]."""
        rows = (scale * first) @ pairs.batch.gather(second).T
        if pairs.batch.world_size == 1:
            return rows, rows.T
        return rows, (scale * second) @ pairs.batch.gather(first).T

    @staticmethod
    def _feature(pairs: Pairs, teacher: TeacherPairs) -> Tensor:
        """Return the squared distances of both sides, added, [b]."""
        return ((pairs.first - teacher.first) ** 2 + (pairs.second - teacher.second) ** 2).sum(1)

    def _interactive(self, pairs: Pairs, teacher: TeacherPairs) -> Tensor:
        """Return the sum of both directions' InfoNCE losses."""
        positives = pair_positives(pairs.batch, pairs.groups, pairs.first.device)
        scale = self.temperature.scale(pairs.first)
        across = (pairs.first, teacher.second), (pairs.second, teacher.first)
        return torch.stack(
            [contrast(own, pairs.batch.gather(other), scale, positives) for own, other in across]
        )


def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Return KL(softmax(target) || softmax(logits)) of each row, [b]."""
    wanted, found = target.log_softmax(1), logits.log_softmax(1)
    return (wanted.exp() * (wanted - found)).sum(1)
