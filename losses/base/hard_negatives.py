"""HardNegatives: selection and weighting of negatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diptych.losses.base.validation import check_at_least, check_choice


class HardNegatives(nn.Module):
    """A selection of negatives, as a mask, and weights by similarity.

    Args:
        select: The negatives that count: ``"all"``; ``"hardest"``, each anchor's most similar one
            (VSE++, arXiv:1707.05612); ``"semi_hard"``, those less similar than the positive
            but within the margin (FaceNet, arXiv:1503.03832); ``"top_k"``, the k most similar.
        k: The number of negatives that ``"top_k"`` keeps.
        beta: Exponent of the weights w ~ exp(beta * logit), >= 0; 0: equal weights.

    Raises:
        ValueError: If an argument is out of range, or `k` is missing with ``"top_k"``.
    """

    def __init__(self, *, select: str = "all", k: int | None = None, beta: float = 0.0) -> None:
        super().__init__()
        check_choice("select", select, ("all", "hardest", "semi_hard", "top_k"))
        if (k is None) == (select == "top_k"):
            raise ValueError(
                f"k must be given if and only if select is 'top_k', got k={k} and {select!r}"
            )
        if k is not None:
            check_at_least("k", k, 1)
        check_at_least("beta", beta, 0)
        self.select = select
        self.k = k
        self.beta = beta

    def choose(
        self,
        similarity: Tensor,
        negatives: Tensor,
        positive: Tensor | None = None,
        margin: float = math.inf,
    ) -> Tensor:
        """Return the mask of the negatives that count, bool [n, m], a subset of `negatives`.

        Args:
            similarity: [n, m].
            negatives: Bool [n, m].
            positive: [n], each anchor's similarity to its own pair, for ``"semi_hard"``.
            margin: For ``"semi_hard"``: negatives lie in (positive - margin, positive).
        """
        if self.select == "all":
            return negatives
        scores = similarity.detach()
        if self.select == "semi_hard":
            if positive is None:
                raise ValueError("positive must be given if select is 'semi_hard', got None")
            bound = positive.detach()[:, None]
            # Written as exclusions, so that a NaN, which compares as False, stays in the loss.
            return negatives & ~(scores >= bound) & ~(scores <= bound - margin)
        k = min(self.k or 1, scores.shape[1])
        best = scores.masked_fill(~negatives, -math.inf).topk(k, dim=1).indices
        return torch.zeros_like(negatives).scatter_(1, best, True) & negatives

    def log_weights(self, logits: Tensor, negatives: Tensor) -> Tensor:
        """Return log w, [n, m]: w is the softmax over each row's negatives times their number.

        The weights of a row average to 1 over its negatives. Other entries, and rows without a
        negative, are 0 (weight 1). Log space avoids overflow.
        """
        if self.beta == 0:
            return torch.zeros_like(logits)
        empty = ~negatives.any(1, keepdim=True)
        scores = (self.beta * logits).masked_fill(~(negatives | empty), -math.inf)
        count = negatives.sum(1, keepdim=True).clamp_min(1).to(logits.dtype)
        weights = self.beta * logits - scores.logsumexp(1, keepdim=True) + count.log()
        return weights.masked_fill(~negatives, 0.0)
