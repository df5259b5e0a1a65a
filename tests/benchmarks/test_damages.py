"""The script that damages the files of a run: a small version, and its own verdicts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks import damages, full_disk
from diptych.engine import CheckpointError


def check(kind: str, count: int) -> None:
    found, bad = damages.tries(kind, count, seed=1)
    assert bad == []
    assert found.total() == count
    outcomes = {outcome for _, outcome in found}
    assert outcomes == {"reported", "harmless"}


def test_no_damage_to_the_files_of_a_run_is_silent():
    check("whole", 16)


def test_no_damage_to_what_reports_and_replays_read_is_silent():
    check("read", 40)


def test_a_disk_that_is_full_for_a_while_changes_neither_weights_nor_metrics():
    same, words = full_disk.outcome()
    assert same, words
    assert words == (
        "full disk from iteration 7 to 21: 36 of 36 iterations, the same weights, the same metrics"
    )


@pytest.mark.slow
def test_no_damage_to_the_shards_of_a_run_is_silent():
    check("sharded", 60)


@pytest.mark.parametrize("damage", damages.DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damage_changes_the_content(damage):
    content = b"".join(b"line %d of a text\n" % number for number in range(400))
    draw = random.Random(1)
    changed = [damage(content, draw, b"other") for _ in range(20)]
    assert sum(other != content for other in changed) >= 18
    for _ in range(20):
        assert isinstance(damage(b"", draw, b"other"), bytes)


WHOLE = damages.Result("a", {"metrics.jsonl": "b"}, [], None)


@pytest.mark.parametrize(
    ("result", "outcome"),
    [
        (WHOLE, "harmless"),
        (WHOLE._replace(messages=["/x/checkpoint_1.pt is damaged"]), "reported"),
        (WHOLE._replace(messages=["something is damaged"]), "harmless"),
        (WHOLE._replace(weights="c"), "silent"),
        (WHOLE._replace(files={"metrics.jsonl": "c"}), "silent"),
        (WHOLE._replace(weights="c", messages=["checkpoint_1.pt"]), "reported"),
        (WHOLE._replace(error=CheckpointError("checkpoint_1.pt is damaged")), "reported"),
        (WHOLE._replace(error=CheckpointError("it is damaged")), "unnamed"),
        (WHOLE._replace(error=KeyError("checkpoint_1.pt")), "unnamed"),
    ],
)
def test_a_damage_is_silent_if_the_run_ends_otherwise_and_names_no_file(result, outcome):
    assert damages.judge(result, WHOLE, Path("/x/checkpoint_1.pt")) == outcome
