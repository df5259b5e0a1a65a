"""Summaries of a run in a few lines: of its set-up at the start, of its result at the end."""

from __future__ import annotations

import math
import os
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TextIO

import attrs
from ignite.engine import Events

from diptych.engine.data.seeded_loader import SeededLoader
from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.events import MetricsEvents, Outcome, RunEvents
from diptych.engine.modules import unwrapped
from diptych.handlers.argument_checks import Mode, improves, one_of, usual_mode
from diptych.handlers.components import model_and_loss_sizes, total_size
from diptych.handlers.output.output_handler import OutputHandler
from diptych.handlers.run_directory import RunDirectory
from diptych.handlers.sinks.progress_bar import COLUMNS, PLAIN, chance_values, duration, is_terminal

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer

DIM = "\x1b[2m"
COMPONENTS = 6  # named in the card; the smaller ones are counted together
OUTCOMES = {
    Outcome.COMPLETED: "done",
    Outcome.TERMINATED: "stopped",
    Outcome.INTERRUPTED: "paused",
    Outcome.FAILED: "failed",
}


@attrs.define(kw_only=True, eq=False)
class RunCard(OutputHandler):
    """Prints a summary of the set-up when a run starts, and of the result when it ends.

    ```text
    model   TwoTowers, 3,459,713 parameters, all train: text 2,493,440, ...
    batch   512 = 2 ranks x 256, in pieces of 64, fp32 on cpu
    length  45 epochs of 11 steps, 495 in all
    run     runs/emoji/2026-01-31_09-30-00Z, resumed after epoch 12, step 132
    ```

    ```text
    done    epoch 45, step 495, in 2:03, 1,180 samples/s
    best    val/recall@1 0.4193 (chance 0.0033), epoch 40, step 440
    report  runs/emoji/2026-01-31_09-30-00Z/report.html
    ```

    Without a report (`HistoryPlots`) the last line names the directory. If a sink or a report could
    not write everything, such as on a full disk, the summary of the result says so, in a line for
    each file:

    ```text
    missing 12 writes to runs/emoji/2026-01-31_09-30-00Z/metrics.jsonl (No space left on device)
    ```

    The number of parameters is the model's; if the loss has its own, they are counted behind it.
    The batch size is left out if the loader has no `batch_size`. samples/s is the mean of the run's
    iterations in this process; it needs `Throughput`. Labels are dim on a terminal, unless
    `NO_COLOR` is set; elsewhere the summaries are plain text.

    Event: `STARTED`, `MetricsEvents.LOGGED`, `RunEvents.ENDED`. Writes on rank 0 only.
    Cost: under a millisecond a summary, microseconds a log point; no synchronisation.

    Args:
        directory: the run directory to print; None: none is printed.
        best: the metric whose best value is printed at the end, such as "val/recall@1"; None: the
            last loss is printed.
        mode: whether a larger ("max") or a smaller ("min") value of it is better. Default: as for
            `CheckpointManager`.
        stream: to write to; None: the process's standard error.

    Raises:
        ValueError: if `mode` is neither "max" nor "min".
    """

    directory: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    best: str | None = None
    mode: Mode = attrs.field(validator=one_of(Mode))
    stream: TextIO | None = None
    _best: dict[str, float] = attrs.field(factory=dict, init=False, repr=False)
    _loss: float | None = attrs.field(default=None, init=False, repr=False)
    _step: int = attrs.field(default=0, init=False, repr=False)
    _samples: float = attrs.field(default=0.0, init=False, repr=False)
    _seconds: float = attrs.field(default=0.0, init=False, repr=False)
    _start_time: float | None = attrs.field(default=None, init=False, repr=False)

    @mode.default
    def _usual_mode(self) -> Mode:
        return usual_mode(self.best, "best")

    def attach(self, trainer: Trainer) -> None:
        """Print the summaries of the trainer's runs."""
        # Every rank keeps the best value, so that any of them can be rank 0 of a resumed run.
        self.attach_guarded(trainer)

    def listen(self, trainer: Trainer) -> None:
        """Print the summaries of the trainer's runs on rank 0."""
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(MetricsEvents.LOGGED, self._log)
        if rank() == 0:
            trainer.add_event_handler(RunEvents.ENDED, self._end)

    @property
    def role(self) -> str:
        """The metric."""
        return self.best or ""

    @property
    def destination(self) -> str:
        """The stream."""
        return "the summary"

    def state_dict(self) -> dict[str, float]:
        """Return the best value so far with its epoch and step; empty if there is none."""
        return dict(self._best)

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Load a state that `state_dict` returned."""
        self._best = dict(state_dict)

    def _start(self, trainer: Trainer) -> None:
        if trainer.state.iteration == 0:
            self._best = {}
        self._start_time, self._step = perf_counter(), trainer.state.iteration
        self._samples = self._seconds = 0.0
        self._loss = None
        if rank() == 0:
            self._write(
                {
                    "model": _model(trainer),
                    "batch": _batch(trainer),
                    "length": _length(trainer),
                    "run": _run(self.directory, trainer),
                }
            )

    def _log(self, trainer: Trainer) -> None:
        record = trainer.metrics.record
        rate = record.values.get("time/samples_per_second")
        if rate is not None:
            seconds = record.values.get("time/step", 0.0) * (record.step - self._step)
            self._samples += rate * seconds
            self._seconds += seconds
            self._step = record.step
        self._loss = record.values.get("train/loss", self._loss)
        value = record.values.get(self.best or "", math.nan)
        if improves(value, self._best.get("value"), self.mode):
            self._best = {"value": value, "epoch": trainer.state.epoch, "step": record.step}

    def _end(self, trainer: Trainer) -> None:
        if self._start_time is None:
            return  # nothing was left to run, or the run could not start
        state, seconds = trainer.state, perf_counter() - self._start_time
        if trainer.outcome is not Outcome.INTERRUPTED:  # a paused run continues without STARTED
            self._start_time = None
        ending = f"epoch {state.epoch}, step {state.iteration}, in {duration(seconds)}"
        if self._seconds:
            ending += f", {self._samples / self._seconds:,.0f} samples/s"
        missing = "\n".join(_missing(trainer)) or None
        self._write(
            {
                ending_word(trainer): ending,
                "missing": missing,
                **self._result(trainer),
                **self._place(),
            }
        )

    def _result(self, trainer: Trainer) -> dict[str, str]:
        """Return the best value of the metric, or without a metric the last loss."""
        if self.best is None:
            return (
                {} if self._loss is None else {"loss": f"{self._loss:#.4g}, at the last log point"}
            )
        if not self._best:
            return {}
        place = f"epoch {self._best['epoch']:.0f}, step {self._best['step']:.0f}"
        chance = chance_values(trainer).get(self.best)
        beside = "" if chance is None else f" (chance {chance:.2g})"
        return {"best": f"{self.best} {self._best['value']:.4g}{beside}, {place}"}

    def _place(self) -> dict[str, str]:
        """Return the path of the report; if there is none, that of the directory."""
        if self.directory is None:
            return {}
        report = self.directory / RunDirectory(self.directory).report.name
        return {"report": str(report)} if report.exists() else {"run": str(self.directory)}

    def _write(self, lines: Mapping[str, str | None]) -> None:
        with self.tolerated(lost=1):
            self._print(lines, sys.stderr if self.stream is None else self.stream)

    def _print(self, lines: Mapping[str, str | None], stream: TextIO) -> None:
        dim = is_terminal(stream) and not os.environ.get("NO_COLOR")
        for name, text in lines.items():
            if text:
                label = f"{DIM}{name:<7}{PLAIN}" if dim else f"{name:<7}"
                stream.write(f"{label} {_folded(text)}\n")
        stream.flush()


def _folded(text: str) -> str:
    """Return a text with line breaks before the greatest width; paths stay whole."""
    lines = (
        textwrap.wrap(line, COLUMNS - 8, break_long_words=False, break_on_hyphens=False)
        for line in text.split("\n")
    )
    return "\n        ".join(piece for pieces in lines for piece in pieces)


def _missing(trainer: Trainer) -> list[str]:
    """Return what sinks and reports could not write, a line for each destination."""
    return [
        f"{count:,} write{'' if count == 1 else 's'} to {destination}"
        + (f" ({error})" if (error := handler.last_error(destination)) else "")
        for handler in trainer.handlers_of(OutputHandler)
        for destination, count in handler.unwritten.items()
    ]


def ending_word(trainer: Trainer) -> str:
    """Return how a run ended, in one word."""
    signalled = isinstance(sys.exc_info()[1], (KeyboardInterrupt, SystemExit))
    if trainer.outcome is Outcome.FAILED and signalled:
        return "stopped"
    return OUTCOMES[trainer.outcome or Outcome.FAILED]


def _model(trainer: Trainer) -> str:
    """Return the model's number of parameters: all, trainable, by component; and the loss's."""
    sizes, loss = model_and_loss_sizes(trainer.model, trainer.loss)
    total, trainable = total_size(sizes)
    largest = sorted(((size.parameters, name) for name, size in sizes.items()), key=lambda s: -s[0])
    parts = [f"{name} {size:,}" for size, name in largest[:COMPONENTS]]
    rest = largest[COMPONENTS:]
    if rest:
        parts.append(f"{len(rest)} more {sum(size for size, _ in rest):,}")
    share = "all train" if trainable == total else f"{trainable:,} ({trainable / total:.1%}) train"
    head = f"{type(unwrapped(trainer.model)).__name__}, {total:,} parameters, {share}"
    text = f"{head}: {', '.join(parts)}" if parts else head
    return f"{text}; the loss has {loss.parameters:,} more" if loss.parameters else text


def _batch(trainer: Trainer) -> str:
    settings = trainer.settings
    parts = [_size(trainer.state.dataloader)]
    if settings.microbatch_size is not None:
        parts.append(f"in pieces of {settings.microbatch_size}")
    parts.append(f"{settings.precision} on {trainer.device.type}")
    return ", ".join(part for part in parts if part)


def _size(loader: Any) -> str:
    """Return the number of samples in an update; "" if the loader has no `batch_size`."""
    size, ranks = getattr(loader, "batch_size", None), world_size()
    if not isinstance(size, int):
        return ""
    whole, share = size, f"{size / ranks:g}"
    if not isinstance(loader, SeededLoader):  # its batch size is that of all ranks together
        whole, share = size * ranks, f"{size}"
    return f"{whole:,}" if ranks == 1 else f"{whole:,} = {ranks} ranks x {share}"


def _length(trainer: Trainer) -> str:
    state = trainer.state
    length = state.epoch_length
    each = f"of {length or 0:,} step{'' if length == 1 else 's'}"
    each = "of unknown length" if length is None else each
    if state.max_iters is not None:
        return f"{state.max_iters:,} steps in all, epochs {each}"
    if length is None or state.max_epochs is None:
        return f"{state.max_epochs} epochs {each}"
    return f"{state.max_epochs} epochs {each}, {state.max_epochs * length:,} in all"


def _run(directory: Path | None, trainer: Trainer) -> str | None:
    state = trainer.state
    resumed = f"resumed after step {state.iteration:,}, in epoch {state.epoch}"
    if state.iteration and not trainer.epoch_iteration:
        resumed = f"resumed after epoch {state.epoch}, step {state.iteration:,}"
    parts = [str(directory) if directory else "", resumed if state.iteration else ""]
    return ", ".join(part for part in parts if part) or None
