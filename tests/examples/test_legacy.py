"""The monolithic trainer and the handlers come to the same weights, bit for bit."""

from __future__ import annotations

import pytest
import torch

from examples.legacy import METRIC, monolithic, with_handlers

pytestmark = pytest.mark.xdist_group("legacy")  # its processes start once, on one worker


@pytest.fixture(scope="module")
def runs(emoji, tmp_path_factory):
    folder = tmp_path_factory.mktemp("legacy")
    runs = [train(emoji[::10], 3, folder) for train in (monolithic, with_handlers)]
    return folder, runs


def test_the_weights_are_equal_bit_for_bit(runs):
    _, ((before, _), (after, _)) = runs
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_histories_are_equal(runs):
    _, ((_, before), (_, after)) = runs
    assert len(after[METRIC]) == 3
    assert after[METRIC] == pytest.approx(before[METRIC], abs=1e-12)
    assert after["train/loss"] == pytest.approx(before["train/loss"], rel=1e-6)


def test_the_best_weights_are_equal(runs):
    folder, ((_, history), _) = runs
    best = 1 + max(range(3), key=lambda epoch: (history[METRIC][epoch], -epoch))
    kept = torch.load(folder / f"checkpoints/checkpoint_epoch_{best}.pt", weights_only=True)
    expected = torch.load(folder / "best.pt", weights_only=True)
    assert all(torch.equal(kept["model"][key], value) for key, value in expected.items())
