"""The page of HTML with the results, findings and curves of one run, or of several side by side."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import attrs
from torch import Tensor

from diptych.engine.handler import Finding
from diptych.handlers.pictures.drawing import QueryResults, jpeg
from diptych.handlers.reports.comparison import (
    best_texts,
    best_values,
    differing_settings,
    final_values,
)
from diptych.handlers.reports.curves import COLORS, ChartDrawing, draw_chart, svg
from diptych.handlers.reports.run_history import RunHistory
from diptych.handlers.sinks.charts import REST, curves_by_question

LIGHTER = ("#8c9eff", "#ffab66", "#7bd389", "#d69cf0", "#4dd0e1", "#ff8a80", "#c9a798", "#a9bcc6")
"""The colours of the curves on a dark page."""
PARTS = ("model", "loss")
PAUSES, WITH_BREAK = re.compile(r"([/.])"), r"\1<wbr>"
"""Where the name of a value may break on a narrow page."""
THUMBNAIL = 64
MOST_QUERIES = 8
"""Queries of a direction that the gallery shows."""


def _variables(colors: Iterable[str]) -> str:
    return ";".join(f"--c{number}:{color}" for number, color in enumerate(colors))


STYLE = f"""
:root {{ color-scheme: light dark; --ink:#1f2328; --paper:#fff; --soft:#59636e; --line:#d8dee4;
  --axis:#8b949e; --grid:#e8ebee; --good:#1a7f37; --warn:#9a6700; {_variables(COLORS)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink:#e6edf3; --paper:#0d1117; --soft:#9198a1;
  --line:#30363d; --axis:#7d8590; --grid:#22272e; --good:#56d364; --warn:#e3b341;
  {_variables(LIGHTER)} }} }}
* {{ box-sizing: border-box }}
body {{ font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1240px; margin: 0 auto; padding: 16px }}
h1 {{ font-size: 1.5em; overflow-wrap: anywhere; margin: .3em 0 }}
h2 {{ font-size: 1.15em; margin: 1.8em 0 .5em }} h3 {{ font-size: 1em; margin: 1em 0 .3em }}
.soft {{ color: var(--soft) }} .good {{ color: var(--good) }} .warn {{ color: var(--warn) }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr));
  gap: 16px; align-items: start }}
svg {{ width: 100%; font-family: system-ui, sans-serif }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse }}
td, th {{ border-bottom: 1px solid var(--line); padding: 4px 12px 4px 0; text-align: left;
  vertical-align: top }}
