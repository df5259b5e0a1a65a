"""The progress of a run in a terminal, a notebook or a log file."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator
from time import perf_counter
from typing import TYPE_CHECKING, TextIO

import attrs
from ignite.engine import Events

from diptych.engine.distributed.collectives import world_size
from diptych.engine.evaluator import EvaluatesModel
from diptych.engine.events import MetricsEvents, RunEvents
from diptych.engine.metrics.metrics_collector import Record
from diptych.handlers.output.output_handler import OutputHandler

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer

CLEAR = "\r\x1b[K"
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"
BAR_WIDTH = 20
COLUMNS = 120
"""The longest line without a terminal."""


# Its attributes change in every iteration, so setting them runs no validator.
@attrs.define(kw_only=True, eq=False, on_setattr=attrs.setters.NO_OP)
class ProgressBar(OutputHandler):
    """Shows progress, loss, learning rate and speed, and the results of each evaluation.

    On a terminal it is one line, rewritten in place. Anywhere else (a file, a notebook, a pipe) it
    is a line every `interval` seconds and at the end of each epoch. The results of an evaluation
    have lines of their own, beside those of random features if the metric knows them (chance), with
    the change since the previous ones, and the word best if they are better than all earlier ones.
    Without a terminal no line exceeds 120 characters. Colour is used on a terminal, unless
    `NO_COLOR` is set. A warning that is logged to the terminal replaces the moving line, which is
    drawn again below it.

    Loss, learning rate and, with `Throughput`, samples/s are those of the last log point. The time
    left is estimated from the mean speed of the run so far, evaluations included. A line that
    cannot be written (a closed terminal, a full disk behind a pipe) is left out.

    Event: `STARTED`, `ITERATION_COMPLETED`, `MetricsEvents.LOGGED`, `RunEvents.ENDED`. Writes on
        rank 0 only.
    Cost: half a microsecond an iteration, about 100 microseconds a drawing; no synchronisation.

    Args:
        stream: to write to; None: the process's standard error.
        refresh: seconds between two drawings on a terminal.
        interval: seconds between two lines elsewhere.
        lower_is_better: endings of names; a result whose name has one of them is best when it is
            lowest.

    Raises:
        ValueError: if a time is negative.
    """

    stream: TextIO | None = None
    refresh: float = attrs.field(default=0.25, validator=attrs.validators.ge(0))
    interval: float = attrs.field(default=30.0, validator=attrs.validators.ge(0))
    lower_is_better: tuple[str, ...] = ("loss", "error", "rank", "perplexity")
    _record: Record = attrs.field(factory=Record, init=False, repr=False)
    _due: float = attrs.field(default=0.0, init=False, repr=False)
    _is_running: bool = attrs.field(default=False, init=False, repr=False)
    _start_time: float = attrs.field(default=0.0, init=False, repr=False)
    _first_iteration: int = attrs.field(default=0, init=False, repr=False)
    _cleared: list[logging.Handler] = attrs.field(factory=list, init=False, repr=False)

    @property
    def destination(self) -> str:
        """The stream."""
        return "the progress"

    def listen(self, trainer: Trainer) -> None:
        """Show the trainer's progress; called on rank 0 only."""
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._draw_if_due)
        trainer.add_event_handler(MetricsEvents.LOGGED, self._log)
        trainer.add_event_handler(RunEvents.ENDED, self._end)

    def _start(self, trainer: Trainer) -> None:
        self._is_running = True
        self._start_time, self._first_iteration = perf_counter(), trainer.state.iteration
        self._due = 0.0 if self._terminal else self._start_time + self.interval
        if self._terminal:
            self._cleared = _terminal_handlers()
            for handler in self._cleared:
                handler.addFilter(self._clear)

    def _draw_if_due(self, trainer: Trainer) -> None:
        now = perf_counter()
        if now >= self._due:
            if not self._is_running:  # a paused run continues without STARTED
                self._start(trainer)
            self._due = now + (self.refresh if self._terminal else self.interval)
            self._draw(trainer, now)

    def _draw(self, trainer: Trainer, now: float) -> None:
        parts = list(self._parts(trainer, now - self._start_time))
        line = "  ".join(parts)
        if not self._terminal:
            self._write(f"{line}\n")
            return
        columns, left = self._columns(), _iterations_left(trainer)
        if left is not None and columns > len(line) + BAR_WIDTH + 2:
            line = "  ".join([parts[0], self._bar(_completed_share(trainer, left)), *parts[1:]])
        self._write(CLEAR + line[: columns - 1])

    def _parts(self, trainer: Trainer, seconds: float) -> Iterator[str]:
        """Yield the parts of the line whose values are known, in order."""
        state, values = trainer.state, self._record.values
        yield f"epoch {state.epoch}" + (f"/{state.max_epochs}" if state.max_epochs else "")
        left = _iterations_left(trainer)
        yield (
            f"step {state.iteration}" if left is None else f"{_completed_share(trainer, left):4.0%}"
        )
        if "train/loss" in values:
            yield f"loss {values['train/loss']:#.4g}"
        if "train/learning_rate" in values:
            yield f"lr {values['train/learning_rate']:.3g}"
        rate = (state.iteration - self._first_iteration) / max(seconds, 1e-9)
        yield self._speed(trainer, rate)
        if left == 0:
            yield f"in {duration(seconds)}"
        elif left is not None and rate:
            yield f"{duration(left / rate)} left"

    def _speed(self, trainer: Trainer, rate: float) -> str:
        samples = self._record.values.get("time/samples_per_second")
        size = getattr(trainer.state.output, "batch_size", None)
        if samples is None and size is not None:
            samples = rate * size * world_size()
        return f"{samples:,.0f} samples/s" if samples else f"{rate:,.4g} iterations/s"

    def _bar(self, done: float) -> str:
        full = round(done * BAR_WIDTH)
        filled, empty = ("━", "─") if self._writes_unicode else ("=", "-")
        return filled * full + empty * (BAR_WIDTH - full)

    def _log(self, trainer: Trainer) -> None:
        record = trainer.metrics.record
        if not record.values:
            return
        if not any(tag.startswith(("train/", "time/")) for tag in record.values):
            self._write((CLEAR if self._terminal else "") + self._results(trainer, record) + "\n")
            return
        self._record = record
        # The log point at the end of an epoch precedes the evaluations of the epoch.
        if trainer.epoch_iteration == trainer.state.epoch_length and not self._terminal:
            self._due = perf_counter() + self.interval
            self._draw(trainer, perf_counter())

    def _results(self, trainer: Trainer, record: Record) -> str:
        prefix = next(iter(record.values)).partition("/")[0] + "/"
        prefix = prefix if all(tag.startswith(prefix) for tag in record.values) else ""
        chance = chance_values(trainer)
        groups: dict[str, list[str]] = {"": []}
        for tag, value in record.values.items():
            group, _, name = tag[len(prefix) :].rpartition("/")
            notes = [f"chance {chance[tag]:.2g}"] if tag in chance else []
            earlier = trainer.metrics.get_history(tag)[:-1]
            if earlier:
                notes.append(f"{value - earlier[-1]:+.3g}")
                notes += ["best"] if self._is_best(tag, value, earlier) else []
            text = f"{name} {value:.4g}" + (f" ({', '.join(notes)})" if notes else "")
            groups.setdefault(group, []).append(text)
        head = f"epoch {trainer.state.epoch}, step {record.step}  {prefix.rstrip('/')}"
        return self._wrapped({head.rstrip(): groups.pop(""), **groups})

    def _wrapped(self, groups: dict[str, list[str]]) -> str:
        """Return the groups as text, with line breaks at groups and at the width.

        Without a terminal, they share a line if they fit.
        """
        columns, lines = self._columns(), list[str]()
        line = "  ".join(text for head, items in groups.items() for text in (head, *items))
        if not self._terminal and len(line) <= columns:
            return line
        for head, items in groups.items():
            lines.append(f"  {head}" if lines else head)
            for item in items:
                if len(lines[-1]) + 2 + len(item) > columns:
                    lines.append("  ")
                lines[-1] += f"  {item}"
        return self._colored("\n".join(lines))

    def _colored(self, text: str) -> str:
        """Return results with the word best in colour, on a terminal that shows colours."""
        if not self._terminal or os.environ.get("NO_COLOR"):
            return text
        return text.replace("best)", f"{GREEN}best{PLAIN})")

    def _is_best(self, tag: str, value: float, earlier: list[float]) -> bool:
        sign = -1 if tag.endswith(self.lower_is_better) else 1
        numbers = [sign * other for other in earlier if not math.isnan(other)]
        return not math.isnan(value) and all(sign * value > number for number in numbers)

    def _end(self, trainer: Trainer) -> None:
        if self._is_running and self._terminal:
            self._draw(trainer, perf_counter())
            self._write("\n")
        self._is_running, self._due = False, 0.0
        for handler in self._cleared:
            handler.removeFilter(self._clear)
        self._cleared = []

    def _clear(self, _: logging.LogRecord) -> bool:
        """Clear the line before a log record is written; as a filter, let every record pass."""
        self._write(CLEAR)
        return True

    @property
    def _out(self) -> TextIO:
        return sys.stderr if self.stream is None else self.stream

    @property
    def _terminal(self) -> bool:
        return is_terminal(self._out)

    @property
    def _writes_unicode(self) -> bool:
        return (self._out.encoding or "").lower().startswith("utf")

    def _columns(self) -> int:
        if not self._terminal:
            return COLUMNS
        try:
            return os.get_terminal_size(self._out.fileno()).columns or 80
        except OSError:
            return 80

    def _write(self, text: str) -> None:
        with self.tolerated(lost=1):
            self._out.write(text)
            self._out.flush()


