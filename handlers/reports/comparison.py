"""Comparisons of runs: the settings that differ, and the best and last values of each."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from diptych.engine.state.differences import differences
from diptych.engine.state.run_identity import RunIdentity
from diptych.handlers.argument_checks import Mode, usual_mode
from diptych.handlers.reports.curves import StepAndValue
from diptych.handlers.reports.run_history import RunHistory
from diptych.handlers.sinks.charts import results_of

ALWAYS_DIFFERENT = ("started", "command")
PATHS = (".directory", ".path")
PICK = {"min": min, "max": max}
LENGTHS = ("trainer.max_epochs", "trainer.max_iters", "trainer.epoch_length")


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
    different = {name: row for name, row in rows.items() if any(value != row[0] for value in row)}
    lacking = [
        name.removesuffix(".class")
        for name, row in different.items()
        if name.startswith("handlers.") and name.endswith(".class") and "-" in row
    ]
    return _with_one_row_each(different, lacking)


def _with_one_row_each(
    rows: Mapping[str, list[Any]], handlers: Sequence[str]
) -> dict[str, list[Any]]:
    """Return rows in which each handler that a run lacks has one row, instead of its settings."""
    beginnings = tuple(f"{handler}." for handler in handlers)
    kept = {name: row for name, row in rows.items() if not name.startswith(beginnings)}
    for handler in handlers:
        row = rows[f"{handler}.class"]
        kept[handler] = ["-" if value == "-" else "attached" for value in row]
    return kept


def _is_shown(name: str, deciding: Collection[str] | None) -> bool:
    """Return whether a setting is shown, beside the identities of the runs if they have some."""
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
    return _with_temperatures(rows)


def _with_temperatures(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Put the temperature, which a script sets, before each logit scale, ln(1 / temperature)."""
    found: dict[str, list[Any]] = {}
    for name, row in rows.items():
        owner, _, parameter = name.rpartition(".")
        if parameter == "logit_scale" and name.startswith("initial."):
            is_temperature = owner.endswith("temperature")
            found[owner if is_temperature else f"{owner}.temperature"] = [
                float(f"{math.exp(-value):.6g}") if isinstance(value, float) else value
                for value in row
            ]
        found[name] = row
    return found


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


def best_values(runs: Sequence[RunHistory]) -> dict[str, list[StepAndValue | None]]:
    """Return the best value of each evaluation's tag in each run, with its step.

    The training loss is one of the tags. A value is None if the run has no finite one.
    """
    tags = results_of({tag for run in runs for tag in run.curves})
    return {tag: [_best(run, tag) for run in runs] for tag in tags}


def _best(run: RunHistory, tag: str) -> StepAndValue | None:
    finite = [point for point in run.curves.get(tag, []) if math.isfinite(point[1])]
    return PICK[_mode_of(run, tag)](finite, key=lambda point: point[1]) if finite else None


def _mode_of(run: RunHistory, tag: str) -> Mode:
    """Return whether more is better: as a handler of the run was told, else by the name."""
    for name, value in run.settings.items():
        handler, _, argument = name.rpartition(".")
        mode = run.settings.get(f"{handler}.mode")
        if argument in {"best", "metric"} and value == tag and mode in PICK:
            return cast(Mode, mode)
    return usual_mode(tag)


def best_texts(runs: Sequence[RunHistory]) -> dict[str, list[str]]:
    """Return `best_values` as texts; of several runs that differ, the best has a star."""
    found = {}
    for tag, row in best_values(runs).items():
        values = {point[1] for point in row if point is not None}
        modes = {_mode_of(run, tag) for run in runs if tag in run.curves}
        best = PICK[modes.pop()](values) if len(values) > 1 and len(modes) == 1 else None
        found[tag] = [
            "-"
            if point is None
            else f"{point[1]:.4g} (step {point[0]:,})" + (" *" if point[1] == best else "")
            for point in row
        ]
    return found
