"""GISTLoss: InfoNCE whose false negatives a teacher filters out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diptych.losses.base.contrastive import Pairs
from diptych.losses.base.objectives import masked_info_nce
from diptych.losses.base.positives import pair_positives
from diptych.losses.base.validation import check_at_least
from diptych.losses.distillation.taught import TaughtLoss, TeacherPairs
from diptych.losses.registry import register_loss


@register_loss("gist")
class GISTLoss(TaughtLoss):
    """InfoNCE without the negatives that a teacher finds similar, for data without ids (GISTEmbed).

    Called ``loss(first, second, teacher_first, teacher_second, groups=None)``. With f and s the
    sides and j over the batch, the mean over pairs i of -log exp(f_i.s_i / tau) / Z_i, Z_i =
    sum_j exp(f_i.s_j / tau) + sum_{j != i} exp(f_i.f_j / tau) + sum_{j != i} exp(s_i.s_j / tau).
    A candidate is dropped from Z_i if the teacher's cosine for it exceeds the teacher's cosine for
    the own pair minus `margin`; the own pair is never dropped. The loss is >= 0. With `groups`,
    other samples of the group are dropped too.

    Across ranks: features of student and teacher are gathered, the student's with gradient; a rank
    computes its b rows against all 3 B candidates. Exact for uneven local batches.

    Source: Solatorio 2024, arXiv:2402.16829.

    Args:
        temperature: tau, > 0.
        margin: >= 0; a larger one drops more candidates.
        learn_temperature: Whether ln(1 / tau) is a parameter, bounded to [0, ln 100].
        normalize: Whether the loss normalises the student's features; the teacher's always are.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.01,
        margin: float = 0.0,
        learn_temperature: bool = False,
        normalize: bool = True,
    ) -> None:
        super().__init__(
            temperature=temperature, learn_temperature=learn_temperature, normalize=normalize
        )
        check_at_least("margin", margin, 0)
        self.margin = margin

    def taught_objective(self, pairs: Pairs, teacher: TeacherPairs) -> dict[str, Tensor]:
        """Return {"contrastive": the loss}."""
        batch, device = pairs.batch, pairs.first.device
        positives = pair_positives(batch, pairs.groups, device)
        own = positives.own()
        own = torch.cat((own, torch.zeros_like(own).repeat(1, 2)), dim=1)
        judged = _similarities(teacher.first, teacher.second, batch.gather)
        limit = judged.gather(1, batch.positions(device)[:, None]) - self.margin
        kept = own | (positives.negatives().repeat(1, 3) & (judged <= limit))
        logits = _similarities(pairs.first, pairs.second, batch.gather)
        losses = masked_info_nce(self.temperature.scale(logits) * logits, own, kept)
        # A NaN of the teacher drops candidates; it must not do so unseen.
        return {"contrastive": batch.mean(losses + 0 * judged.sum(1))}


def _similarities(first: Tensor, second: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """Return first against second, first against first, second against second, [b, 3 B]."""
    firsts, seconds = gather(first), gather(second)
    return torch.cat((first @ seconds.T, first @ firsts.T, second @ seconds.T), dim=1)
