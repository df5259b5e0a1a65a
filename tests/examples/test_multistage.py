"""The multistage example trains by both of its presets, and takes pretrained towers."""

from __future__ import annotations

import sys

import pytest
import torch

from examples import multistage
from examples.emoji.data import TrainingPairs, collate
from examples.emoji.fused import FusedTowers, with_second_view
from examples.emoji.model import TwoTowers


@pytest.fixture
def small(monkeypatch, tmp_path, emoji):
    """The example on a few emoji, in a folder of its own; call it with flags."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(multistage, "read_emoji", lambda: emoji[::4])

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["multistage", *flags])
        multistage.main()

    return run


def test_from_scratch_has_seven_stages_and_ends_with_a_table(small, capsys):
    small("--steps", "7")
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if line[:1].isdigit()]
    assert [line[:2] for line in heads] == [f"{number}." for number in range(1, 8)]
    assert heads[0].startswith("1. images alone: 1 step; trains encode_image:")
    assert sum(line.startswith("unseen") for line in lines) == 4


def test_pretrained_has_three_stages_and_begins_with_the_towers(
    small, capsys, tmp_path, monkeypatch
):
    towers = TwoTowers()
    torch.save({"model": towers.state_dict()}, tmp_path / "towers.pt")
    loaded = []
    load = FusedTowers.load_state_dict
    monkeypatch.setattr(
        FusedTowers,
        "load_state_dict",
        lambda self, state: loaded.append(state) or load(self, state),
    )
    small("--preset", "pretrained", "--steps", "3", "--weights", "towers.pt")
    lines = capsys.readouterr().out.splitlines()
    heads = [line.partition(":")[0] for line in lines if line[:1].isdigit()]
    assert heads == ["1. projections", "2. fusion", "3. everything, hard negatives"]
    assert torch.equal(loaded[0]["encode_image.stem.weight"], towers.encode_image.stem.weight)
    assert set(loaded[0]) == set(FusedTowers().state_dict())


def test_the_second_view_mirrors_the_draws_of_the_first(emoji):
    pairs = TrainingPairs(emoji[::50])
    samples = [pairs[index] for index in range(6)]
    batch = with_second_view(samples)
    mirrored = [{**sample, "draws": 1 - sample["draws"]} for sample in samples]
    assert torch.equal(batch["second"], collate(mirrored)["image"])
    assert not torch.equal(batch["second"], batch["image"])
    middle = [{**sample, "draws": torch.full_like(sample["draws"], 0.5)} for sample in samples]
    batch = with_second_view(middle)
    assert torch.equal(batch["second"], batch["image"])


def test_the_fusion_begins_by_changing_nothing():
    model = FusedTowers(8)
    features = torch.randn(4, 8)
    assert torch.equal(model.fusion(features), torch.zeros(4, 8))
