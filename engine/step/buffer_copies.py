"""Copies of the buffers that a step may change, refreshed before each step."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from diptych.engine.modules import parts_of

LARGE = 2**16
"""Elements of a buffer above which it is copied only if it has changed.

torch raises a tensor's version when it is changed in place, except by batch norm, which changes
vectors of one number a channel. A larger buffer is a queue, a table or a mask.
"""

Group = tuple[list[Tensor], list[Tensor]]
"""Copies and buffers of one type on one device."""


@attrs.define(eq=False)
class _Place:
    """A buffer of a module: where it is, what it was, and its copy.

    Attributes:
        held: the module's own dictionary of buffers.
        name: the key in it.
        tensor: the buffer at the last `take`, or at its last copy.
        copy: its values then; None if it was not copied.
        address: that of the tensor's memory, if the buffer is small.
        version: that of the tensor at its last copy, if the buffer is large.
        changes: whether a large buffer has been seen to change; a mask does not.
    """

    held: dict[str, Tensor | None]
    name: str
    tensor: Tensor | None = None
    copy: Tensor | None = None
    address: int = 0
    version: int = -1
    changes: bool = False

    def fits(self, tensor: Tensor) -> bool:
        """Return whether the copy can take the values of a tensor."""
        copy = self.copy
        return (
            copy is not None
            and copy.shape == tensor.shape
            and copy.dtype is tensor.dtype
            and copy.device == tensor.device
        )


class BufferCopies:
    """The buffers of some modules, as they were before a step.

    Small buffers are copied before each step, all of one type at once. A large one is copied if it
    has changed since its last copy; if the first step leaves it unchanged, its copy is freed. A
    change of a large buffer through `.data` is not seen.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        places = [
            _Place(part._buffers, name)  # noqa: SLF001 - the module's own dictionary
            for part in parts_of(*modules)
            for name, buffer in part._buffers.items()  # noqa: SLF001
            if buffer is None or not is_lazy(buffer)
        ]
        self._small = [place for place in places if not _is_large(place)]
        self._large = [place for place in places if _is_large(place)]
        self._read = [(place.held.get, place.name) for place in self._small]
        self._now: list[Tensor | None] = [None] * len(self._small)
        self._groups: list[Group] = []

    def take(self) -> None:
        """Copy the values of now."""
        if self._read:
            now = [get(name) for get, name in self._read]
            if not all(map(operator.is_, now, self._now)):
                self._group(now)
            for copies, tensors in self._groups:
                torch._foreach_copy_(copies, tensors)
        for place in self._large:
            _take_if_changed(place)

    def _group(self, now: list[Tensor | None]) -> None:
        """Assign a copy to each small buffer; they are copied together by type and device."""
        groups: defaultdict[Any, Group] = defaultdict(lambda: ([], []))
        for place, tensor in zip(self._small, now, strict=True):
            place.tensor = tensor
            if tensor is None:
                continue
            if not place.fits(tensor):
                place.copy = torch.empty_like(tensor)
            assert place.copy is not None
            place.address = tensor.data_ptr()
            copies, tensors = groups[tensor.dtype, tensor.device]
            copies.append(place.copy)
            tensors.append(tensor.detach())
        self._groups, self._now = list(groups.values()), now

    @torch.no_grad()
    def restore(self) -> list[str]:
        """Restore the buffers, also those that a module has replaced.

        Returns:
            The names of the buffers that have changed and were not copied.
        """
        lost = []
        for place in (*self._small, *self._large):
            tensor = place.tensor
            place.held[place.name] = tensor
            if tensor is None:
                continue
            if place.copy is None or (place.address and place.address != tensor.data_ptr()):
                changed = place.copy is not None or version_of(tensor) != place.version
                lost += [place.name] if changed else []
            elif not torch.equal(tensor, place.copy):
                tensor.copy_(place.copy)
            place.version = version_of(tensor)
        return lost


def version_of(tensor: Tensor) -> int:
    """Return the number of changes in place that torch has seen of a tensor."""
    return int(tensor._version)  # noqa: SLF001 - there is no public name


def _is_large(place: _Place) -> bool:
    tensor = place.held[place.name]
    return tensor is not None and (tensor.numel() > LARGE or tensor.layout is not torch.strided)


@torch.no_grad()
def _take_if_changed(place: _Place) -> None:
    tensor = place.held.get(place.name)
    if tensor is place.tensor and (tensor is None or version_of(tensor) == place.version):
        if not place.changes:
            place.copy = None
        return
    place.changes, place.tensor = place.tensor is not None, tensor
    if tensor is None:
        return
    if tensor.layout is torch.strided and place.fits(tensor):
        assert place.copy is not None
        place.copy.copy_(tensor)
    else:
        place.copy = tensor.clone()
    place.version = version_of(tensor)
