"""Batches of a single sample, which batch normalisation cannot normalise in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from diptych.engine.containers import leaves
from diptych.engine.data.batches import batch_size, batch_slice
from diptych.engine.distributed.collectives import maxima, world_size
from diptych.engine.distributed.dtensor import has_shards
from diptych.engine.distributed.hang_report import waits_at
from diptych.engine.forward_faults import SingleSampleError
from diptych.engine.modules import KnownParts, SavedBuffers
from diptych.engine.random_state import forward_random_state, set_forward_random_state

LEFT, REFUSED = 1, 2
"""What ranks tell one another of a batch that one of them cannot normalise."""


def _batch_norms(parts: list[nn.Module]) -> list[nn.Module]:
    """Return the batch norms of a model whose forward pass one rank can run alone."""
    if any(isinstance(part, nn.SyncBatchNorm) for part in parts):
        return []
    return [part for part in parts if isinstance(part, _BatchNorm)]


@attrs.define(eq=False)
class SingleSamples:
    """Decides, alike on all ranks and before they wait in the loss, whether to skip a batch.

    Only a forward pass shows whether a batch norm gets one value a channel: one over the pixels of
    an image gets more. So a single sample runs through the model once more, when the shapes of its
    tensors come first. Over ranks, a model with batch norms costs an exchange between hosts an
    update. A sharded model is left out, whose forward pass needs all ranks.

    Args:
        device: its random generators are restored.
    """

    device: torch.device
    _norms: KnownParts[nn.Module] = attrs.field(
        factory=lambda: KnownParts(_batch_norms), init=False
    )
    _known: dict[Any, bool] = attrs.field(factory=dict, init=False)

    @waits_at("agreeing on batches of a single sample")
    def is_left(
        self,
        model: nn.Module,
        forward: Callable[[Any], Any],
        batch: Any,
        least: int,
        *,
        first: bool,
    ) -> bool:
        """Return whether to skip a batch, as one that the end of a pass has left.

        Args:
            model: the model, in training mode.
            forward: runs it on a batch.
            batch: the batch of this rank.
            least: samples in its smallest piece.
            first: whether it is the first batch of a run, which is never skipped.

        Raises:
            SingleSampleError: on all ranks, if a rank cannot normalise a batch that is not skipped.
        """
        if not self._can_fail(model, least):
            return False
        can_skip = batch_size(batch) == 1 and not first
        if world_size() == 1:
            return can_skip and self._fails(model, forward, batch)
        fails = least == 1 and self._fails(model, forward, batch)
        (found,) = maxima((LEFT if can_skip else REFUSED) * fails)
        if found == REFUSED:
            raise _refusal("on this rank" if fails else "on another rank")
        return found == LEFT

    def _can_fail(self, model: nn.Module, least: int) -> bool:
        """Return whether a batch may fail on some rank; all ranks return the same."""
        asks = least == 1 or world_size() > 1
        return asks and bool(self._norms.of(model)) and not has_shards(model)

    def _fails(self, model: nn.Module, forward: Callable[[Any], Any], batch: Any) -> bool:
        sample = batch_slice(batch, 0, 1)
        shapes = tuple(leaf.shape for leaf in leaves(sample) if isinstance(leaf, Tensor))
        key = (shapes, tuple(norm.training for norm in self._norms.of(model)))
        if key not in self._known:
            buffers, drawn = SavedBuffers(model), forward_random_state(self.device)
            self._known[key] = _raises(forward, sample)
            buffers.restore()
            set_forward_random_state(drawn, self.device)
        return self._known[key]


def _refusal(where: str) -> SingleSampleError:
    return SingleSampleError(
        "a batch, and each of its micro-batches, must have 2 samples or more on every rank for the "
        f"model's batch normalisation, got one of a single sample {where}. Raise batch_size or "
        "microbatch_size, set drop_last=True, or use SyncBatchNorm"
    )


@torch.no_grad()
def _raises(forward: Callable[[Any], Any], sample: Any) -> bool:
    try:
        forward(sample)
    except SingleSampleError:
        return True
    return False
