"""One update in pieces: the gradient of the whole batch in the memory of a piece.

A loss that couples the samples of a batch needs all features at once, so its gradient is cached
(Gao et al. 2021, arXiv:2101.06983): every piece goes through the model without a graph; the loss
on all features gives each feature's gradient; every piece goes through the model again, with the
same random draws, and its features' gradients go backward. A loss that is a mean over samples
needs no second pass: the pieces' sums and weights add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn

from diptych.engine.data.batches import batch_size
from diptych.engine.distributed.collectives import exchange_timeout
from diptych.engine.errors import BatchError
from diptych.engine.random_state import (
    ForwardRandomState,
    forward_random_state,
    set_forward_random_state,
)
from diptych.engine.tasks import Outputs

Forward = Callable[[Any], Outputs]
"""The task on one piece, under the step's autocast."""


class Buffers:
    """A model's buffers as they are now, for a second pass over the pieces to start from.

    The second pass makes the changes of the first anew (a batch norm's statistics, the vectors of
    a spectral norm), so that they are made once, and every piece sees what it saw. All are kept:
    torch does not tell which ones a forward pass changes (batch norm's leave no trace).
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def restore(self) -> None:
        """Put the buffers back, those too that a module has replaced."""
        with torch.no_grad():
            for module, name, buffer, value in self._kept:
                setattr(module, name, buffer.copy_(value))


@attrs.define(eq=False)
class Pieces:
    """Says into how many pieces a batch is cut.

    The ranks of a sharded model cut theirs into as many as the one with the largest batch, since
    they meet in each forward and backward pass. They tell each other over the host, where no
    device is waited for: a rank waits for the last one to begin its update.

    Args:
        agreed: whether the ranks cut into equally many.
    """

    agreed: bool = attrs.field(kw_only=True)
    _group: Any = attrs.field(default=None, init=False)

    def count(self, samples: int, size: int) -> int:
        """Return the number of pieces of at most `size` samples, or of more where others need it.

        Args:
            samples: of this rank's batch.
            size: of a piece, at most.

        Raises:
            BatchError: on all ranks, if one has fewer samples than there are pieces.
        """
        own = -(-samples // size)
        if not self.agreed:
            return own
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=exchange_timeout())
        told = torch.tensor([own, -samples])
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
        pieces, fewest = told.tolist()
        if -fewest < pieces:
            raise BatchError(
                f"each rank of a sharded model must have a sample for each of {pieces} pieces of "
                f"at most {size}, got {-fewest} on one: share the batch equally, or give a larger "
                "microbatch_size"
            )
        return int(pieces)


@attrs.define(eq=False)
class GradientCache:
    """Both passes of one update whose loss couples its samples.

    Args:
        model: whose buffers and random draws the second pass repeats.
        device: where it draws.
        last_backward: a context for the last backward pass of the update.
        between_pieces: is called after each of the other backward passes.
    """

    model: nn.Module
    device: torch.device
    last_backward: Callable[[], AbstractContextManager[Any]] = nullcontext
    between_pieces: Callable[[], object] = nullcontext
    _random: list[ForwardRandomState] = attrs.field(factory=list, init=False)
    _buffers: Buffers = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._buffers = Buffers(self.model)

    def outputs(self, forward: Forward, pieces: Sequence[Any]) -> Outputs:
        """Run the first pass; return the whole batch's outputs, as leaves for gradients."""
        parts: list[Outputs] = []
        with torch.no_grad():
            for piece in pieces:
                self._random.append(forward_random_state(self.device))
                parts.append(forward(piece))
        return _as_leaves(joined(parts, pieces))

    def backward(self, forward: Forward, pieces: Sequence[Any], outputs: Outputs) -> None:
        """Run the second pass: send the gradients in `outputs` through the model."""
        after_loss = forward_random_state(self.device)
        self._buffers.restore()
        start = 0
        for index, piece in enumerate(pieces):
            last = index == len(pieces) - 1
            with self.last_backward() if last else nullcontext():
                set_forward_random_state(self._random[index], self.device)
                again = forward(piece)
                start = _send_back(outputs, again, start, last=last)
            if not last:
                self.between_pieces()
        set_forward_random_state(after_loss, self.device)


def joined(parts: Sequence[Outputs], pieces: Sequence[Any]) -> Outputs:
    """Return the outputs of all pieces as those of the whole batch.

    Raises:
        BatchError: if the pieces name different outputs, or one has not a piece's samples first.
    """
    names = list(parts[0])
    for part, piece in zip(parts, pieces, strict=True):
        if list(part) != names:
            raise BatchError(
                f"a task must name the same outputs for every piece, got {names} and {list(part)}"
            )
        size = batch_size(piece)
        wrong = {n: tuple(v.shape) for n, v in part.items() if v.ndim and v.shape[0] != size}
        if wrong:
            raise BatchError(
                f"an output must have the piece's {size} samples as its first dimension, or no "
                f"dimension where all samples share it, got {wrong}"
            )
    return {name: _join([part[name] for part in parts]) for name in names}


def _join(values: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(values)) if values[0].ndim else values[-1]


def _as_leaves(outputs: Outputs) -> Outputs:
    return {n: v.detach().requires_grad_(v.is_floating_point()) for n, v in outputs.items()}


def _send_back(cached: Outputs, again: Outputs, start: int, *, last: bool) -> int:
    """Send one piece's share of the gradients backward; return where the next piece starts."""
    tensors, gradients, stop = [], [], start
    for name, value in again.items():
        if value.ndim:
            stop = start + value.shape[0]
        gradient = cached[name].grad
        if gradient is None or not value.requires_grad:
            continue
        if value.ndim:
            gradient = gradient[start:stop]
        elif not last:  # one value for all samples: its gradient goes back once
            continue
        tensors.append(value)
        gradients.append(gradient)
    if tensors:
        torch.autograd.backward(tensors, gradients)
    return stop
