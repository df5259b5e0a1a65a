"""Queue: keys of past batches, as negatives for the current batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diptych.losses.base.positives import NO_GROUP, without_own_groups
from diptych.losses.base.validation import check_at_least


class Queue(nn.Module):
    """A ring buffer of the last K keys with their group ids (arXiv:1911.05722).

    All tensors are persistent buffers, so that a resumed run has the same negatives. The keys have
    the dtype of the module (``queue.double()`` changes it), not of what is enqueued. Across ranks,
    enqueue the *gathered* keys, so that every rank holds the same queue. Read before enqueuing, or
    a batch has its own keys as negatives. No operation waits for the device.

    Args:
        size: K, the number of slots.
        dim: D, the number of features of a key.

    Attributes:
        keys: [K, D]; unfilled slots are zero.
        ids: int64 [K], the group of each key, or NO_GROUP.
        pointer: int64 0-dim, the next slot to write.
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
        """Return copies of (keys [K, D], ids [K]), and which slots are filled, bool [K]."""
        filled = torch.arange(len(self.ids), device=self.ids.device) < self.fill
        return self.keys.clone(), self.ids.clone(), filled

    @torch.no_grad()
    def enqueue(self, keys: Tensor, ids: Tensor | None = None) -> None:
        """Overwrite the oldest keys; of more than K keys, keep the last K.

        Args:
            keys: [n, D], any n.
            ids: Integers [n], the keys' groups; None: they match nothing.

        Raises:
            ValueError: If the keys' dimension differs from the queue's.
        """
        if keys.dim() != 2 or keys.shape[1] != self.keys.shape[1]:
            raise ValueError(
                f"keys must be [n, {self.keys.shape[1]}], got shape {tuple(keys.shape)}"
            )
        size, count = len(self.ids), len(keys)
        kept = min(size, count)
        slots = (self.pointer + torch.arange(count - kept, count, device=keys.device)) % size
        self.keys.index_copy_(0, slots, keys.detach()[count - kept :].to(self.keys.dtype))
        if ids is None:
            self.ids.index_fill_(0, slots, NO_GROUP)
        else:
            self.ids.index_copy_(0, slots, without_own_groups(ids[count - kept :]))
        self.pointer.add_(count).remainder_(size)
        self.fill.add_(count).clamp_(max=size)
