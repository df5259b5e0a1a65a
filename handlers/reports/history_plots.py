"""A run, or several beside one another, as one page of HTML that needs nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from ignite.engine import Events

from diptych.engine.checks import whole_number
from diptych.engine.distributed.collectives import rank
from diptych.engine.events import RunEvents
from diptych.engine.state.run_state import attached
from diptych.handlers.reports.curves import COLORS, Drawing, color_of, draw, svg
from diptych.handlers.reports.curves_png import check_can_plot, save_charts
from diptych.handlers.sinks.jsonl import JsonLines, read_records
from diptych.handlers.sinks.tensorboard_layout import curves_by_question

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer

AT_THE_END = (Events.COMPLETED, Events.TERMINATE, Events.INTERRUPT, Events.EXCEPTION_RAISED)
ALWAYS_DIFFERENT = ("started", "command")
STYLE = """
body { font: 14px system-ui, sans-serif; margin: 24px; color: #222; background: #fff }
.charts { display: flex; flex-wrap: wrap; gap: 12px; align-items: start }
svg { width: 360px; font-family: sans-serif }
table { border-collapse: collapse; margin: 12px 0 }
td, th { border: 1px solid #ddd; padding: 3px 8px;
  text-align: left } td + td { font-variant-numeric: tabular-nums } h2 { margin-top: 28px }
"""


def _absolute(path: Path | str) -> Path:
    return Path(path).absolute()  # as JsonLines does: the working directory may change


@attrs.frozen
class RunHistory:
    """What a run's folder tells.

    Attributes:
        name: of the run.
        settings: dotted name to value, from `settings.json`; empty where there is none.
        curves: tag to steps and values.
    """

    name: str
    settings: dict[str, Any]
    curves: dict[str, list[tuple[int, float]]]


@attrs.define(eq=False)
class HistoryPlots:
    """Draws the run's curves into `report.html`: one file without scripts that opens anywhere.

    With `png` the same charts are the picture `curves.png` too. It reads what `JsonLines` writes
    into the folder, so a resumed run draws its whole history.
    `diptych compare runs/a runs/b` compares runs.

    Event: `RunEvents.SAVED`, so that what stands beside a checkpoint tells of the same run; where
        `every` is given, every so many `EPOCH_COMPLETED` instead; and the end of the run. Rank 0
        alone.
    Cost: some milliseconds for a thousand records, each time, and with `png` half a second, of
        which the first import of matplotlib takes as much again; no synchronisation.

    Args:
        directory: the run's folder, to which a `JsonLines` of the trainer writes.
        every: epochs between two drawings, >= 1; None: as often as checkpoints are saved.
        png: whether to draw `curves.png` too. Needs the extra `plots`.

    Raises:
        ValueError: if `every` is below 1; when the run starts, if no `JsonLines` writes there.
        ImportError: if `png` is asked for without the extra.
    """

    directory: Path = attrs.field(converter=_absolute)
    every: int | None = attrs.field(
        default=None,
        validator=attrs.validators.optional(whole_number(of="epochs")),
        kw_only=True,
    )
    png: bool = attrs.field(default=False, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if self.png:
            check_can_plot()

    def attach(self, trainer: Trainer) -> None:
        """Draw the trainer's runs."""
        if rank() == 0:
            trainer.add_event_handler(Events.STARTED, self._check)
            if self.every is None:
                trainer.add_event_handler(RunEvents.SAVED, self._draw)
            else:
                trainer.add_event_handler(Events.EPOCH_COMPLETED(every=self.every), self._draw)
            for event in AT_THE_END:
                trainer.add_event_handler(event, self._draw)

    def _check(self, trainer: Trainer) -> None:
        written = [h.path for h in attached(trainer) if isinstance(h, JsonLines)]
        if self.directory / "metrics.jsonl" not in written:
            raise ValueError(
                f"HistoryPlots must have a JsonLines that writes to {self.directory}, got "
                f"{', '.join(map(str, written)) or 'none'}: attach JsonLines with that folder"
            )

    def _draw(self, *_: object) -> None:
        if (self.directory / "metrics.jsonl").exists():
            runs = [read_run(self.directory)]
            write_page(self.directory / "report.html", page(runs))
            if self.png:
                save_charts(drawings(runs), self.directory / "curves.png")


def write_page(path: Path, text: str) -> None:
    """Write a page in one step: whoever reads it meanwhile sees the one before."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def read_run(directory: Path) -> RunHistory:
    """Return what a run's folder tells.

    Raises:
        FileNotFoundError: naming the folder, if it holds no metrics.jsonl.
    """
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"a run's folder must hold metrics.jsonl, got {directory}, which holds none: give the "
            "folder of one run, such as runs/emoji/2026-01-31_09-30-00Z"
        )
    curves: dict[str, list[tuple[int, float]]] = {}
    measured = path.with_suffix(".measured.jsonl")
    for file in (path, measured):
        for record in read_records(file) if file.is_file() else ():
            for tag, value in record.values.items():
                curves.setdefault(tag, []).append((record.step, value))
    settings = directory / "settings.json"
    known = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
    return RunHistory("/".join(directory.resolve().parts[-2:]), _flat(known), curves)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        items = _named(value)
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= _flat(item, f"{prefix}.{key}" if prefix else key)
    return flat


def _named(values: Sequence[Any]) -> list[tuple[str, Any]]:
    """Return each of a list with its name: handlers by class, in whatever order they stand."""
    items: dict[str, Any] = {}
    for number, value in enumerate(values):
        known = value if isinstance(value, Mapping) and "class" in value else {}
        name = str(known.get("class", number)).rpartition(".")[2]
        name = ".".join([name, *([known["prefix"]] if known.get("prefix") else [])])
        items[f"{name}.{number}" if name in items else name] = value
    return list(items.items())


def differing_settings(runs: Sequence[RunHistory]) -> dict[str, list[Any]]:
    """Return the settings in which the runs differ, each with its value in every run.

    When a run started and by which command says nothing about what it was, nor where its files
    are. A setting that a run lacks is "-".
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
    """Return the last value of every tag, and the extremes where it has several, run by run."""
    tags = sorted({tag for run in runs for tag in run.curves})
    return {tag: [_summary(run.curves.get(tag, [])) for run in runs] for tag in tags}


def _summary(curve: Sequence[tuple[int, float]]) -> str:
    if not curve:
        return "-"
    finite = [value for _, value in curve if math.isfinite(value)]
    span = f" ({min(finite):.4g} to {max(finite):.4g})" if len(finite) > 1 else ""
    return f"{curve[-1][1]:.4g}{span}"


def page(runs: Sequence[RunHistory]) -> str:
    """Return a page of HTML: what differs, curves, the last values, and a single run's settings."""
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


def drawings(runs: Sequence[RunHistory]) -> dict[str, list[Drawing]]:
    """Return heading to charts: those of a run hold several tags, those of several runs one."""
    headings = curves_by_question({tag for run in runs for tag in run.curves})
    return {
        heading: _beside_one_another(runs, charts) if len(runs) > 1 else _of_one(runs[0], charts)
        for heading, charts in headings.items()
    }


def _beside_one_another(
    runs: Sequence[RunHistory], charts: Sequence[tuple[str, list[str]]]
) -> list[Drawing]:
    tags = dict.fromkeys(tag for _, tags in charts for tag in tags)
    # Every run keeps its colour, also where one before it lacks the tag.
    return [draw(tag, {run.name: run.curves.get(tag, []) for run in runs}) for tag in tags]


def _of_one(run: RunHistory, charts: Sequence[tuple[str, list[str]]]) -> list[Drawing]:
    return [drawing for chart in charts for drawing in _charts_of_tags(run, *chart)]


def _charts_of_tags(run: RunHistory, title: str, tags: Sequence[str]) -> list[Drawing]:
    """Return a run's curves in one chart, or in so many that each curve has its own colour."""
    if title in tags:
        return [draw(title, {title: run.curves[title]})]
    parts = [tags[start : start + len(COLORS)] for start in range(0, len(tags), len(COLORS))]
    return [draw(title, {tag: run.curves[tag] for tag in part}, _short(part)) for part in parts]


def _short(tags: Sequence[str]) -> list[str]:
    """Return what tells tags apart: their parts without those that all of them have."""
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
