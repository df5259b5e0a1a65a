"""A buffer of the scalars that were published since the last log point."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from diptych.engine.distributed.collectives import (
    all_reduce_sum,
    exchange_device,
    world_size,
)
from diptych.engine.distributed.comparison import check_equal_over_ranks
from diptych.engine.distributed.hang_report import waits_at

Scalar = Tensor | float | int
FLOAT = torch.float32  # nearly all scalars of a step
Tables = dict[tuple[str, ...], Tensor]
"""The rows of each kind, [rows, tags]."""
Numbers = dict[str, list[float]]
WEIGHT = " (weight)"
"""The end of the tag under which the weights of a tag's values are added."""
BufferMark = tuple[int, int]
"""The number of rows and of numbers."""


class ScalarBuffer:
    """Collects scalars, and fetches all of them with one transfer.

    Scalars that are published together are a row, a copied row is one vector. Rows are appended to
    a list: a step costs little, and one operation combines all rows with the same tags later.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[tuple[str, ...], list[Tensor]]] = []
        self._numbers: list[tuple[str, float]] = []

    def __bool__(self) -> bool:
        return bool(self._rows or self._numbers)

    def add(self, scalars: Mapping[str, Scalar], *, copy: bool = True) -> None:
        """Add the values of one iteration.

        Args:
            scalars: tag to value.
            copy: whether to copy tensors, which may share the memory of a parameter or a buffer,
                or be overwritten before they are fetched. False: nothing else changes them.

        Raises:
            TypeError: if a value is neither a number nor a tensor.
            ValueError: if a tensor has more than one element.
        """
        row: list[Any] = [*scalars.values()]
        if _are_plain(row):
            if row:
                self._rows.append((tuple(scalars), _copied(row) if copy else row))
            return
        for tag, value in scalars.items():
            kept = as_scalar(tag, value)
            if isinstance(kept, Tensor):
                own = kept.clone() if copy else kept
                self._rows.append(((tag,), [own]))
            else:
                self._numbers.append((tag, kept))

    def add_row(self, tags: tuple[str, ...], row: Tensor) -> None:
        """Add the values of some tags as a vector of their own, which is not copied."""
        self._rows.append((tags, [row]))

    @waits_at("a log point")
    def drain(
        self, gauges: Mapping[str, Scalar]
    ) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
        """Fetch all values and empty the buffer.

        Args:
            gauges: values that are not summed: each rank keeps its own.

        Returns:
            For each tag the sum and the number of its values, or of their weights, over all ranks;
            a tag whose weights sum to 0 is left out. And the gauges.

        Raises:
            RuntimeError: on all ranks, if they have published different tags.
        """
        tables, numbers = self._by_tags()
        tags = [*map("+".join, tables), *numbers]
        way_out = "Publish the same values on every rank, in the same order"
        check_equal_over_ranks("the published values", {"tags": ", ".join(tags)}, way_out)
        on_device = {tag: value for tag, value in gauges.items() if isinstance(value, Tensor)}
        totals = [float(sum(values)) for values in numbers.values()]
        values = _fetched([*tables.values()], [*on_device.values()], totals)
        read = dict(zip(on_device, values[len(values) - len(on_device) :], strict=True))
        sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        ranks = world_size()
        for (tag, count), value in zip(_counts(tables, numbers), values, strict=False):
            sums[tag][0] += value
            sums[tag][1] += count * ranks
        for tag in [tag for tag in sums if tag.endswith(WEIGHT)]:
            sums[tag.removesuffix(WEIGHT)][1] = sums.pop(tag)[0]
        self.clear()
        return (
            {tag: (total, count) for tag, (total, count) in sums.items() if count},
            {tag: read[tag] if tag in read else float(value) for tag, value in gauges.items()},
        )

    def mark(self) -> BufferMark:
        """Return the number of rows and numbers so far, for `drop_since`."""
        return len(self._rows), len(self._numbers)

    def drop_since(self, mark: BufferMark) -> None:
        """Drop the values that were added after a mark."""
        del self._rows[mark[0] :], self._numbers[mark[1] :]

    def clear(self) -> None:
        """Drop all values."""
        self._rows.clear()
        self._numbers.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return all values; those of one kind of row as a tensor [rows * tags]."""
        tables, numbers = self._by_tags()
        # Copied, since a row may be a view of more.
        rows = [{"tags": list(tags), "values": t.flatten().clone()} for tags, t in tables.items()]
        return {"rows": rows, "numbers": numbers}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self.clear()
        self._rows += [
            (tuple(row["tags"]), list(row["values"].unbind())) for row in state_dict["rows"]
        ]
        self._numbers += [(tag, v) for tag, held in state_dict["numbers"].items() for v in held]

    def _by_tags(self) -> tuple[Tables, Numbers]:
        rows: dict[tuple[str, ...], list[Tensor]] = {}
        for tags, row in self._rows:
            rows.setdefault(tags, []).extend(row)
        numbers: Numbers = {}
        for tag, number in self._numbers:
            numbers.setdefault(tag, []).append(number)
        tables = {tags: _flat(row).view(-1, len(tags)) for tags, row in rows.items()}
        return tables, numbers


