"""Each rule fires on the values of its problem, and on no others."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from diptych.engine.handler import Finding
from diptych.engine.metrics.metrics_collector import Record
from diptych.handlers.health.rules import RULES, History, names_between

HEALTHY = {
    "health/image/spread": 0.97,
    "health/text/spread": 0.99,
    "health/image/dead_dimensions": 0.0,
    "health/text/dead_dimensions": 0.0,
    "health/image/rankme": 105.0,
    "health/text/rankme": 107.0,
    "health/image/rank_share": 0.41,
    "health/text/rank_share": 0.42,
    "health/auroc": 0.98,
    "health/margin": 0.5,
    "health/positive_similarity": 0.5,
    "health/loss_over_chance": 0.3,
    "health/duplicates": 0.01,
    "health/temperature_position": 0.6,
    "health/encode_image/moving": 1.0,
    "health/encode_text/moving": 1.0,
}
CHANCE = {"health/auroc": 0.5, "health/margin": 0.0, "health/positive_similarity": 0.0}
COLLAPSED = {"health/image/spread": 0.02, "health/image/rank_share": 0.01}
STILL = {"health/encode_image/moving": 0.0}


def history(
    changed: Mapping[str, float],
    *,
    first: Mapping[str, float] | None = None,
    peak: float | None = None,
    **more: object,
) -> History:
    records = [Record(step, {**HEALTHY, **changed}) for step in (300, 350, 400)]
    peaks = {**HEALTHY, **changed}
    if peak is not None:
        peaks["health/auroc"] = peak
    start = Record(50, {**HEALTHY, **(first or {})})
    return History(records=records, first=start, peaks=peaks, **more)


def fired(past: History) -> list[str]:
    return [rule.name for rule in RULES if rule.judge(past) is not None]


def test_a_healthy_history_fires_nothing():
    assert fired(history({})) == []


@pytest.mark.parametrize(
    ("expected", "changed", "more"),
    [
        (["collapsed"], COLLAPSED, {}),
        (["partly collapsed"], {"health/image/rank_share": 0.03}, {}),
        (["partly collapsed"], {"health/text/dead_dimensions": 0.7}, {}),
        (["captions shuffled"], CHANCE, {}),
        # A consequence is not reported again.
        (["captions shuffled"], {**CHANCE, **COLLAPSED}, {}),
        (["captions shuffled"], {}, {"held_out": {"val": [0.51, 0.49, 0.5]}}),
        (["collapsed", "stuck at chance"], {**CHANCE, **COLLAPSED}, {"peak": 0.9}),
        (["collapsed", "stuck at chance"], {**CHANCE, **COLLAPSED}, {"first": COLLAPSED}),
        (["stuck at chance"], CHANCE, {"peak": 0.9}),
        (["stuck at chance", "frozen tower"], {**CHANCE, **STILL}, {}),
        (["frozen tower"], STILL, {}),
        (["temperature saturated"], {"health/temperature_position": 0.999}, {}),
        (["temperature saturated"], {"health/temperature_position": 0.001}, {}),
        (["temperature saturated"], {"health/clip.temperature/temperature_position": 1.0}, {}),
        (["batch full of false negatives"], {"health/duplicates": 0.5}, {}),
    ],
)
def test_a_rule_fires_on_the_values_of_its_problem(expected, changed, more):
    assert fired(history(changed, **more)) == expected


@pytest.mark.parametrize(
    ("changed", "more"),
    [
        ({"health/auroc": 0.7}, {}),
        (STILL, {"frozen": frozenset({"encode_image"})}),  # on purpose
        (STILL, {"rate": 0.001}),  # the learning rate has gone out
        ({}, {"held_out": {"val": [0.51, 0.7, 0.5]}}),
        ({"health/auroc": 0.7}, {"held_out": {"val": [0.5, 0.5, 0.5]}}),
        ({"health/image/spread": float("nan"), "health/auroc": float("nan")}, {}),
    ],
)
def test_values_without_a_problem_fire_nothing(changed, more):
    assert fired(history(changed, **more)) == []


@pytest.mark.parametrize("tag", [*CHANCE, *COLLAPSED, *STILL, "health/duplicates"])
def test_one_record_among_several_fires_nothing(tag):
    past = history({})
    bad = 1.0 if tag == "health/duplicates" else 0.0
    records = [*past.records[:-1], Record(400, {**HEALTHY, tag: bad})]
    assert fired(History(records=records, first=past.first, peaks=past.peaks)) == []


def test_features_of_one_side_are_judged_only_for_collapse():
    values = {tag: v for tag, v in HEALTHY.items() if tag.startswith("health/image/")}
    records = [Record(step, {**values, **COLLAPSED}) for step in (1, 2, 3)]
    past = History(records=records, first=records[0], peaks=values)
    assert fired(past) == ["collapsed"]


def test_evidence_holds_the_numbers():
    past = history({**CHANCE, **STILL}, peak=0.91)
    found = {rule.name: rule.judge(past) for rule in RULES}
    assert "AUROC 0.50" in found["stuck at chance"]
    assert "encode_image not changing" in found["stuck at chance"]
    assert "AUROC down from 0.91" in found["stuck at chance"]
    assert found["frozen tower"] == "no weight of encode_image has changed since iteration 300"
    finding = Finding("frozen tower", 400, found["frozen tower"], "Thaw it.")
    assert str(finding) == (
        "frozen tower at iteration 400: no weight of encode_image has changed since iteration 300. "
        "Thaw it."
    )


def test_every_rule_has_a_unique_name_and_a_remedy():
    assert len({rule.name for rule in RULES}) == len(RULES) == 7
    assert all(rule.remedy.endswith(".") for rule in RULES)
    named = {name for rule in RULES for name in rule.unless}
    assert named <= {rule.name for rule in RULES}


def test_names_are_the_middle_parts_of_tags():
    values = {"health/image/spread": 1.0, "health/text/spread": 1.0, "health/auroc": 1.0}
    assert names_between("health/", "/spread", values) == ["image", "text"]
