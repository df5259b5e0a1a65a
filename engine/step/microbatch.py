"""Updates in pieces: the gradient of the whole batch in the memory of one piece.

A loss that couples the samples of a batch needs all features at once, so its gradient is cached
(Gao et al. 2021, arXiv:2101.06983). The first pass runs every piece through the model without a
graph; the loss of all features gives the gradient of each feature; the second pass runs every piece
again, with the same random draws, and sends the gradients of its features backward. A loss that is
a mean over samples needs no second pass: the step adds up the sums and weights of the pieces.
`diptych.engine.data.batches.cut_batch` cuts the batch into its pieces, the micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from diptych.engine.data.batches import batch_size
from diptych.engine.distributed.collectives import maxima
from diptych.engine.errors import BatchError
from diptych.engine.modules import SavedBuffers
from diptych.engine.random_state import (
    ForwardRandomState,
    forward_random_state,
    set_forward_random_state,
)
from diptych.engine.tasks import Outputs

Forward = Callable[[Any], Outputs]
"""The task on one piece, under the step's autocast."""


@attrs.define(eq=False)
class PieceCounter:
    """Computes the number of pieces of a batch.

    The ranks of a sharded model have collectives in each forward and backward pass, so all of them
    use the number of pieces of the largest batch. They exchange it between hosts, without waiting
    for a device; a rank waits until the last one starts its update.

    Args:
        agreed: whether all ranks use the same number.
    """

    agreed: bool = attrs.field(kw_only=True)

    def count(self, samples: int, size: int) -> int:
        """Return the number of pieces of at most `size` samples; more if another rank needs more.

        Args:
            samples: the samples of this rank's batch.
            size: the most samples of a piece.

        Raises:
            BatchError: on all ranks, if one has fewer samples than there are pieces.
        """
        own = max(1, -(-samples // size))  # a rank without samples takes part too
        if not self.agreed:
            return own
        pieces, fewest = maxima(own, -samples)
        if -fewest < pieces:
            raise BatchError(
                f"each rank of a sharded model must have a sample for each of {pieces} pieces of "
                f"at most {size}, got {-fewest} on one. Split the batch equally, or set a larger "
                "microbatch_size."
            )
        return pieces


@attrs.define(eq=False)
class GradientCache:
    """The two passes of one update whose loss couples its samples.

    Args:
        model: its buffers are restored before the second pass.
        device: its random generator is restored before each piece of the second pass.
        last_backward: a context for the last backward pass of the update.
        between_pieces: called after each of the other backward passes.
    """

    model: nn.Module
    device: torch.device
    last_backward: Callable[[], AbstractContextManager[Any]] = nullcontext
    between_pieces: Callable[[], object] = nullcontext
    _random: list[ForwardRandomState] = attrs.field(factory=list, init=False)
    _buffers: SavedBuffers = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._buffers = SavedBuffers(self.model)

    def outputs(self, forward: Forward, pieces: Sequence[Any]) -> Outputs:
        """Run the first pass; return the outputs of the whole batch, as leaves for gradients."""
        parts: list[Outputs] = []
        with torch.no_grad():
            for piece in pieces:
                self._random.append(forward_random_state(self.device))
                parts.append(forward(piece))
        return _as_leaves(join_outputs(parts, pieces))

    def backward(self, forward: Forward, pieces: Sequence[Any], outputs: Outputs) -> None:
        """Run the second pass: send the gradients of `outputs` backward through the model."""
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


def join_outputs(parts: Sequence[Outputs], pieces: Sequence[Any]) -> Outputs:
    """Return the outputs of the whole batch from those of its pieces.

    Raises:
        BatchError: if the pieces have different names, or the first dimension of an output is not
            the number of samples of its piece.
    """
    names = list(parts[0])
    for part, piece in zip(parts, pieces, strict=True):
        if list(part) != names:
            raise BatchError(
                f"task must return the same names for every piece, got {names} and {list(part)}"
            )
        size = batch_size(piece)
        wrong = {n: tuple(v.shape) for n, v in part.items() if v.ndim and v.shape[0] != size}
        if wrong:
            raise BatchError(
                f"an output of the task must have the {size} samples of the piece as its first "
                f"dimension, or no dimension if all samples share it, got {wrong}. "
                + _way_to_samples([shape[0] for shape in wrong.values()], size)
            )
    return {name: _join(name, [part[name] for part in parts]) for name in names}


def _way_to_samples(lengths: Sequence[int], size: int) -> str:
    """Return the way out for outputs of other lengths than the number of samples.

    Rows cannot be joined as they are: whether those of a sample, or those of the first caption of
    all samples, come first cannot be seen.
    """
    rows, rest = divmod(lengths[0], size) if size else (0, 0)
    way = "All parts of a batch must have the same number of samples"
    if rest or rows < 2:
        return way
    return (
        f"{way}. If a sample has {rows} rows, such as captions, return them as [samples, {rows}, "
        "...], and flatten the first two dimensions in the loss"
    )


def _join(name: str, values: Sequence[Tensor]) -> Tensor:
    shapes = sorted({tuple(value.shape[1:]) for value in values})
    if len(shapes) > 1:
        raise BatchError(
            f"an output of the task must have the same shape for each sample of every piece, got "
            f"{name} with {' and '.join(map(str, shapes))}. If it is a matrix of logits, return "
            "features, from which the loss computes the logits of the whole batch"
        )
    return torch.cat(list(values)) if values[0].ndim else values[-1]


def _as_leaves(outputs: Outputs) -> Outputs:
    return {n: v.detach().requires_grad_(v.is_floating_point()) for n, v in outputs.items()}


def _send_back(cached: Outputs, again: Outputs, start: int, *, last: bool) -> int:
    """Send the gradients of one piece backward; return the first sample of the next piece."""
    tensors, gradients, stop = [], [], start
    for name, value in again.items():
        if value.ndim:
            stop = start + value.shape[0]
        gradient = cached[name].grad
        if gradient is None or not value.requires_grad:
            continue
        if value.ndim:
            gradient = gradient[start:stop]
        elif not last:  # one value for all samples: send its gradient once
            continue
        tensors.append(value)
        gradients.append(gradient)
    if tensors:
        torch.autograd.backward(tensors, gradients)
    return stop
