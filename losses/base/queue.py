"""Queue: the keys of past batches, as negatives for the present one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diptych.losses.base.validation import check_at_least

NO_GROUP = torch.iinfo(torch.int64).min
"""The id of a key that came without a group: it matches nothing."""


class Queue(nn.Module):
    """A ring of the last K keys with their group ids, first in, first out (arXiv:1911.05722).

    Everything is a persistent buffer, so that a checkpoint resumes with the same negatives. Across
    ranks, enqueue the *gathered* keys: then every rank holds the same queue. Read before
    enqueuing, or a batch meets its own keys as negatives. No operation waits for the device.

    Args:
        size: K, number of slots.
        dim: D, features of a key.

    Attributes:
        keys: [K, D], zeros where unfilled.
        ids: int64 [K], the group of each key, NO_GROUP where there is none.
        pointer: int64 0-dim, the slot that is written next.
        fill: int64 0-dim, the number of slots that hold a key.

    Raises:
        ValueError: If `size` or `dim` is < 1.
    """

    keys: Tensor
    ids: Tensor
    pointer: Tensor
    fill: Tensor

    def __init__(self, *, size: int, dim: int) -> None:
        super().__init__()
        check_at_least("queue_size", size, 1)
        check_at_least("dim", dim, 1)
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("ids", torch.full((size,), NO_GROUP))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("fill", torch.zeros((), dtype=torch.int64))

    def read(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return copies of (keys [K, D], ids [K]) and bool [K], which slots are filled."""
        filled = torch.arange(len(self.ids), device=self.ids.device) < self.fill
        return self.keys.clone(), self.ids.clone(), filled

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor | None = None) -> None:
        """Write keys over the oldest ones; of more than K keys the last K stay.

        Args:
            keys: [n, D], any n.
            ids: Integers [n], the keys' groups; None: they match nothing.

        Raises:
            ValueError: If the keys' dimension is not the queue's.
        """
        if keys.dim() != 2 or keys.shape[1] != self.keys.shape[1]:
            raise ValueError(
                f"keys must be [n, {self.keys.shape[1]}], got shape {tuple(keys.shape)}"
            )
        size, count = len(self.ids), len(keys)
        kept = min(size, count)
        # float64 keys keep their precision in a queue that was made in float32.
        self.keys = self.keys.to(torch.promote_types(self.keys.dtype, keys.dtype))
        slots = (self.pointer + torch.arange(count - kept, count, device=keys.device)) % size
        self.keys.index_copy_(0, slots, keys.detach()[count - kept :].to(self.keys.dtype))
        if ids is None:
            self.ids.index_fill_(0, slots, NO_GROUP)
        else:
            self.ids.index_copy_(0, slots, ids[count - kept :].long())
        self.pointer.add_(count).remainder_(size)
        self.fill.add_(count).clamp_(max=size)
