"""Brings batches to the accelerator beside the update before, on a stream of their own."""

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
    """Return what brings a batch to `device`.

    Args:
        device: where the tensors go.
        prefetch: whether copies overlap with what the device computes, where it can.
    """
    if prefetch and device.type in DEVICES_WITH_STREAMS:
        return Prefetcher(device)
    return partial(to_device, device=device)


class Prefetcher:
    """Copies a batch to the device while the device computes the update before it.

    The host runs ahead of the device: it has queued an update long before the device is done with
    it, and asks the loader for the next batch at once. Copied on the device's own stream, that
    batch would wait for its turn behind the update. Here it is copied on a second stream.

    Its memory is taken from the own stream's pool when the update before begins, as large as that
    update's batch: from then on the memory is free on the device too, in the order of its stream,
    so that no tensor needs `record_stream` and the host never waits, and however far ahead the host
    is, there is one batch more in memory and no second. What has another shape than in the batch
    before (the last batch of an epoch, texts as long as their longest) is copied on the own stream.

    The loader is asked for a batch when the loop needs it, never before: where it stands is where
    the run stands.

    Args:
        device: where the tensors go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: Any = torch.get_device_module(device)  # the CPU has some that do nothing
        self._side = self._streams.Stream(device)
        self._taken = self._streams.Event()
        self._memory: dict[Kind, list[Tensor]] = {}

    def __call__(self, batch: Any) -> Any:
        """Return `batch` with every tensor on the device."""
        memory, kinds = self._memory, list[Kind]()
        own = self._streams.current_stream(self._device)

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
                own.wait_stream(self._side)
        self._memory = self._like(kinds)
        if kinds:
            self._taken.record(own)
        return moved

    def _copied(self, leaf: Tensor, memory: Tensor) -> Tensor:
        self._side.wait_event(self._taken)
        with torch.no_grad(), self._streams.stream(self._side):
            return memory.copy_(leaf, non_blocking=True)

    def _like(self, kinds: list[Kind]) -> dict[Kind, list[Tensor]]:
        """Take memory on the device for another batch of tensors of these kinds."""
        memory: defaultdict[Kind, list[Tensor]] = defaultdict(list)
        for shape, strides, dtype in kinds:
            memory[shape, strides, dtype].append(
                torch.empty_strided(shape, strides, dtype=dtype, device=self._device)
            )
        return memory


def kind_of(leaf: Tensor) -> Kind | None:
    """Return the kind of a tensor in the host's memory; None where a plain copy is the right one.

    That is for tensors that are on a device already, have holes or a gradient, or are not plain.
    """
    plain = leaf.layout is torch.strided and type(leaf) is Tensor and not leaf.requires_grad
    if leaf.device.type != "cpu" or not plain or not _is_dense(leaf):
        return None
    return leaf.shape, leaf.stride(), leaf.dtype


def _is_dense(leaf: Tensor) -> bool:
    return leaf.is_contiguous() or (
        leaf.ndim == 4 and leaf.is_contiguous(memory_format=torch.channels_last)
    )
