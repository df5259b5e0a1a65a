"""Every exported handler declares whether it communicates, as a run as one of two ranks shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diptych import handlers
from diptych.handlers.evaluation import evaluation
from tests.handlers.observed_collectives import CollectiveObserver
from tests.handlers.test_contract import EXAMPLES, EXPORTED, make_loader, make_trainer

BESIDE = {"WeightAverage": lambda: handlers.Evaluation(make_loader(seed=1))}
"""Handlers whose collectives are called by another one, which is attached too."""


@pytest.fixture(autouse=True)
def _one_loader_for_both_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_check_shards", lambda *_: None)


def observed(*attached: Any) -> CollectiveObserver:
    """Return the collectives of handlers in a run as rank 0 of 2."""
    observer = CollectiveObserver()
    with observer.world_of_two():
        observer.run(make_trainer(), make_loader(), *attached, max_epochs=2)
    return observer


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_a_handler_declares_whether_it_communicates(name: str, tmp_path: Path):
    beside = [BESIDE[name]()] if name in BESIDE else []
    without = observed(*beside)
    found = observed(EXAMPLES[name].build(tmp_path), *([BESIDE[name]()] if beside else []))
    calls, tags = found.called - without.called, found.tags - without.tags
    assert EXPORTED[name].collective == bool(calls or tags), (
        f"{name} was observed to call {sorted(calls)} and to publish {sorted(tags)}"
    )


def test_without_handlers_nothing_is_called_in_one():
    assert observed().called == set()
