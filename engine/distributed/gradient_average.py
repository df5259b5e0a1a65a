"""Gradients averaged over ranks, while the backward pass still goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diptych.engine.distributed.collectives import world_size
from diptych.engine.distributed.dtensor import has_shards, is_sharded
from diptych.engine.distributed.hang_report import waits_at

BUCKET = 2**23
"""Elements that travel together: enough to fill a link, few enough to leave early."""


@attrs.define(eq=False)
class _Bucket:
    """Parameters of one type whose gradients travel together.

    Attributes:
        parameters: what it holds.
        waiting: indices of those whose gradient the backward pass has not made yet.
        packed: the gradients one after the other, and for each 1 where this rank has it.
        work: the exchange that is under way.
        again: whether a gradient has changed since it was packed.
    """

    parameters: list[nn.Parameter]
    waiting: set[int] = attrs.field(factory=set)
    packed: Tensor | None = None
    work: Any = None
    again: bool = False

    def launch(self) -> None:
        """Begin the exchange of the gradients that this rank has; a missing one counts as 0."""
        gradients = [_dense(parameter) for parameter in self.parameters]
        packed = torch.cat([*(g.reshape(-1) for g in gradients), self._present(gradients[0])])
        # Divided before the sum, which keeps half precision finite.
        packed[: -len(gradients)].div_(world_size())
        self.packed, self.again = packed, False
        self.work = dist.all_reduce(packed, async_op=True)

    def _present(self, like: Tensor) -> Tensor:
        """Return for each parameter 1 where this rank has its gradient, else 0."""
        missing = [parameter.grad is None for parameter in self.parameters]
        if not any(missing):
            return like.new_ones(len(missing))
        return torch.stack([like.new_zeros(()) if m else like.new_ones(()) for m in missing])

    def receive(self) -> None:
        """Put the averages into the parameters; nothing where no rank has a gradient."""
        self.work.wait()
        if self.again:
            self.launch()
            self.work.wait()
        if self.packed is None:
            raise RuntimeError("a bucket must be launched before it is received")
        count = len(self.parameters)
        present = [1.0] * count
        if any(p.grad is None for p in self.parameters):
            present = self.packed[-count:].tolist()
        parts = self.packed[:-count].split([p.numel() for p in self.parameters])
        for parameter, part, ranks in zip(self.parameters, parts, present, strict=True):
            if ranks:
                _put(parameter, part.view(parameter.shape))
        self.packed = self.work = None


class GradientAverage:
    """Averages the gradients of modules over all ranks.

    A bucket of gradients leaves as soon as the last backward pass of the update has made all of
    them, in the same order on all ranks. Unlike torch's data-parallel wrapper this asks nothing of
    the model: parameters may be frozen and thawed between two updates, and one that the loss does
    not reach, on some ranks or on all, holds nothing up. Where no rank has a gradient there is
    none, as in a run of one process. Alone, nothing happens. The gradients of sharded parameters
    are averaged by the backward pass itself.

    Cost: the gradients' memory once more; where a rank lacks the gradient of a trainable
    parameter, that rank waits for the device once an update.

    Args:
        modules: returns the model, whose gradients leave during the backward pass, and the loss,
            whose gradients leave after it.
    """

    def __init__(self, modules: Callable[[], tuple[nn.Module, nn.Module]]) -> None:
        self._modules = modules
        self._buckets: list[_Bucket] = []
        self._launched = 0
        self._hooks: list[RemovableHandle] = []
        self._trained: list[nn.Parameter] = []
        self._listening = False

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Around the update's last backward pass: exchange what it has made ready.

        Raises:
            ValueError: if a gradient is sparse.
        """
        if world_size() == 1:
            yield
            return
        self._prepare()
        self._listening = True
        try:
            yield
        finally:
            self._listening = False
        self._launch_to(len(self._buckets))

    @waits_at("averaging gradients")
    def receive(self) -> None:
        """Wait for the averages and put them in place of the gradients."""
        for bucket in self._buckets[: self._launched]:
            bucket.receive()
        self._launched = 0

    def _prepare(self) -> None:
        model, loss = self._modules()
        during, after = _trained(model), list[nn.Parameter]()
        if has_shards(model):
            # Its backward pass has collectives of its own: what is whole leaves when they are done.
            during, after = after, [p for p in during if not is_sharded(p)]
        of_model = {id(parameter) for parameter in (*during, *after)}
        after += [p for p in _trained(loss) if id(p) not in of_model]
        trained = [*during, *after]
        if [*map(id, trained)] != [*map(id, self._trained)]:
            self._trained = trained
            self._rebuild(during, after)
        self._launched = 0
        for bucket in self._buckets:
            bucket.waiting = set(range(len(bucket.parameters)))

    def _rebuild(self, trained: list[nn.Parameter], rest: list[nn.Parameter]) -> None:
        for hook in self._hooks:
            hook.remove()
        during = _buckets(reversed(trained))
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._made, bucket, index))
            for bucket in during
            for index, parameter in enumerate(bucket.parameters)
        ]
        self._buckets = [*during, *_buckets(rest)]

    def _made(self, bucket: _Bucket, index: int, _: Tensor) -> None:
        if not self._listening:
            return
        bucket.waiting.discard(index)
        bucket.again = bucket.work is not None
        ready = self._launched
        while ready < len(self._buckets) and not self._buckets[ready].waiting:
            ready += 1
        self._launch_to(ready)

    def _launch_to(self, end: int) -> None:
        for bucket in self._buckets[self._launched : end]:
            bucket.launch()
        self._launched = max(self._launched, end)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _buckets(parameters: Iterable[nn.Parameter]) -> list[_Bucket]:
    """Cut parameters into runs of one type and at most `BUCKET` elements, or of one parameter."""
    buckets: list[_Bucket] = []
    size = 0
    for parameter in parameters:
        last = buckets[-1].parameters[-1] if buckets else parameter
        alike = (last.dtype, last.device) == (parameter.dtype, parameter.device)
        if not buckets or not alike or size + parameter.numel() > BUCKET:
            buckets.append(_Bucket([]))
            size = 0
        buckets[-1].parameters.append(parameter)
        size += parameter.numel()
    return buckets


def _dense(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's gradient, zeros where it has none."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter)
    if gradient.is_sparse:
        raise ValueError(
            f"gradients over several ranks must be dense, got a sparse one of "
            f"{tuple(gradient.shape)}: build the embedding with sparse=False"
        )
    return gradient


def _put(parameter: nn.Parameter, average: Tensor) -> None:
    gradient = parameter.grad
    if gradient is None or gradient.is_contiguous():
        parameter.grad = average
    else:  # keep a layout such as channels_last
        gradient.copy_(average)
