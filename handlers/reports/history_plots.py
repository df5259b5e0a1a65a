"""The report of a run: a handler that draws its page of HTML."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
from ignite.engine import Events

from diptych.engine.checks import whole_number
from diptych.engine.events import EvaluationEvents, RunEvents
from diptych.engine.state.handler_states import attached
from diptych.handlers.extras import check_extra
from diptych.handlers.files import write_atomically
from diptych.handlers.health.representation_health import RepresentationHealth
from diptych.handlers.output.output_handler import OutputHandler
from diptych.handlers.pictures.drawing import QueryResults
from diptych.handlers.pictures.gallery import RetrievalGallery
from diptych.handlers.reports.curves_png import save_charts
from diptych.handlers.reports.page import RunNotes, drawings, page
from diptych.handlers.reports.run_history import RunReader
from diptych.handlers.run_directory import RunDirectory
from diptych.handlers.sinks.jsonl import JsonLines
from diptych.handlers.sinks.progress_bar import chance_values
from diptych.handlers.sinks.run_card import ending_word

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer


PAUSE = 100.0
"""Time between two drawings at checkpoints, in durations of the first one."""


@attrs.define(eq=False)
class HistoryPlots(OutputHandler):
    """Draws the run into `report.html`, one file without scripts that opens anywhere.

    The page has the results, beside those of random features where a metric knows them; the
    findings; when the run was started and resumed, with what had changed (from `RunRecord`); the
    curves; the pairs that a `RetrievalGallery` has drawn last; and the settings. It fits a
    telephone, and is dark where the reader prefers that. With `png`, the same charts are drawn into
    `curves.png`.

    It reads what `JsonLines` has written into the directory, so a resumed run draws its whole
    history. Of a long curve it draws the lowest, the highest and the last value of each of at most
    132 parts. To compare runs, call `diptych compare runs/a runs/b`.

    Event: `RunEvents.SAVED`, or with `every` `EPOCH_COMPLETED`; and `RunEvents.ENDED`. Writes on
        rank 0 only.
    Cost: ten milliseconds of the processor each time, and a few for a thousand records since the
        last drawing; a disk that writes a checkpoint meanwhile can make it wait longer. At
        checkpoints at most a hundredth of the time: others are skipped. When a run resumes, all its
        records are read once. `png` adds half a second, and half a
        second for the first import of matplotlib. No synchronisation.

    Args:
        directory: the run directory, to which a `JsonLines` of the trainer writes.
        every: epochs between two drawings, >= 1; None: draw at checkpoints.
        png: whether to draw `curves.png` too. Needs the extra `plots`.

    Raises:
        ValueError: if `every` is below 1; when the run starts, if no `JsonLines` writes there.
        ImportError: if `png` is set and the extra is not installed.
    """

    directory: RunDirectory = attrs.field(converter=RunDirectory)
    every: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(whole_number(of="epochs")), kw_only=True
    )
    png: bool = attrs.field(default=False, kw_only=True)
    _reader: RunReader = attrs.field(init=False, repr=False)
    _next: float = attrs.field(default=0.0, init=False, repr=False)
    _chance: dict[str, float] = attrs.field(factory=dict, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._reader = RunReader(self.directory)
        if self.png:
            check_extra("plots", "matplotlib", needed_by="png=True")

    def listen(self, trainer: Trainer) -> None:
        """Draw the trainer's runs; called on rank 0 only."""
        trainer.add_event_handler(Events.STARTED, self._check)
        trainer.add_event_handler(EvaluationEvents.EVALUATED, self._keep_chance)
        if self.every:
            trainer.add_event_handler(Events.EPOCH_COMPLETED(every=self.every), self._draw)
        else:
            trainer.add_event_handler(RunEvents.SAVED, self._draw_if_due)
        trainer.add_event_handler(RunEvents.ENDED, self._draw)

    @property
    def destination(self) -> str:
        """The report."""
        return str(self.directory.report)

    @property
    def unwritten(self) -> dict[str, int]:
        """The report, while its last drawing could not be written."""
        return {self.destination: 1} if self.last_error(self.destination) else {}

    def state_dict(self) -> dict[str, Any]:
        """Return the values of random features of the evaluations so far."""
        return {"chance": dict(self._chance)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state that `state_dict` returned."""
        self._chance = dict(state_dict["chance"])

    def _keep_chance(self, trainer: Trainer) -> None:
        self._chance |= chance_values(trainer)

    def _check(self, trainer: Trainer) -> None:
        self._reader = RunReader(self.directory)  # the files may be cut when a run starts
        written = [sink.path for sink in attached(trainer) if isinstance(sink, JsonLines)]
        if self.directory.metrics not in written:
            raise ValueError(
                f"HistoryPlots needs a JsonLines that writes to {self.directory.metrics}, got "
                f"{', '.join(map(str, written)) or 'none'}. Attach "
                f"JsonLines({str(self.directory)!r})."
            )

    def _draw_if_due(self, trainer: Trainer) -> None:
        begin = time.monotonic()
        if begin >= self._next:
            self._draw(trainer)
            end = time.monotonic()
            self._next = end + PAUSE * (end - begin)

    def _draw(self, trainer: Trainer) -> None:
        if self.directory.metrics.exists():
            with self.tolerated():
                runs = [self._reader.read()]
                write_atomically(self.directory.report, page(runs, self._notes(trainer)))
                if self.png:
                    save_charts(drawings(runs), self.directory.curves)

    def _notes(self, trainer: Trainer) -> RunNotes:
        state = trainer.state
        return RunNotes(
            outcome="running" if trainer.outcome is None else ending_word(trainer),
            place=f"epoch {state.epoch}, step {state.iteration:,}",
            findings=trainer.findings,
            unjudged=_unjudged(trainer),
            chance=self._chance,
            galleries=_galleries(trainer),
        )


def _unjudged(trainer: Trainer) -> str:
    """Return why the rules of health have not judged the run, in words; empty if they have."""
    health = trainer.handlers_of(RepresentationHealth)
    if not health:
        return "The health of the run was not measured: it has no RepresentationHealth."
    if any(one.has_judged for one in health):
        return ""
    return (
        "The rules of health have not judged this run: they need "
        f"{health[0].patience} log points with measured features, and {health[0].warmup} steps "
        "after the learning rate last rose."
    )


def _galleries(trainer: Trainer) -> dict[str, list[QueryResults]]:
    return {
        f"{handler.prefix}: {direction.replace('_', ' ')}, step {handler.step:,}": rows
        for handler in trainer.handlers_of(RetrievalGallery)
        for direction, rows in handler.results.items()
    }
