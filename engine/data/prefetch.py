"""Copies of batches to the accelerator that overlap with the update before, on a second stream."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diptych.engine.containers import map_leaves
from diptych.engine.data.batches import to_device

Kind = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Shape, strides and type of a tensor."""

DEVICES_WITH_STREAMS = {"cuda"}


def mover(device: torch.device, *, prefetch: bool) -> Callable[[Any], Any]:
    """Return a function that moves a batch to `device`.

    With `prefetch`, copies overlap with computation if the device has streams.
    """
    if prefetch and device.type in DEVICES_WITH_STREAMS:
        return Prefetcher(device)
    return partial(to_device, device=device)


class Prefetcher:
    """Copies a batch to the device while the device computes the update before it.

    The host queues updates faster than the device runs them, and asks the loader for the next batch
    while the device is still busy. A copy on the device's main stream would wait behind that
    update; this class copies on a second stream.

    The memory for the next batch is taken from the main stream's pool at the start of each update,
    as large as that update's batch. It is then free on the device too, in stream order: no tensor
    needs `record_stream`, the host never waits, and at most one extra batch is in memory however
    far ahead the host is. A tensor whose shape differs from the batch before (the last batch of an
    epoch, texts of varying length) is copied on the main stream.

    The loader is asked for a batch when the loop needs it, never earlier, so the loader's position
    is that of the run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: Any = torch.get_device_module(device)  # the CPU's do nothing
        self._side = self._streams.Stream(device)
        self._allocated = self._streams.Event()
        self._memory: dict[Kind, list[Tensor]] = {}

    def __call__(self, batch: Any) -> Any:
        """Return `batch` with every tensor on the device."""
        memory, kinds = self._memory, list[Kind]()
        main = self._streams.current_stream(self._device)

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            kind = kind_of(leaf)
            if kind is not None:
                kinds.append(kind)
            free = memory.get(kind) if kind is not None else None
            if not free:
                return leaf.to(self._device, non_blocking=True)
            return self._copied(leaf, free.pop())

        try:
            moved = map_leaves(batch, move)
        finally:
            if memory:
                main.wait_stream(self._side)
        self._memory = self._like(kinds)
        if kinds:
            self._allocated.record(main)
        return moved

    def _copied(self, leaf: Tensor, memory: Tensor) -> Tensor:
        self._side.wait_event(self._allocated)
        with torch.no_grad(), self._streams.stream(self._side):
            return memory.copy_(leaf, non_blocking=True)

    def _like(self, kinds: list[Kind]) -> dict[Kind, list[Tensor]]:
        """Allocate memory on the device for another batch of tensors of these kinds."""
        memory: defaultdict[Kind, list[Tensor]] = defaultdict(list)
        for shape, strides, dtype in kinds:
            memory[shape, strides, dtype].append(
                torch.empty_strided(shape, strides, dtype=dtype, device=self._device)
            )
        return memory


def kind_of(leaf: Tensor) -> Kind | None:
    """Return the kind of a tensor in host memory; None if it must be copied the plain way.

    These are tensors on a device, with holes, with a gradient, or of a subclass.
    """
    plain = leaf.layout is torch.strided and type(leaf) is Tensor and not leaf.requires_grad
    if leaf.device.type != "cpu" or not plain or not _is_dense(leaf):
        return None
    return leaf.shape, leaf.stride(), leaf.dtype


def _is_dense(leaf: Tensor) -> bool:
    return leaf.is_contiguous() or (
        leaf.ndim == 4 and leaf.is_contiguous(memory_format=torch.channels_last)
    )
