"""Reports: a page of HTML with the curves of one run, or of several side by side."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import attrs
from ignite.engine import Events

from diptych.engine.checks import whole_number
from diptych.engine.distributed.collectives import rank
from diptych.engine.events import RunEvents
from diptych.engine.handler import Handler
from diptych.engine.state.handler_states import attached
from diptych.handlers.extras import check_extra
from diptych.handlers.files import write_atomically
from diptych.handlers.reports.curves import COLORS, ChartDrawing, color_of, draw_chart, svg
from diptych.handlers.reports.curves_png import save_charts
from diptych.handlers.run_directory import RunDirectory
from diptych.handlers.sinks.charts import curves_by_question
from diptych.handlers.sinks.jsonl import JsonLines, read_records

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer

ALWAYS_DIFFERENT = ("started", "command")
STYLE = """
body { font: 14px system-ui, sans-serif; margin: 24px; color: #222; background: #fff }
.charts { display: flex; flex-wrap: wrap; gap: 12px; align-items: start }
svg { width: 360px; font-family: sans-serif }
table { border-collapse: collapse; margin: 12px 0 }
td, th { border: 1px solid #ddd; padding: 3px 8px;
  text-align: left } td + td { font-variant-numeric: tabular-nums } h2 { margin-top: 28px }
"""


@attrs.frozen
class RunHistory:
    """The settings and curves of a run, read from its directory.

    Attributes:
        name: of the run.
        settings: dotted name to value, from `settings.json`; empty if there is none.
        curves: tag to steps and values.
    """

    name: str
    settings: dict[str, Any]
    curves: dict[str, list[tuple[int, float]]]


@attrs.define(eq=False)
class HistoryPlots(Handler):
    """Draws the run's curves into `report.html`, one file without scripts that opens anywhere.

    With `png`, it also draws the same charts into `curves.png`. It reads what `JsonLines` has
    written into the directory, so a resumed run draws its whole history. To compare runs, call
    `diptych compare runs/a runs/b`.

    Event: `RunEvents.SAVED`, so that the report shows the same run as the checkpoint beside it; or,
        with `every`, `EPOCH_COMPLETED`; and `RunEvents.ENDED`. Writes on rank 0 only.
    Cost: a few milliseconds for a thousand records, each time. `png` adds half a second, and half a
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

    def __attrs_post_init__(self) -> None:
        if self.png:
            check_extra("plots", "matplotlib", needed_by="png=True")

    def attach(self, trainer: Trainer) -> None:
        """Draw the trainer's runs."""
        if rank() == 0:
            trainer.add_event_handler(Events.STARTED, self._check)
            trainer.add_event_handler(
                Events.EPOCH_COMPLETED(every=self.every) if self.every else RunEvents.SAVED,
                self._draw,
            )
            trainer.add_event_handler(RunEvents.ENDED, self._draw)

    def _check(self, trainer: Trainer) -> None:
        written = [sink.path for sink in attached(trainer) if isinstance(sink, JsonLines)]
        if self.directory.metrics not in written:
            raise ValueError(
                f"HistoryPlots needs a JsonLines that writes to {self.directory.metrics}, got "
                f"{', '.join(map(str, written)) or 'none'}. Attach "
                f"JsonLines({str(self.directory)!r})."
            )

    def _draw(self, _: Trainer) -> None:
        if self.directory.metrics.exists():
            runs = [read_run(self.directory)]
            write_atomically(self.directory.report, page(runs))
            if self.png:
                save_charts(drawings(runs), self.directory.curves)


def read_run(directory: str | os.PathLike[str]) -> RunHistory:
    """Read a run from its directory.

    Raises:
        FileNotFoundError: if the directory holds no metrics.jsonl.
    """
    run = RunDirectory(directory)
    if not run.metrics.is_file():
        raise FileNotFoundError(
            f"the run directory {directory} must hold {run.metrics.name}, got none. Pass the "
            "directory of one run, such as runs/emoji/2026-01-31_09-30-00Z."
        )
    curves: dict[str, list[tuple[int, float]]] = {}
    for file in (run.metrics, run.measured):
        for record in read_records(file) if file.is_file() else ():
            for tag, value in record.values.items():
                curves.setdefault(tag, []).append((record.step, value))
    settings = json.loads(run.settings.read_text("utf-8")) if run.settings.is_file() else {}
    return RunHistory(run.name, _flat(settings), curves)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        items = _named_items(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return flat


def _named_items(values: Sequence[Any]) -> list[tuple[str, Any]]:
    """Return the items of a list with names: an object's class, which is the same in any order."""
    items: dict[str, Any] = {}
    for number, value in enumerate(values):
        known = value if isinstance(value, Mapping) and "class" in value else {}
        name = str(known.get("class", number)).rpartition(".")[2]
        name = ".".join([name, *([known["prefix"]] if known.get("prefix") else [])])
        items[f"{name}.{number}" if name in items else name] = value
    return list(items.items())


def differing_settings(runs: Sequence[RunHistory]) -> dict[str, list[Any]]:
    """Return the settings in which the runs differ, each with its value in every run.

    The time of the start, the command and the paths of files are left out. A setting that a run
    lacks is "-".
    """
    paths = (".directory", ".path")
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {
        name: [run.settings.get(name, "-") for run in runs]
        for name in names
        if name.partition(".")[0] not in ALWAYS_DIFFERENT and not name.endswith(paths)
    }
    return {name: row for name, row in values.items() if any(item != row[0] for item in row)}


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