def chance_values(trainer: Trainer) -> dict[str, float]:
    """Return tag to the value of random features, of the metrics that have computed it."""
    return {
        f"{handler.prefix}/{name}": value
        for handler in trainer.handlers_of(EvaluatesModel)
        for name, value in handler.evaluator.chance.items()
    }


def is_terminal(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that understands escape sequences."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _terminal_handlers() -> list[logging.Handler]:
    """Return the root logger's handlers, and Python's last resort, that write to a terminal."""
    handlers = [*logging.getLogger().handlers, logging.lastResort]
    streams = [handler for handler in handlers if isinstance(handler, logging.StreamHandler)]
    return [handler for handler in streams if getattr(handler.stream, "isatty", bool)()]


def _iterations_left(trainer: Trainer) -> int | None:
    """Return the number of iterations left; None if the length of the run is unknown."""
    state = trainer.state
    if state.max_iters is not None:
        return state.max_iters - state.iteration
    if state.max_epochs is None or state.epoch_length is None:
        return None
    left = (state.max_epochs - state.epoch) * state.epoch_length
    if trainer.epoch_iteration:  # 0 between two epochs
        left += state.epoch_length - trainer.epoch_iteration
    return left


def _completed_share(trainer: Trainer, left: int) -> float:
    """Return the completed share of the run, from 0 to 1."""
    return trainer.state.iteration / max(trainer.state.iteration + left, 1)


def duration(seconds: float) -> str:
    """Return a duration as 2:03, or 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