td + td {{ overflow-wrap: anywhere; min-width: 5em }}
.numbers td + td {{ white-space: nowrap; font-variant-numeric: tabular-nums; min-width: 0 }}
ul {{ padding-left: 1.2em }} summary {{ cursor: pointer; margin: 1.8em 0 .5em; font-weight: 600 }}
img {{ width: 48px; height: 48px; border: 2px solid var(--line); background: #fff; display: block }}
.match {{ border-color: var(--good) }}
.query {{ display: flex; flex-wrap: wrap; gap: 8px; align-items: center;
  border-bottom: 1px solid var(--line); padding: 6px 0; overflow-wrap: anywhere }}
.query ol {{ margin: 0; padding-left: 1.4em; flex: 1 1 220px }} .query b {{ flex: 1 1 160px }}
@media (max-width: 480px) {{ body {{ font-size: 13.5px; padding: 12px }}
  .numbers td, .numbers th {{ padding-right: 7px }}
  .query b {{ flex-basis: 100% }} }}
"""


@attrs.frozen(kw_only=True)
class RunNotes:
    """What a report says of a run beside its curves and settings.

    Attributes:
        outcome: how the run ended, in a word; "running" before.
        place: the epoch and step up to which the report goes, in words.
        findings: what `RepresentationHealth` and others have found.
        unjudged: why the rules of health have not judged the run; empty if they have.
        chance: tag to the value of random features.
        galleries: heading to the queries of a direction, with their results.
    """

    outcome: str
    place: str
    findings: Sequence[Finding] = ()
    unjudged: str = ""
    chance: Mapping[str, float] = attrs.field(factory=dict)
    galleries: Mapping[str, Sequence[QueryResults]] = attrs.field(factory=dict)


def page(runs: Sequence[RunHistory], notes: RunNotes | None = None) -> str:
    """Return the report as HTML, in one file without scripts.

    Several runs begin with the settings that differ and the best values. A single run begins with
    its results, its findings and its starts, and ends with its settings.
    """
    names = [run.name for run in runs]
    title = " | ".join(names)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
    ]
    parts += _head(runs[0], notes) if len(runs) == 1 else _differences(runs)
    charts = {
        heading: "\n".join(['<div class="charts">', *map(svg, of_heading), "</div>"])
        for heading, of_heading in drawings(runs).items()
    }
    rest = charts.pop(REST, "")
    parts += [f"<h2>{escape(heading)}</h2>{content}" for heading, content in charts.items()]
    parts += _galleries(notes.galleries) if notes else []
    parts += [_fold(REST, rest)] if rest else []
    parts.append(
        _fold("Last values (lowest to highest)", _table(names, final_values(runs), "numbers"))
    )
    if len(runs) == 1:
        settings = {name: [value] for name, value in runs[0].settings.items()}
        parts.append(_fold("Settings", _table(["value"], settings)))
    text = "\n".join([*parts, "</body></html>", ""])
    return text.encode("utf-8", "replace").decode()  # captions may hold what no file can


def _head(run: RunHistory, notes: RunNotes | None) -> list[str]:
    """Return a single run's results, findings and starts."""
    settings = run.settings
    facts = [f"{notes.outcome}, {notes.place}" if notes else ""]
    for of in PARTS:
        name = str(settings.get(f"{of}.class", "")).rpartition(".")[2]
        size = settings.get(f"{of}.parameters")
        count = f", {size:,} parameter{'s'[: size != 1]}" if size and isinstance(size, int) else ""
        facts.append(name + count)
    parts = [f'<p class="soft">{escape(" | ".join(filter(None, facts)))}</p>']
    parts += ["<h2>Results</h2>", _results(run, notes.chance if notes else {})]
    if notes:
        parts += ["<h2>Findings</h2>", *_findings(notes)]
    if run.starts:
        parts += ["<h2>Starts and interruptions</h2>", _list(map(_start, run.starts))]
    return parts


def _findings(notes: RunNotes) -> list[str]:
    """Return what was found; or that nothing was, if the rules of health have judged the run."""
    items = [
        f'<b class="warn">{escape(one.rule)}</b>, step {one.step:,}: {escape(one.evidence)}. '
        f"{escape(one.remedy)}"
        for one in notes.findings
    ]
    found = [_list(items)] if items else []
    if notes.unjudged:
        return [*found, f'<p class="soft">{escape(notes.unjudged)}</p>']
    return found or ['<p class="good">No rule has found a problem.</p>']


def _results(run: RunHistory, chance: Mapping[str, float]) -> str:
    rows = {}
    for tag, (best,) in best_values([run]).items():
        step, value = best or ("-", math.nan)
        row = [f"{value:.4g}", str(step), f"{run.curves[tag][-1][1]:.4g}"]
        rows[tag] = [*row, f"{chance[tag]:.2g}" if tag in chance else ""]
    head = ["best", "at step", "last", "chance"]
    if not chance:
        head, rows = head[:-1], {tag: row[:-1] for tag, row in rows.items()}
    return _table(head, rows, "numbers")


def _start(start: Mapping[str, Any]) -> str:
    """Return a start of the run as an item of a list, with what had changed since the last one."""
    step, epoch = start.get("iteration"), start.get("epoch")
    how = f"resumed after step {step}, in epoch {epoch}" if step else "started"
    changes = start.get("changes")
    lines = [escape(str(line)) for line in changes] if isinstance(changes, list) else []
    return escape(f"{start.get('started')}: {how}") + (_list(lines) if lines else "")


def _galleries(galleries: Mapping[str, Sequence[QueryResults]]) -> list[str]:
    parts = ["<h2>Pairs: queries and their best results, matches in green</h2>"]
    for heading, rows in galleries.items():
        parts += [f"<h3>{escape(heading)}</h3>", *map(_query, rows[:MOST_QUERIES])]
    return parts if galleries else []


def _query(row: QueryResults) -> str:
    found = "no match" if row.rank is None else f"rank {row.rank}"
    head = _content(row.query, "b") + f'<span class="soft">{found}</span>'
    in_text = row.results and isinstance(row.results[0].content, str)
    items = [
        _content(one.content, "li" if in_text else "span", match=one.matches) for one in row.results
    ]
    body = f"<ol>{''.join(items)}</ol>" if in_text else "".join(items)
    return f'<div class="query">{head}{body}</div>'


def _content(content: Tensor | str, element: str, *, match: bool = False) -> str:
    if isinstance(content, str):
        style = ' class="good"' if match else ""
        return f'<{element}{style} dir="auto">{escape(content)}</{element}>'
    data = base64.b64encode(jpeg(content, THUMBNAIL)).decode()
    style = ' class="match"' if match else ""
    return f'<img{style} src="data:image/jpeg;base64,{data}" alt="{"match" if match else ""}">'


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _fold(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _differences(runs: Sequence[RunHistory]) -> list[str]:
    """Return what differs between runs, and their best values."""
    names, different = [run.name for run in runs], differing_settings(runs)
    legend = " ".join(
        f'<span style="color:var(--c{i % len(COLORS)})">&#9632; {escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return [
        f"<p>{legend}</p><h2>What differs</h2>",
        _table(names, different) if different else "<p>Nothing that decides the results.</p>",
        "<h2>Best values</h2>",
        _table(names, best_texts(runs), "numbers"),
    ]


def _table(names: Sequence[str], rows: Mapping[str, Sequence[Any]], style: str = "") -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *names))
    body = "\n".join(
        f"<tr><td>{PAUSES.sub(WITH_BREAK, escape(name))}</td>"
        + "".join(f"<td>{escape(str(value))}</td>" for value in values)
        + "</tr>"
        for name, values in rows.items()
    )
    return f'<div class="wide"><table class="{style}"><tr>{head}</tr>\n{body}</table></div>'


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
