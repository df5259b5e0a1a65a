"""Every scalar that anybody publishes, kept on the device until a log point."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs

from diptych.engine.metrics.metrics_buffer import Scalar, Window, as_scalar


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
        self._window = Window()
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
        if scalars:
            self._window.add(scalars)
        if named:
            self._window.add(named)

    def gauge(self, tag: str, function: Callable[[], Scalar]) -> None:
        """Publish what `function()` returns at each log point: a rate, memory in use."""
        self._gauges[tag] = function

    def remove_gauge(self, tag: str) -> None:
        """Publish it no more."""
        del self._gauges[tag]

    @contextmanager
    def gauges_kept_on_error(self) -> Iterator[None]:
        """Take back every gauge that was added within this context if it raises."""
        before = dict(self._gauges)
        try:
            yield
        except BaseException:
            self._gauges = before
            raise

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
            gauges = {tag: as_scalar(tag, function()) for tag, function in self._gauges.items()}
            means, read = self._drain(gauges)
            self._emit(Record(step, {**means, **read}))

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
        self._window.clear()
        self._epoch.clear()
        self._history.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next log point and the end of the epoch need."""
        return {
            "window": self._window.state_dict(),
            "epoch": {tag: [mean.total, mean.count] for tag, mean in self._epoch.items()},
            "history": {tag: list(values) for tag, values in self._history.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` returned."""
        self.reset()
        self._window.load_state_dict(state_dict["window"])
        self._epoch.update({tag: _Mean(*mean) for tag, mean in state_dict["epoch"].items()})
        self._history.update({tag: list(values) for tag, values in state_dict["history"].items()})

    def _emit(self, record: Record) -> None:
        self.record = record
        if self._on_record is not None:
            self._on_record()

    def _drain(self, gauges: Mapping[str, Scalar]) -> tuple[dict[str, float], dict[str, float]]:
        """Empty the window into the epoch's means; return the window's, and the gauges."""
        sums, read = self._window.drain(gauges)
        for tag, (total, count) in sums.items():
            self._epoch[tag].add(total, count)
        return {tag: total / count for tag, (total, count) in sums.items()}, read
