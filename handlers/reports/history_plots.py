"""Reports: a page of HTML with the curves of one run, or of several side by side."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import attrs
from ignite.engine import Events

from diptych.engine.checks import whole_number
from diptych.engine.events import RunEvents
from diptych.engine.state.differences import differences
from diptych.engine.state.handler_states import attached
from diptych.engine.state.run_identity import RunIdentity
from diptych.handlers.extras import check_extra
from diptych.handlers.files import write_atomically
from diptych.handlers.output.output_handler import OutputHandler
from diptych.handlers.reports.curves import COLORS, ChartDrawing, color_of, draw_chart, svg
from diptych.handlers.reports.curves_png import save_charts
from diptych.handlers.reports.run_history import RunHistory, RunReader
from diptych.handlers.run_directory import RunDirectory
from diptych.handlers.sinks.charts import curves_by_question
from diptych.handlers.sinks.jsonl import JsonLines

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer

ALWAYS_DIFFERENT = ("started", "command")
PATHS = (".directory", ".path")
LENGTHS = ("trainer.max_epochs", "trainer.max_iters", "trainer.epoch_length")
STYLE = """
body { font: 14px system-ui, sans-serif; margin: 24px; color: #222; background: #fff }
.charts { display: flex; flex-wrap: wrap; gap: 12px; align-items: start }
svg { width: 360px; font-family: sans-serif }
table { border-collapse: collapse; margin: 12px 0 }
td, th { border: 1px solid #ddd; padding: 3px 8px;
  text-align: left } td + td { font-variant-numeric: tabular-nums } h2 { margin-top: 28px }
"""


@attrs.define(eq=False)
class HistoryPlots(OutputHandler):
    """Draws the run's curves into `report.html`, one file without scripts that opens anywhere.

    With `png`, it also draws the same charts into `curves.png`. It reads what `JsonLines` has
    written into the directory, so a resumed run draws its whole history. Of a long curve it draws
    the lowest, the highest and the last value of each of at most 132 parts. To compare runs, call
    `diptych compare runs/a runs/b`.

    Event: `RunEvents.SAVED`, so that the report shows the same run as the checkpoint beside it; or,
        with `every`, `EPOCH_COMPLETED`; and `RunEvents.ENDED`. Writes on rank 0 only.
    Cost: a few milliseconds each time, and a few for a thousand records since the last drawing;
        when a run resumes, all its records are read once. `png` adds half a second, and half a
        second for the first import of matplotlib. No synchronisation.

    Args:
        directory: the run directory, to which a `JsonLines` of the trainer writes.
        every: epochs between two drawings, >= 1; None: draw at each checkpoint.
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

    def __attrs_post_init__(self) -> None:
        self._reader = RunReader(self.directory)
        if self.png:
            check_extra("plots", "matplotlib", needed_by="png=True")

    def listen(self, trainer: Trainer) -> None:
        """Draw the trainer's runs; called on rank 0 only."""
        trainer.add_event_handler(Events.STARTED, self._check)
        trainer.add_event_handler(
            Events.EPOCH_COMPLETED(every=self.every) if self.every else RunEvents.SAVED, self._draw
        )
        trainer.add_event_handler(RunEvents.ENDED, self._draw)

    @property
    def destination(self) -> str:
        """The report."""
        return str(self.directory.report)

    @property
    def unwritten(self) -> dict[str, int]:
        """The report, while its last drawing could not be written."""
        return {self.destination: 1} if self.last_error(self.destination) else {}

    def _check(self, trainer: Trainer) -> None:
        self._reader = RunReader(self.directory)  # the files may be cut when a run starts
        written = [sink.path for sink in attached(trainer) if isinstance(sink, JsonLines)]
        if self.directory.metrics not in written:
            raise ValueError(
                f"HistoryPlots needs a JsonLines that writes to {self.directory.metrics}, got "
                f"{', '.join(map(str, written)) or 'none'}. Attach "
                f"JsonLines({str(self.directory)!r})."
            )

    def _draw(self, _: Trainer) -> None:
        if self.directory.metrics.exists():
            with self.tolerated():
                runs = [self._reader.read()]
                write_atomically(self.directory.report, page(runs))
                if self.png:
                    save_charts(drawings(runs), self.directory.curves)


def differing_settings(runs: Sequence[RunHistory]) -> dict[str, list[Any]]:
    """Return the settings in which the runs differ, each with its value in every run.

    If every run has an identity, its values come first: they decide the results. The time of the
    start, the command and the paths of files are left out. A setting that a run lacks is "-".
    """
    identities = [run.identity for run in runs if run.identity is not None]
    if len(identities) < len(runs):
        identities = []
    rows = _differing_identities(identities)
    handlers = [key for one in identities for key in one.values["handlers"]]
    deciding = {key.partition("[")[0] for key in handlers} if identities else None
    for name, row in _differing_rows(runs).items():
        if _is_shown(name, deciding):
            rows.setdefault(name, row)
    return rows


def _differing_rows(runs: Sequence[RunHistory]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = {name: [run.settings.get(name, "-") for run in runs] for name in names}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}


def _is_shown(name: str, deciding: Collection[str] | None) -> bool:
    """Return whether a setting is shown, beside the identities of the runs if they have some.

    Args:
        name: of the setting.
        deciding: the classes of the handlers in the identities; None without identities.
    """
    section, _, rest = name.partition(".")
    if section in ALWAYS_DIFFERENT or name.endswith(PATHS):
        return False
    of_reporter = section == "handlers" and rest.partition(".")[0] not in (deciding or ())
    return deciding is None or of_reporter or name in LENGTHS


def _differing_identities(identities: Sequence[RunIdentity]) -> dict[str, list[Any]]:
    """Return the values in which identities differ from the first one, each in every run."""
    rows: dict[str, list[Any]] = {}
    for number, identity in enumerate(identities[1:], start=1):
        for one in differences(identities[0], identity):
            row = rows.setdefault(one.name, [one.before] * len(identities))
            row[number] = one.now
    return rows


def final_values(runs: Sequence[RunHistory]) -> dict[str, list[str]]:
    """Return the last value of every tag in each run, and its range if it has several values."""
    tags = sorted({tag for run in runs for tag in run.curves})
    return {tag: [_last_and_range(run.curves.get(tag, [])) for run in runs] for tag in tags}


def _last_and_range(curve: Sequence[tuple[int, float]]) -> str:
    if not curve:
        return "-"
    finite = [value for _, value in curve if math.isfinite(value)]
    span = f" ({min(finite):.4g} to {max(finite):.4g})" if len(finite) > 1 else ""
    return f"{curve[-1][1]:.4g}{span}"


def page(runs: Sequence[RunHistory]) -> str:
    """Return the report as HTML: curves and last values.

    Several runs begin with the settings that differ; a single run ends with its settings.
    """
    names = [run.name for run in runs]
    single = len(runs) == 1
    title = names[0] if single else " | ".join(names)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
    ]
    if not single:
        parts += _differences(runs)
    for heading, charts in drawings(runs).items():
        parts += [f'<h2>{escape(heading)}</h2><div class="charts">', *map(svg, charts), "</div>"]
    parts += ["<h2>Last values (lowest to highest)</h2>", _table(names, final_values(runs))]
    if single:
        rows = {name: [value] for name, value in runs[0].settings.items()}
        parts += ["<h2>Settings</h2>", _table(names, rows)]
    return "\n".join([*parts, "</body></html>", ""])


