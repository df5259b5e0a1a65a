"""MoCoLoss: InfoNCE of queries and keys with a queue of past keys as negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.losses.base.contrastive import BaseContrastiveLoss, Pairs
from diptych.losses.base.loss import sum_of_terms
from diptych.losses.base.objectives import masked_info_nce
from diptych.losses.base.positives import same_group
from diptych.losses.base.queue import Queue
from diptych.losses.registry import register_loss


@register_loss("moco")
class MoCoLoss(BaseContrastiveLoss):
    """InfoNCE of queries against their keys, with negatives from a queue of past keys (MoCo).

    Called ``loss(query, key, groups=None)``: the mean of CE([q.k+, q.Queue] / tau, 0). Keys come
    from a momentum encoder and get no gradient. It is >= 0, and 0 while the queue is empty. Queued
    keys of the query's group and unfilled slots are not negatives.

    In training mode each call enqueues its keys after reading the queue: call the loss exactly once
    per update. In evaluation mode the queue does not change.

    Across ranks: keys and groups are gathered before they are enqueued, so that every rank holds
    the same queue, with B new keys per update. A rank's queries are compared with their own keys
    and the queue. Exact for uneven local batches.

    Source: He et al. 2020, arXiv:1911.05722; v2: arXiv:2003.04297.

    Args:
        dim: D, the features' dimension.
        queue_size: K, the number of keys in the queue: K * D floats in memory and in checkpoints.
        temperature: tau, > 0.
        learn_temperature: Whether ln(1 / tau) is a parameter, bounded to [0, ln 100].
        normalize: Whether the loss normalises the features.

    Raises:
        ValueError: If an argument is out of range.
    """

    sides = ("query", "key")
    without_gradient = ("key",)
    negatives_in_batch = False

    def __init__(
        self,
        *,
        dim: int,
        queue_size: int = 65536,
        temperature: float = 0.07,
        learn_temperature: bool = False,
        normalize: bool = True,
    ) -> None:
        super().__init__(
            temperature=temperature, learn_temperature=learn_temperature, normalize=normalize
        )
        self.queue = Queue(size=queue_size, dim=dim)

    def forward(self, query: Tensor, key: Tensor, groups: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar that averages over ranks to that of the global batch.

        Args:
            query: [b, dim].
            key: [b, dim], the same samples through the momentum encoder; gets no gradient.
            groups: Integers [b]; a queued key with an equal id is not a negative.

        Raises:
            ValueError: If shapes do not fit.
            TypeError: If features are not floating point or groups not integers.
        """
        return sum_of_terms(self.terms(query, key, groups))

    def objective(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return {"contrastive": the loss}, and enqueue the keys if training."""
        batch, key = pairs.batch, pairs.second.detach()
        if key.shape[1] != self.queue.keys.shape[1]:
            raise ValueError(
                f"key must be [batch, {self.queue.keys.shape[1]}], got shape {tuple(key.shape)}."
                " Construct the loss with the dim of the features."
            )
        queued, ids, filled = self.queue.read()
        queued = queued.to(key.dtype)
        own = (pairs.first * key).sum(1, keepdim=True)
        logits = torch.cat((own, pairs.first @ queued.T), dim=1)
        negatives = filled.expand(len(key), -1)
        if pairs.groups is not None:
            negatives = negatives & ~same_group(pairs.groups, ids)
        positives = torch.zeros_like(logits, dtype=torch.bool)
        positives[:, 0] = True
        kept = torch.cat((positives[:, :1], negatives), dim=1)
        losses = masked_info_nce(self.temperature.scale(logits) * logits, positives, kept)
        if self.training:
            groups = None if pairs.groups is None else batch.gather(pairs.groups)
            self.queue.enqueue(batch.gather(key), groups)
        return {"contrastive": batch.mean(losses)}

    @classmethod
    def example(cls) -> MoCoLoss:
        """Return a small instance with a partly filled queue."""
        loss = cls(dim=8, queue_size=16)
        loss.queue.enqueue(torch.nn.functional.normalize(torch.randn(9, 8)), torch.arange(9))
        return loss
