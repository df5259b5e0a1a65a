"""Every scalar that anybody publishes, kept on the device until a log point."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import attrs
import torch
from torch import Tensor

from diptych.engine.distributed import sum_over_ranks, world_size

Scalar = Tensor | float | int


@attrs.frozen
class Record:
    """What one log point gives to every sink.

    Attributes:
        step: the iteration.
        values: tag to value.
    """

    step: int = 0
    values: dict[str, float] = attrs.field(factory=dict)


@attrs.define
class _Mean:
    """A running mean on the host."""

    total: float = 0.0
    count: int = 0

    def add(self, total: float, count: int) -> None:
        self.total += total
        self.count += count

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else math.nan


class MetricsCollector:
    """Gathers scalars and gives their means: for each log point, and for each epoch.

    Tensors stay where they are, as references, until `log` or `end_epoch` fetches all of them with
    one transfer. Over several ranks the means are those of all ranks.

    Args:
        on_record: called when `record` is new.
    """

    def __init__(self, on_record: Callable[[], object] | None = None) -> None:
        self.record = Record()
        self._on_record = on_record
        self._tensors: defaultdict[str, list[Tensor]] = defaultdict(list)
        self._numbers: defaultdict[str, list[float]] = defaultdict(list)
        self._epoch: defaultdict[str, _Mean] = defaultdict(_Mean)
        self._gauges: dict[str, Callable[[], Scalar]] = {}
        self._history: defaultdict[str, list[float]] = defaultdict(list)

    def update(self, scalars: Mapping[str, Scalar] | None = None, /, **named: Scalar) -> None:
        """Publish values of this iteration.

        Args:
            scalars: tag to a number or a tensor of one element; kept by reference, so a tensor
                must not be changed in place afterwards (parameters are copied).
            named: the same, for tags that are Python names.

        Raises:
            TypeError: if a value is neither a number nor a tensor.
            ValueError: if a tensor has more than one element.
        """
        tensors = self._tensors
        for values in (scalars, named):
            if values:
                for tag, value in values.items():
                    if type(value) is Tensor and _is_plain(value):
                        tensors[tag].append(value)
                    else:
                        self._keep(tag, _kept(tag, value))

    def gauge(self, tag: str, function: Callable[[], Scalar]) -> None:
        """Publish what `function()` returns at each log point: a rate, memory in use."""
        self._gauges[tag] = function

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Give final values (an evaluation's) to the sinks, as a record of their own."""
        for tag, value in values.items():
            self._history[tag].append(float(value))
        self._emit(Record(step, {tag: float(value) for tag, value in values.items()}))

    def log(self, step: int) -> None:
        """Give the means since the last log point, and the gauges, to the sinks.

        Nothing happens where nothing was published since.
        """
        if self._tensors or self._numbers:
            gauges = {tag: _kept(tag, function()) for tag, function in self._gauges.items()}
            means, read = self._drain(gauges)
            self._emit(Record(step, {**{tag: mean.value for tag, mean in means.items()}, **read}))

    def end_epoch(self) -> dict[str, float]:
        """Return the mean of every tag over the epoch, and add it to the tag's history."""
        self._drain({})
        means = {tag: mean.value for tag, mean in self._epoch.items()}
        for tag, value in means.items():
            self._history[tag].append(value)
        self._epoch.clear()
        return means

    def get_history(self, name: str) -> list[float]:
        """Return the values of a tag: one for each epoch, or for each report.

        Raises:
            KeyError: if nothing was published under the name; the message names the tags that are
                there.
        """
        if name not in self._history:
            raise KeyError(
                f"no history of {name!r}; there is one of "
                f"{', '.join(sorted(self._history)) or 'nothing'}"
            )
        return list(self._history[name])

    def reset(self) -> None:
        """Forget every value that was published; the gauges stay."""
        for values in (self._tensors, self._numbers, self._epoch, self._history):
            values.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next log point and the end of the epoch need."""
        window = {
            tag: {
                "tensors": _stacked(self._tensors[tag]) if tag in self._tensors else None,
                "numbers": list(self._numbers.get(tag, ())),
            }
            for tag in self._published()
        }
        return {
            "window": window,
            "epoch": {tag: [mean.total, mean.count] for tag, mean in self._epoch.items()},
            "history": {tag: list(values) for tag, values in self._history.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` returned."""
        self.reset()
        for tag, kept in state_dict["window"].items():
            if kept["tensors"] is not None:
                self._tensors[tag].extend(kept["tensors"].unbind())
            if kept["numbers"]:
                self._numbers[tag].extend(kept["numbers"])
        self._epoch.update({tag: _Mean(*mean) for tag, mean in state_dict["epoch"].items()})
        self._history.update({tag: list(values) for tag, values in state_dict["history"].items()})

    def _published(self) -> list[str]:
        """Return the tags of the window, those with tensors first."""
        return list(dict.fromkeys((*self._tensors, *self._numbers)))

    def _keep(self, tag: str, value: Scalar) -> None:
        if isinstance(value, Tensor):
            self._tensors[tag].append(value)
        else:
            self._numbers[tag].append(value)

    def _emit(self, record: Record) -> None:
        self.record = record
        if self._on_record is not None:
            self._on_record()

    def _drain(self, gauges: Mapping[str, Scalar]) -> tuple[dict[str, _Mean], dict[str, float]]:
        """Empty the window into the epoch's means; return the window's, and the gauges."""
        tags = self._published()
        on_device = {tag: [value] for tag, value in gauges.items() if isinstance(value, Tensor)}
        groups = [*self._tensors.values(), *on_device.values()]
        numbers = [float(sum(self._numbers.get(tag, ()))) for tag in tags]
        values = _fetch(groups, numbers, len(on_device))
        means: dict[str, _Mean] = {}
        for tag, total in zip(tags, values[: len(tags)], strict=True):
            count = len(self._tensors.get(tag, ())) + len(self._numbers.get(tag, ()))
            means[tag] = _Mean(total, count * world_size())
            self._epoch[tag].add(total, count * world_size())
        self._tensors.clear()
        self._numbers.clear()
        read = dict(zip(on_device, values[len(tags) :], strict=True))
        return means, {
            tag: read[tag] if tag in read else float(value) for tag, value in gauges.items()
        }


