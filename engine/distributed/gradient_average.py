"""The average of gradients over ranks, overlapped with the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.utils.hooks import RemovableHandle

from diptych.engine.distributed.agreement import wait_for_all_ranks
from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.distributed.comparison import check_equal_over_ranks
from diptych.engine.distributed.dtensor import has_shards, is_sharded
from diptych.engine.distributed.hang_report import waits_at
from diptych.engine.modules import known_parameters, named_parameters
from diptych.engine.name_patterns import listed

BUCKET = 2**23
"""Elements of a bucket: enough to use the bandwidth, few enough to start early."""


@attrs.define(eq=False)
class _Bucket:
    """Parameters of one type whose gradients are averaged with one all-reduce.

    Attributes:
        parameters: the parameters.
        missing: indices of the parameters whose gradient the backward pass has not made yet.
        packed: the gradients, flattened and concatenated, then for each a 1 if this rank has it.
        work: the running all-reduce.
        stale: whether a gradient has changed since it was packed.
    """

    parameters: list[nn.Parameter]
    missing: set[int] = attrs.field(factory=set)
    packed: Tensor | None = None
    work: Any = None
    stale: bool = False

    def launch(self) -> None:
        """Start the all-reduce of this rank's gradients; a missing gradient counts as 0."""
        held = [(parameter, parameter.grad) for parameter in self.parameters]
        # `_dense` is called for few parameters: calls for all of them would be noticed.
        gradients = [_dense(p) if g is None or g.is_sparse else g for p, g in held]
        packed = _flatten_dense_tensors([*gradients, self._present(gradients[0])])
        # Divided before the sum, so that half precision does not overflow.
        packed[: -len(gradients)].div_(world_size())
        self.packed, self.stale = packed, False
        self.work = dist.all_reduce(packed, async_op=True)

    def _present(self, like: Tensor) -> Tensor:
        """Return for each parameter 1 if this rank has its gradient, else 0."""
        present = [parameter.grad is not None for parameter in self.parameters]
        if all(present):
            return like.new_ones(len(present))
        return torch.stack([like.new_full((), float(one)) for one in present])

    def receive(self) -> None:
        """Write the averages into the gradients; skip a parameter if no rank has its gradient."""
        self.work.wait()
        if self.stale:
            self.launch()
            self.work.wait()
        if self.packed is None:
            raise RuntimeError("a bucket must be launched before it is received")
        count = len(self.parameters)
        present = [1.0] * count
        if [p for p in self.parameters if p.grad is None]:
            present = self.packed[-count:].tolist()
        parts = _unflatten_dense_tensors(self.packed[:-count], self.parameters)
        for parameter, average, ranks in zip(self.parameters, parts, present, strict=True):
            gradient = parameter.grad
            if not ranks:
                continue
            if gradient is None or gradient.is_contiguous():
                parameter.grad = average
            else:  # keep a layout such as channels_last
                gradient.copy_(average)
        self.packed = self.work = None


class GradientAverage:
    """Averages the gradients of modules over all ranks.

    The all-reduce of a bucket starts as soon as the last backward pass of the update has made all
    of its gradients, in the same order on all ranks. Unlike torch's DistributedDataParallel it
    needs no wrapper: parameters may be frozen and unfrozen between two updates, and a parameter
    that the loss does not reach, on some ranks or on all, delays nothing. If no rank has a
    gradient, the parameter gets none, as in a run of one process. On one rank, nothing happens. The
    backward pass itself averages the gradients of sharded parameters.

    Ranks that freeze or unfreeze parameters agree on it before the next backward pass.

    Cost: the memory of the gradients once more. A rank that lacks the gradient of a trainable
    parameter waits for the device once an update.

    Args:
        modules: returns the model, whose gradients are sent during the backward pass, and the loss,
            whose gradients are sent after it.
    """

    def __init__(self, modules: Callable[[], tuple[nn.Module, nn.Module]]) -> None:
        self._modules = modules
        self._buckets: list[_Bucket] = []
        self._launched = 0
        self._hooks: list[RemovableHandle] = []
        self._trained: list[nn.Parameter] = []
        self._of_model, self._of_loss = known_parameters(), known_parameters()
        self._listening = False

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Send gradients during the update's last backward pass, which runs in this context.

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
        """Wait for the averages and replace the gradients by them."""
        for bucket in self._buckets[: self._launched]:
            bucket.receive()
        self._launched = 0

    def _prepare(self) -> None:
        model, loss = self._modules()
        during, after = _trained(self._of_model.of(model)), list[nn.Parameter]()
        if has_shards(model):
            # Its backward pass has collectives of its own: send the whole gradients after them.
            during, after = after, [p for p in during if not is_sharded(p)]
        of_model = {id(parameter) for parameter in (*during, *after)}
        after += [p for p in _trained(self._of_loss.of(loss)) if id(p) not in of_model]
        trained = [*during, *after]
        if [*map(id, trained)] != [*map(id, self._trained)]:
            self._agree(trained)
            self._trained = trained
            self._rebuild(during, after)
        self._launched = 0
        for bucket in self._buckets:
            bucket.missing = set(range(len(bucket.parameters)))

    def _agree(self, trained: list[nn.Parameter]) -> None:
        """Check that all ranks train the same parameters from here on."""
        names = {id(p): name for name, p in named_parameters(*self._modules()).items()}
        before, now = set(map(id, self._trained)), set(map(id, trained))
        parts = {"frozen": before - now, "unfrozen": now - before if before else set()}
        about = "; ".join(
            f"{word} on rank {rank()}: {listed(names[key] for key in names if key in changed)}"
            for word, changed in parts.items()
            if changed & set(names)
        )
        wait_for_all_ranks("agreeing on the trainable parameters", about)
        check_equal_over_ranks(
            "the trainable parameters",
            {name: key in now for key, name in names.items()},
            "Freeze and unfreeze parameters on all ranks, before the same iteration",
        )

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
        bucket.missing.discard(index)
        bucket.stale = bucket.work is not None
        if bucket.missing:
            return
        ready = self._launched
        while ready < len(self._buckets) and not self._buckets[ready].missing:
            ready += 1
        self._launch_to(ready)

    def _launch_to(self, end: int) -> None:
        for bucket in self._buckets[self._launched : end]:
            bucket.launch()
        self._launched = max(self._launched, end)


def _trained(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]


def _buckets(parameters: Iterable[nn.Parameter]) -> list[_Bucket]:
    """Cut parameters into buckets of one type and at most `BUCKET` elements, or one parameter."""
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
    """Return a parameter's gradient; zeros if it has none."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter)
    if gradient.is_sparse:
        raise ValueError(
            f"gradients over several ranks must be dense, got a sparse one of "
            f"{tuple(gradient.shape)}. Build the embedding with sparse=False."
        )
    return gradient
