"""A dry run: everything that a run does, once, with nothing left behind."""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import attrs
from ignite.engine import Events

from diptych.engine.distributed.agreement import on_rank_zero
from diptych.engine.distributed.collectives import rank
from diptych.engine.errors import BatchError
from diptych.engine.events import MetricsEvents, RunEvents
from diptych.engine.trials.first_batches import FirstBatches
from diptych.engine.trials.overfit import loss_of
from diptych.engine.trials.restored import parts_preserved
from diptych.engine.trials.trial import Trial

FILES = "Files that a run would write; here they went into a scratch directory, which was removed:"


@attrs.frozen
class Row:
    """A line of the report.

    Attributes:
        part: a handler, or a part of the run.
        result: what it did.
        seconds: its time on the host; None: not measured.
    """

    part: str
    result: str
    seconds: float | None = None


@attrs.frozen
class DryRun:
    """The report of a dry run; as a string, it is a table.

    Attributes:
        rows: what was done, in the order of the run.
        values: the published values by name.
        files: the files that were written, by the paths that a run would use, and their sizes.
        left_out: the handlers and functions that were not run.
    """

    rows: tuple[Row, ...]
    values: dict[str, float]
    files: dict[Path, int]
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(len(row.part) for row in self.rows)
        lines = ["Dry run: everything below was done once and undone."]
        for row in self.rows:
            time = "" if row.seconds is None else f"{row.seconds * 1e3:.1f} ms"
            lines.append(f"  {row.part:{width}}  {time:>10}  {row.result}".rstrip())
        if self.files:
            lines.append(FILES)
            lines += [f"  {path} ({size:,} bytes)" for path, size in self.files.items()]
        if self.left_out:
            lines.append("Not run, because what it does could not be undone:")
            lines += [f"  {name}" for name in self.left_out]
        return "\n".join(lines)


def dry_run(trainer: Any, loader: Iterable[Any], updates: int, batches: int) -> DryRun:
    """Go once through everything, and restore the trainer; see `Trainer.dry_run`."""
    first = FirstBatches(loader, updates)
    if not len(first):
        raise BatchError("loader must have at least one batch, got an empty loader")
    functions = foreign_functions(trainer)
    with ExitStack() as contexts:
        contexts.enter_context(parts_preserved(trainer))
        trial = Trial(contexts.enter_context(_scratch_directory()), batches, contexts)
        copies = [copied for one in trainer.handlers if (copied := trial.copied(one)) is not None]
        contexts.enter_context(trainer.renewed(log_every=1))
        trial.left_out += functions
        trainer.leaves_out = tuple(trial.left_out)
        watched = _Watched(trainer)
        trainer.attach(*copies)
        trainer.run(first, max_epochs=1)
        return watched.report(copies, trial)


def foreign_functions(trainer: Any) -> list[str]:
    """Return the functions and objects that listen to a trainer and are not attached to it."""
    own = {id(one) for one in (trainer, *trainer.handlers)}
    found: dict[str, None] = {}
    for listener in trainer.listeners:
        inside = (getattr(listener.owner, "__module__", None) or "").startswith("diptych.")
        if id(listener.owner) not in own and not inside:
            event = getattr(listener.event, "name", listener.event)
            found[f"{listener.name} at {event}"] = None
    return list(found)


@contextmanager
def _scratch_directory() -> Iterator[Path]:
    """Make a directory for all ranks, and remove it with what is in it."""
    path = Path(on_rank_zero(lambda: tempfile.mkdtemp(prefix="dry_run_")))
    try:
        yield path
    finally:
        if rank() == 0:
            shutil.rmtree(path, ignore_errors=True)


class _Watched:
    """Notes what a run does."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._losses: list[float | None] = []
        self._seconds: list[float] = []
        self._started = 0.0
        self._saved = 0
        self._values: dict[str, float] = {}
        trainer.add_event_handler(Events.ITERATION_STARTED, self._start)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._end)
        trainer.add_event_handler(MetricsEvents.LOGGED, self._note_values)
        trainer.add_event_handler(RunEvents.SAVED, self._count_save)

    def _start(self) -> None:
        self._started = perf_counter()

    def _end(self) -> None:
        self._losses.append(loss_of(self._trainer))  # waits for the device
        self._seconds.append(perf_counter() - self._started)

    def _note_values(self) -> None:
        self._values.update(self._trainer.metrics.record.values)

    def _count_save(self) -> None:
        self._saved += 1

    def report(self, handlers: Iterable[Any], trial: Trial) -> DryRun:
        """Return what was done since the start."""
        losses = ", ".join(f"{loss:.4g}" for loss in self._losses if loss is not None)
        done = _counted(len(self._losses), "update")
        done += f": loss {losses}" if losses else ""
        rows = [Row("update", done, sum(self._seconds))]
        seconds: defaultdict[int, float] = defaultdict(float)
        calls: defaultdict[int, int] = defaultdict(int)
        for listener in self._trainer.listeners:
            seconds[id(listener.owner)] += listener.seconds
            calls[id(listener.owner)] += listener.calls
        for handler in handlers:
            result = self._result(handler) or _times("called", calls[id(handler)])
            name = getattr(handler, "key", type(handler).__name__)
            rows.append(Row(name, result, seconds[id(handler)]))
        if self._saved:
            rows.append(Row("checkpoints", _times("saved", self._saved)))
        files = dict(on_rank_zero(trial.files))  # once no rank writes any more, and the same on all
        return DryRun(tuple(rows), dict(self._values), files, tuple(trial.left_out))

    def _result(self, handler: Any) -> str:
        """Return the values of an evaluation; "" of another handler."""
        evaluator, prefix = getattr(handler, "evaluator", None), getattr(handler, "prefix", None)
        if evaluator is None or prefix is None:
            return ""
        own = {k: v for k, v in self._values.items() if k.startswith(f"{prefix}/")}
        parts = [f"{name} {value:.4g}" for name, value in own.items()]
        parts += [f"no {name} ({reason})" for name, reason in evaluator.left_out.items()]
        batches = _counted(evaluator.state.iteration, "batch", "batches")
        return f"{batches}: {', '.join(parts) or 'no values'}"


def _counted(count: int, one: str, several: str | None = None) -> str:
    return f"{count} {one if count == 1 else several or one + 's'}"


def _times(done: str, count: int) -> str:
    return f"{done} {count} times" if count != 1 else f"{done} once"
