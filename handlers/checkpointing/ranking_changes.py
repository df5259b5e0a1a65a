"""Log lines about changes that a resumed run makes to the rankings of checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from diptych.handlers.checkpointing.entries import Entry, Ranking
from diptych.handlers.checkpointing.resume import Source


def saved_rankings(states: Mapping[str, Any], kind: str) -> dict[str | None, str | None]:
    """Return the metric and the mode of each manager of a saved run."""
    managers = [s for key, s in states.items() if key.split("[")[0].split("#")[0] == kind]
    return {state["best"]: state.get("mode") for state in managers if "best" in state}


def ranking_changes(
    ranking: Ranking,
    source: Source,
    *,
    saved: Mapping[str | None, str | None],
    others: Collection[str | None],
    start: tuple[Path, Collection[Entry]],
    values: int,
) -> Iterator[str]:
    """Yield the changes of one manager's ranking since the run was saved.

    Args:
        ranking: the ranking now.
        source: the manager's directory, and the checkpoints in it.
        saved: the metric and the mode of each manager of the saved run.
        others: the metrics of all managers now.
        start: the directory of the checkpoint from which the run resumes, and its checkpoints.
        values: how many values of the metric the run has published.
    """
    metric, mode, directory = ranking.metric, ranking.mode, source.store.directory
    if saved and metric not in saved:
        before = ", ".join(sorted(map(repr, saved.keys() - set(others)))) or "of no manager"
        yield f"best is {metric!r} for {directory}, and was {before} when the run was saved"
    elif saved.get(metric) not in {None, mode} and metric is not None:
        yield (
            f"mode is {mode!r} for best={metric!r}, and was {saved[metric]!r} when the run was "
            f"saved: all checkpoints in {directory} are ranked by the new one"
        )
    if metric is None or not values or ranking.ranked(source.entries):
        return
    yield _new_ranking(ranking, directory, start)


def _new_ranking(ranking: Ranking, directory: Path, start: tuple[Path, Collection[Entry]]) -> str:
    folder, entries = start
    begins = f"A new ranking by {ranking.metric} starts in {directory}"
    best = ranking.ranked(entries) if folder != directory else []
    if not best:
        return f"{begins}: no checkpoint of the values so far is there"
    return (
        f"{begins}: the best checkpoint so far, with {best[0].score:g}, is "
        f"{folder / best[0].file}, and does not take part"
    )
