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
        self._window: defaultdict[str, list[Scalar]] = defaultdict(list)
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
        window = self._window
        for values in (scalars, named):
            if values:
                for tag, value in values.items():
                    window[tag].append(value if type(value) is float else _kept(tag, value))

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
        if self._window:
            gauges = {tag: _kept(tag, function()) for tag, function in self._gauges.items()}
            means, read = self._drain(gauges)
            self._emit(Record(step, {**{tag: mean.value for tag, mean in means.items()}, **read}))

    def end_epoch(self) -> dict[str, float]:
        """Return the mean of every tag over the epoch, and add it to the tag's history."""
        self._drain()
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

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next log point and the end of the epoch need."""
        return {
            "window": {tag: _packed(values) for tag, values in self._window.items()},
            "epoch": {tag: [mean.total, mean.count] for tag, mean in self._epoch.items()},
            "history": {tag: list(values) for tag, values in self._history.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` returned."""
        for values in (self._window, self._epoch, self._history):
            values.clear()
        self._window.update(
            {tag: _unpacked(values) for tag, values in state_dict["window"].items()}
        )
        self._epoch.update({tag: _Mean(*mean) for tag, mean in state_dict["epoch"].items()})
        self._history.update({tag: list(values) for tag, values in state_dict["history"].items()})

    def _emit(self, record: Record) -> None:
        self.record = record
        if self._on_record is not None:
            self._on_record()

    def _drain(
        self, gauges: Mapping[str, Scalar] | None = None
    ) -> tuple[dict[str, _Mean], dict[str, float]]:
        """Empty the window into the epoch's means; return the window's, and the gauges."""
        sums = {tag: _sum(values) for tag, values in self._window.items()}
        totals, read = _fetch(sums, gauges or {})
        means = {tag: _Mean(totals[tag], len(v) * world_size()) for tag, v in self._window.items()}
        for tag, mean in means.items():
            self._epoch[tag].add(mean.total, mean.count)
        self._window.clear()
        return means, read


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
    return value if value.ndim == 0 else value.reshape(())


def _sum(values: list[Scalar]) -> Scalar:
    """Add up one tag's values where they are; float64, so that the grouping hardly shows."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    numbers = float(sum(value for value in values if not isinstance(value, Tensor)))
    if not tensors:
        return numbers
    return _stacked(tensors).double().sum() + numbers


def _stacked(tensors: list[Tensor]) -> Tensor:
    if any(t.dtype != tensors[0].dtype or t.device != tensors[0].device for t in tensors):
        tensors = [t.to(tensors[0].device, torch.float64) for t in tensors]
    return torch.stack(tensors)


def _fetch(
    sums: Mapping[str, Scalar], gauges: Mapping[str, Scalar]
) -> tuple[dict[str, float], dict[str, float]]:
    """Bring scalars to the host with one transfer, the sums added up over ranks."""
    values = [*sums.values(), *gauges.values()]
    devices = [value.device for value in values if isinstance(value, Tensor)]
    if values and (devices or world_size() > 1):
        device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
        packed = torch.stack([_on(device, value) for value in values])
        packed = torch.cat([sum_over_ranks(packed[: len(sums)]), packed[len(sums) :]])
        numbers: list[float] = packed.tolist()
    else:
        numbers = [float(value) for value in values]
    totals = dict(zip(sums, numbers[: len(sums)], strict=True))
    return totals, dict(zip(gauges, numbers[len(sums) :], strict=True))


def _on(device: torch.device, value: Scalar) -> Tensor:
    return (
        torch.as_tensor(value, dtype=torch.float64)
        .detach()
        .to(device, non_blocking=True)
        .reshape(())
    )


def _packed(values: list[Scalar]) -> dict[str, Any]:
    tensors = [value for value in values if isinstance(value, Tensor)]
    numbers = [float(value) for value in values if not isinstance(value, Tensor)]
    return {"tensors": _stacked(tensors) if tensors else None, "numbers": numbers}


def _unpacked(packed: Mapping[str, Any]) -> list[Scalar]:
    tensors = packed["tensors"]
    return [*(tensors.unbind() if tensors is not None else ()), *packed["numbers"]]
