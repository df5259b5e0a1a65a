"""HardNegativeLoss: InfoNCE with larger weights on harder negatives."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.losses.base.contrastive import BaseContrastiveLoss, Pairs
from diptych.losses.base.hard_negatives import HardNegatives
from diptych.losses.base.objectives import masked_info_nce
from diptych.losses.base.positives import pair_positives
from diptych.losses.base.two_views import two_views
from diptych.losses.base.validation import (
    check_at_least,
    check_choice,
    check_fraction,
    check_positive,
)
from diptych.losses.registry import register_loss


@register_loss("hard_negative")
class HardNegativeLoss(BaseContrastiveLoss):
    """InfoNCE with larger weights on hard negatives: debiased for views, HN-NCE for modalities.

    ``debiased`` (2B anchors, as in SimCLR): the mean of -log(p / (p + Ng)) with p = e^{pos},
    n = e^{neg}, Ng = max((sum w n / mean w - prior N p) / (1 - prior), N e^{-1/tau}), w = n^beta
    over the N = 2B - 2 negatives. `prior` is the probability that a negative is in fact a positive.

    ``hn_nce`` (both directions, as in CLIP): the mean of
    -[l_ii - log(alpha e^{l_ii} + sum_{j != i} w_ij e^{l_ij})] with
    w_ij = (B - 1) softmax_{j != i}(beta l_ij). With beta = 0 and alpha = 1 it is CLIP exactly.

    Everything is computed in log space, so that no exponential overflows. With `groups`, other
    samples of the group are not negatives; an anchor without negatives counts as 0. Both kinds are
    >= 0 for alpha >= 1.

    Across ranks: features are gathered, with gradient; a rank computes its rows against all
    columns. Exact for uneven local batches.

    Source: Robinson et al. 2021, arXiv:2010.04592 (``debiased``); Radenovic et al. 2023,
    arXiv:2301.02280 (``hn_nce``).

    Args:
        kind: ``"debiased"`` or ``"hn_nce"``.
        temperature: tau, > 0.
        beta: Exponent of the weights, >= 0; None: 1 (``debiased``) or 0.25 (``hn_nce``).
        prior: In [0, 1), for ``debiased``.
        alpha: Weight of the positive in the denominator, > 0, for ``hn_nce``.
        detach_weights: Whether the weights w are constants for the gradient.
        learn_temperature: Whether ln(1 / tau) is a parameter, bounded to [0, ln 100].
        normalize: Whether the loss normalises the features.

    Raises:
        ValueError: If an argument is out of range, or if the global batch is a single sample, which
            has no negative.
    """

    symmetric = True
    minimum_batch = 2

    def __init__(
        self,
        *,
        kind: str = "debiased",
        temperature: float = 0.5,
        beta: float | None = None,
        prior: float = 0.1,
        alpha: float = 1.0,
        detach_weights: bool = False,
        learn_temperature: bool = False,
        normalize: bool = True,
    ) -> None:
        super().__init__(
            temperature=temperature, learn_temperature=learn_temperature, normalize=normalize
        )
        check_choice("kind", kind, ("debiased", "hn_nce"))
        check_fraction("prior", prior)
        check_positive("alpha", alpha)
        if beta is None:
            beta = 1.0 if kind == "debiased" else 0.25
        check_at_least("beta", beta, 0)
        self.kind = kind
        self.prior = prior
        self.alpha = alpha
        self.detach_weights = detach_weights
        self.negatives = HardNegatives(beta=beta)

    @property
    def can_be_negative(self) -> bool:
        """Whether the value can be below 0."""
        return self.kind == "hn_nce" and self.alpha < 1

    def objective(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return {"contrastive": the loss}."""
        losses = self._debiased(pairs) if self.kind == "debiased" else self._hn_nce(pairs)
        return {"contrastive": 0.5 * pairs.batch.mean(losses)}

    def _log_weights(self, logits: Tensor, negatives: Tensor) -> Tensor:
        weights = self.negatives.log_weights(logits, negatives)
        return weights.detach() if self.detach_weights else weights

    def _debiased(self, pairs: Pairs) -> Tensor:
        """Return the losses of 2b anchors, [2b]."""
        anchors, positives, batch = two_views(pairs)
        scale = self.temperature.scale(anchors)
        logits = (scale * anchors) @ batch.gather(anchors).T
        own = scale * (pairs.first * pairs.second).sum(1).repeat(2)
        negatives = positives.negatives()
        empty = ~negatives.any(1)
        weighted = logits + self._log_weights(logits, negatives)
        hard = weighted.masked_fill(~(negatives | empty[:, None]), -math.inf).logsumexp(1)
        log_count = negatives.sum(1).clamp_min(1).to(logits.dtype).log()
        estimate = _log_difference(hard, own, log_count, self.prior)
        floor = log_count - scale
        estimate = torch.where(estimate < floor, floor, estimate)
        return F.softplus(estimate - own).masked_fill(empty, 0.0)

    def _hn_nce(self, pairs: Pairs) -> Tensor:
        """Return the losses of b pairs, both directions added, [b]."""
        batch = pairs.batch
        positives = pair_positives(batch, pairs.groups, pairs.first.device)
        scale = self.temperature.scale(pairs.first)
        own, negatives = positives.own(), positives.negatives()

        def direction(logits: Tensor) -> Tensor:
            weights = self._log_weights(logits, negatives)
            weights = torch.where(own, math.log(self.alpha), weights)
            losses = masked_info_nce(logits, own, own | negatives, log_weights=weights)
            return losses.masked_fill(~negatives.any(1), 0.0)

        rows = (scale * pairs.first) @ batch.gather(pairs.second).T
        if batch.world_size == 1:
            return direction(rows) + direction(rows.T)
        return direction(rows) + direction((scale * pairs.second) @ batch.gather(pairs.first).T)


def _log_difference(hard: Tensor, own: Tensor, log_count: Tensor, prior: float) -> Tensor:
    """Return log((e^hard - prior e^{log_count + own}) / (1 - prior)), -inf if negative."""
    if prior == 0:
        return hard
    gap = math.log(prior) + log_count + own - hard
    # A row with a negative difference gets an arbitrary gap, to keep NaN out of its gradient.
    share = torch.where(gap < 0, gap, -1.0)
    difference = hard + torch.log(-torch.expm1(share)) - math.log1p(-prior)
    return difference.masked_fill(gap >= 0, -math.inf)
