"""The collector of all published scalars, which keeps them on the device until a log point."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from diptych.engine.distributed.collectives import world_size
from diptych.engine.errors import UnknownNameError
from diptych.engine.metrics.metrics_buffer import (
    WEIGHT,
    BufferMark,
    Scalar,
    ScalarBuffer,
    as_scalar,
)


@attrs.frozen
class Record:
    """The values of one log point, for every sink.

    Attributes:
        step: the iteration.
        values: tag to value.
    """

    step: int = 0
    values: dict[str, float] = attrs.field(factory=dict)


class MetricsCollector:
    """Collects scalars and computes their means for each log point and each epoch.

    Tensors stay on their device until `log` or `end_epoch` fetches all of them with one transfer.
    Means are over all ranks.

    Args:
        on_record: called after `record` has changed.

    Attributes:
        record: the values of the last log point or report.
    """

    def __init__(self, on_record: Callable[[], object] | None = None) -> None:
        self.record = Record()
        self._on_record = on_record
        self._buffer = ScalarBuffer()
        self._window: ScalarBuffer | None = None  # what a state holds instead of the buffer
        self._left: dict[str, ScalarBuffer] = {}  # values of events that an exception has left
        # The sum and the number of the values of this epoch.
        self._epoch: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        self._gauges: dict[str, Callable[[], Scalar]] = {}
        self._history: defaultdict[str, list[float]] = defaultdict(list)
        self._again: tuple[int, frozenset[str]] | None = None  # step and tags of a report
        self._unsent: Record | None = None  # which not everything that waits for records has got
        self._unsent_tags: set[str] | None = None  # its tags; None if it is of a log point

    def update(self, scalars: Mapping[str, Scalar] | None = None, /, **named: Scalar) -> None:
        """Publish values of this iteration.

        Args:
            scalars: tag to a number or a tensor of one element. Tensors are copied on their device,
                so that the memory behind them may change afterwards.
            named: the same, for tags that are Python names.

        Raises:
            TypeError: if a value is neither a number nor a tensor.
            ValueError: if a tensor has more than one element.
        """
        if scalars:
            self._buffer.add(scalars)
        if named:
            self._buffer.add(named)

    def update_uncopied(self, scalars: Mapping[str, Scalar]) -> None:
        """Publish values of this iteration, tensors by reference.

        For tensors that nothing changes before the next log point: results of a computation, but
        not a parameter, a buffer, a view of one, or memory that is written again.

        Args:
            scalars: as in `update`.
        """
        self._buffer.add(scalars, copy=False)

    def update_sums(self, sums: Mapping[str, Scalar], count: Scalar) -> None:
        """Publish sums over samples of this iteration, to record their means over all samples.

        `update` records a mean of means, in which each iteration of each rank counts once. A tag is
        left out of a record if it has no samples.

        Args:
            sums: tag to the sum over this rank's samples, as in `update`. Publish a tag in one of
                both ways only.
            count: the number of these samples, or the sum of their weights; 0 if there are none.
        """
        self._buffer.add({**sums, **{tag + WEIGHT: count for tag in sums}})

    def update_all_sums(self, tags: Sequence[str], sums: Tensor, counts: Tensor) -> None:
        """Publish sums as `update_sums` does, each with its own count, without copying them.

        Args:
            tags: of the sums.
            sums: a vector that nothing else changes, without a graph.
            counts: a vector too.
        """
        self._buffer.add_row((*tags, *(tag + WEIGHT for tag in tags)), torch.cat([sums, counts]))

    def gauge(self, tag: str, function: Callable[[], Scalar]) -> None:
        """Publish the result of `function()` at each log point: a rate, memory in use."""
        self._gauges[tag] = function

    def remove_gauge(self, tag: str) -> None:
        """Stop publishing a gauge."""
        del self._gauges[tag]

    @contextmanager
    def gauges_restored_on_error(self) -> Iterator[None]:
        """If the context raises, remove the gauges that were added in it."""
        before = dict(self._gauges)
        try:
            yield
        except BaseException:
            self._gauges = before
            raise

    @contextmanager
    def collected_apart(
        self, occasion: str | None = None, *, repeated: bool = False
    ) -> Iterator[dict[str, float]]:
        """Keep the values that are published within this context apart from all others.

        The context yields a dictionary; at its end, it holds the mean of each tag. Over several
        ranks the end of the context is collective.

        Args:
            occasion: a name; a context that ends with an exception leaves its values to the next
                one of this name. None: the values are dropped.
            repeated: whether a run that resumes from a state taken inside the context goes through
                all of it again, so that the state must not hold its values.
        """
        means: dict[str, float] = {}
        window = self._window
        outer, self._buffer = self._buffer, self._left.pop(occasion or "", ScalarBuffer())
        apart = self._buffer
        if repeated:
            self._window = outer
        try:
            yield means
            if apart or world_size() > 1:
                sums, _ = apart.drain({})
                means.update({tag: total / count for tag, (total, count) in sums.items()})
        except BaseException:
            if occasion is not None:
                self._left[occasion] = apart
            raise
        finally:
            self._buffer, self._window = outer, window

    def mark(self) -> BufferMark:
        """Return a mark of what was published so far, for `drop_since`, at the start of a step.

        Events that an exception has left have been continued by then.
        """
        if self._left:
            self._left.clear()
        self._again = None
        return self._buffer.mark()

    def expect_again(self, record: Record) -> None:
        """Ignore the next report if it has the step and the tags of a record.

        A handler that raises after its report is called again, and reports again.
        """
        self._again = (record.step, frozenset(record.values))

    def drop_since(self, mark: BufferMark) -> None:
        """Drop the values that were published after a mark, by a step that is to be repeated."""
        self._buffer.drop_since(mark)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Publish final values, such as an evaluation's, as a record of their own.

        If a sink has raised while it took a record, the next call publishes that record again
        instead: the handler that published it is called again too.
        """
        if self._again == (step, frozenset(values)):
            self._again = None
            return
        if self._send_again(step, values):
            return
        self._unsent_tags = set(values)
        for tag, value in values.items():
            self._history[tag].append(float(value))
        self._emit(Record(step, {tag: float(value) for tag, value in values.items()}))

    def log(self, step: int) -> None:
        """Publish the means since the last log point, and the gauges, as a record.

        Nothing happens if nothing was published since then. If a sink has raised while it took a
        record, the next call publishes that record again instead.
        """
        if self._send_again(step):
            return
        self._unsent_tags = None
        if self._buffer:
            gauges = {tag: as_scalar(tag, function()) for tag, function in self._gauges.items()}
            means, read = self._drain(gauges)
            self._emit(Record(step, {**means, **read}))

    def end_epoch(self) -> dict[str, float]:
        """Return the mean of every tag over the epoch, and add it to the tag's history."""
        self._drain({})
        means = {tag: total / count for tag, (total, count) in self._epoch.items()}
        for tag, value in means.items():
            self._history[tag].append(value)
        self._epoch.clear()
        return means

    def get_history(self, name: str) -> list[float]:
        """Return the values of a tag: one for each epoch, or for each report.

        Raises:
            KeyError: if there is no such tag; the message lists all tags.
        """
        if name not in self._history:
            raise UnknownNameError(
                f"name must be a tag with a history, got {name!r}. There are: "
                f"{', '.join(sorted(self._history)) or 'none'}."
            )
        return list(self._history[name])

    def reset(self) -> None:
        """Drop every published value; the gauges stay."""
        self._buffer.clear()
        self._left.clear()
        self._epoch.clear()
        self._history.clear()
        self._again = self._unsent = None

    def state_dict(self) -> dict[str, Any]:
        """Return all values that the next log point and the end of the epoch need."""
        return {
            "window": (self._buffer if self._window is None else self._window).state_dict(),
            "epoch": {tag: list(mean) for tag, mean in self._epoch.items()},
            "history": {tag: list(values) for tag, values in self._history.items()},
            "left": {name: buffer.state_dict() for name, buffer in self._left.items()},
            "again": self._again and [self._again[0], sorted(self._again[1])],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""
        self.reset()
        self._buffer.load_state_dict(state_dict["window"])
        for name, left in state_dict.get("left", {}).items():
            self._left[name] = ScalarBuffer()
            self._left[name].load_state_dict(left)
        again = state_dict.get("again")
        self._again = again and (again[0], frozenset(again[1]))
        self._epoch.update({tag: list(mean) for tag, mean in state_dict["epoch"].items()})
        self._history.update({tag: list(values) for tag, values in state_dict["history"].items()})

    def _emit(self, record: Record) -> None:
        self.record = self._unsent = record
        if self._on_record is not None:
            self._on_record()
        self._unsent = None

    def _send_again(self, step: int, tags: Iterable[str] | None = None) -> bool:
        """Publish the last record again if an exception kept it from some of its listeners.

        Without tags, the record is that of a log point.

        Returns:
            Whether it is that record.
        """
        unsent = self._unsent
        if unsent is None:
            return False
        is_same = unsent.step == step and self._unsent_tags == (tags and set(tags))
        if is_same or unsent.step != step:
            self._emit(unsent)
        return is_same

    def _drain(self, gauges: Mapping[str, Scalar]) -> tuple[dict[str, float], dict[str, float]]:
        """Add the buffer to the epoch's means and empty it; return its means, and the gauges."""
        sums, read = self._buffer.drain(gauges)
        for tag, (total, count) in sums.items():
            mean = self._epoch[tag]
            mean[0], mean[1] = mean[0] + total, mean[1] + count
        return {tag: total / count for tag, (total, count) in sums.items()}, read