def _counts(tables: Tables, numbers: Numbers) -> list[tuple[str, int]]:
    """Return the tag and the number of values of each sum, in the order of `_fetched`."""
    counts = [(tag, len(table)) for tags, table in tables.items() for tag in tags]
    return [*counts, *((tag, len(held)) for tag, held in numbers.items())]


def _fetched(tables: list[Tensor], gauges: list[Tensor], totals: list[float]) -> list[float]:
    """Return the sums of the tables' rows and `totals`, over all ranks, and the gauges."""
    parts, own = [table.sum(0, dtype=torch.float64) for table in tables], totals
    if world_size() > 1:
        parts.append(torch.tensor(totals, dtype=torch.float64, device=exchange_device()))
        parts, own = [all_reduce_sum(_joined(parts))], []
    if gauges:
        parts.append(_stacked(gauges).double())
    values: list[float] = _joined(parts).tolist() if parts else []
    sums = len(values) - len(gauges)
    return [*values[:sums], *own, *values[sums:]]


def mean_of_buffers(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the state of a buffer with the means of several ranks' buffers."""
    rows = [
        {"tags": alike[0]["tags"], "values": torch.stack([row["values"] for row in alike]).mean(0)}
        for alike in zip(*(state["rows"] for state in states), strict=True)
    ]
    numbers = {
        tag: [
            statistics.fmean(alike)
            for alike in zip(*(state["numbers"][tag] for state in states), strict=True)
        ]
        for tag in states[0]["numbers"]
    }
    return {"rows": rows, "numbers": numbers}


def _are_plain(values: list[Any]) -> bool:
    """Say whether all values are scalars of float32 without a graph, as those of a step are."""
    try:
        for value in values:
            if value.ndim or value.requires_grad or value.dtype is not FLOAT:
                return False
    except AttributeError:  # a number
        return False
    return True


def _copied(row: list[Tensor]) -> list[Tensor]:
    """Return a copy of scalars without graphs; several of them become one vector."""
    return [row[0].clone() if len(row) == 1 else torch.stack(row)]


def as_scalar(tag: str, value: Any) -> Scalar:
    """Return a published value as a floating-point number, without graph and dimensions.

    Raises:
        TypeError: if the value is neither a number nor a tensor.
        ValueError: if the value is a tensor of more than one element.
    """
    if isinstance(value, Tensor):
        return _detached(tag, value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"{tag} must be a number or a tensor of one element, got {value!r}")


def _detached(tag: str, value: Tensor) -> Tensor:
    if value.numel() != 1:
        raise ValueError(
            f"{tag} must be a number or a tensor of one element, got shape {tuple(value.shape)}"
        )
    if value.requires_grad:
        value = value.detach().clone() if value.is_leaf else value.detach()
    if not value.is_floating_point():
        value = value.double()
    return value if value.ndim == 0 else value.reshape(())


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].device) for part in parts])


def _flat(tensors: list[Tensor]) -> Tensor:
    """Return the elements of scalars, and of vectors of scalars, as one vector."""
    if len(tensors) == 1:
        return tensors[0].view(-1)
    if len({tensor.shape for tensor in tensors}) == 1:
        return _stacked(tensors).view(-1)
    return _joined([tensor.view(-1) for tensor in tensors])


def _stacked(tensors: list[Tensor]) -> Tensor:
    try:
        return torch.stack(tensors)  # to the widest floating-point type
    except RuntimeError:  # several devices, such as a restored buffer and a new value
        device = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
        return torch.stack([tensor.to(device) for tensor in tensors])