def _kept(tag: str, value: Any) -> Scalar:
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


def _is_plain(value: Tensor) -> bool:
    return not value.ndim and not value.requires_grad and value.is_floating_point()


def _fetch(groups: list[list[Tensor]], numbers: list[float], gauges: int) -> list[float]:
    """Bring sums to the host with one transfer, added up over ranks.

    Args:
        groups: what to add up where it is, a list for each of the first `numbers`, and then one
            for each gauge.
        numbers: what each sum begins with.
        gauges: how many of the last groups are gauges: added to nothing, each rank's own.

    Returns:
        As many sums as numbers, then the gauges.
    """
    if not groups and world_size() == 1:
        return numbers
    read, count = _sums(groups), len(groups) - gauges
    if world_size() > 1:
        sums = read.new_tensor(numbers)
        sums[:count] += read[:count]
        return [*torch.cat([sum_over_ranks(sums), read[count:]]).tolist()]
    values = read.tolist()
    begun = [number + value for number, value in zip(numbers, values[:count], strict=False)]
    return [*begun, *numbers[count:], *values[count:]]


def _sums(groups: list[list[Tensor]]) -> Tensor:
    """Add up each group; float64, so that the grouping into windows hardly shows."""
    if not groups:
        return torch.zeros(0, dtype=torch.float64)
    sizes = [len(group) for group in groups]
    stacked = _stacked([tensor for group in groups for tensor in group])
    if len(set(sizes)) == 1:
        return stacked.view(len(sizes), -1).sum(1, dtype=torch.float64)
    return torch.stack([part.sum(dtype=torch.float64) for part in stacked.split(sizes)])


def _stacked(tensors: list[Tensor]) -> Tensor:
    try:
        return torch.stack(tensors)  # all are of floating point: the widest type holds each
    except RuntimeError:  # from several devices: a restored window and a new value, for one
        device = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
        return torch.stack([tensor.to(device) for tensor in tensors])