def drawings(runs: Sequence[RunHistory]) -> dict[str, list[ChartDrawing]]:
    """Return headings with their charts: of several tags for one run, of one tag for several."""
    headings = curves_by_question({tag for run in runs for tag in run.curves})
    return {
        heading: _side_by_side(runs, charts)
        if len(runs) > 1
        else [drawing for chart in charts for drawing in _charts_of_tags(runs[0], *chart)]
        for heading, charts in headings.items()
    }


def _side_by_side(
    runs: Sequence[RunHistory], charts: Sequence[tuple[str, list[str]]]
) -> list[ChartDrawing]:
    tags = dict.fromkeys(tag for _, tags in charts for tag in tags)
    # A run keeps its colour even if an earlier run lacks the tag.
    return [draw_chart(tag, {run.name: run.curves.get(tag, []) for run in runs}) for tag in tags]


def _charts_of_tags(run: RunHistory, title: str, tags: Sequence[str]) -> list[ChartDrawing]:
    """Return one chart, or as many as needed for each curve to have its own colour."""
    if title in tags:
        return [draw_chart(title, {title: run.curves[title]})]
    parts = [tags[start : start + len(COLORS)] for start in range(0, len(tags), len(COLORS))]
    return [
        draw_chart(title, {tag: run.curves[tag] for tag in part}, _short_names(part))
        for part in parts
    ]


def _short_names(tags: Sequence[str]) -> list[str]:
    """Return the tags without the parts that all of them share."""
    if len(tags) == 1:
        return list(tags)
    parts = [tag.split("/") for tag in tags]
    shared = set(parts[0]).intersection(*parts)
    return [" ".join(p for p in part if p not in shared) or part[-1] for part in parts]


def _differences(runs: Sequence[RunHistory]) -> list[str]:
    names, different = [run.name for run in runs], differing_settings(runs)
    legend = " ".join(
        f'<span style="color:{color_of(i)}">&#9632; {escape(name)}</span>'
        for i, name in enumerate(names)
    )
    table = _table(names, different) if different else "<p>None.</p>"
    return ["<h2>Settings that differ</h2>", table, f"<p>{legend}</p>"]


def _table(names: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "\n".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td>{escape(str(value))}</td>" for value in values)
        + "</tr>"
        for name, values in rows.items()
    )
    return f"<table><tr><th></th>{head}</tr>\n{body}</table>"
