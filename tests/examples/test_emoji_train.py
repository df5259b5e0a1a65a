"""The emoji example trains, says what it found, and goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

from diptych.engine import Evaluator
from diptych.handlers import RetrievalRecall
from examples.emoji import train
from examples.emoji.data import TrainingPairs, unseen_drawings, unseen_emoji
from examples.emoji.model import TwoTowers
from examples.emoji.results import recall_of, results_table
from examples.emoji.train import one_side


@pytest.fixture
def small(monkeypatch, tmp_path, emoji):
    """The example on 156 emoji, in a folder of its own; call it with flags."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "read_emoji", lambda: emoji[::12])

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["train", "--batch-size", "32", *flags])
        train.main()

    return run


def weights(run_dir):
    return torch.load(run_dir / "checkpoints/checkpoint_epoch_3.pt", weights_only=True)["model"]


def test_two_epochs_end_with_a_table_the_folder_and_the_tensorboard_line(small, tmp_path, capsys):
    small("--epochs", "2")
    printed = capsys.readouterr()
    lines = printed.out.strip().splitlines()
    (run_dir,) = (tmp_path / "runs" / "emoji").iterdir()
    command, *arguments = lines[-1].split()
    assert shutil.which(command)
    assert arguments == ["--logdir", "runs"]
    assert lines[-2] == f"For the curves, run this and open {train.OVERVIEW}:"
    report = run_dir.relative_to(tmp_path) / "report.html"
    assert printed.err.splitlines()[-1] == f"report  {report}"
    assert (run_dir / "report.html").exists()
    table = [line for line in lines if line.startswith("unseen")]
    assert [line.split("  ")[0] for line in table] == [
        "unseen drawing, image to text",
        "unseen drawing, text to image",
        "unseen emoji, image to text",
        "unseen emoji, text to image",
    ]
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert records
    assert (run_dir / "settings.json").exists()


def test_a_run_that_failed_and_resumed_ends_with_the_weights_of_one_that_did_not(
    small, tmp_path, monkeypatch
):
    read = TrainingPairs.__getitem__
    left = 350  # samples: into the second of three epochs

    def read_until_it_fails(pairs, index):
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError("the disk is gone")
        return read(pairs, index)

    small("--epochs", "3", "--run-dir", "whole")
    monkeypatch.setattr(TrainingPairs, "__getitem__", read_until_it_fails)
    with pytest.raises(OSError, match="the disk is gone"):
        small("--epochs", "3", "--run-dir", "failed")
    assert not (tmp_path / "failed/checkpoints/checkpoint_epoch_3.pt").exists()
    small("--epochs", "3", "--run-dir", "failed", "--resume")

    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "failed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("loss", train.LOSSES)
def test_every_loss_that_the_flag_offers_trains(small, loss):
    small("--epochs", "1", "--loss", loss)


def test_micro_batches_train(small):
    small("--epochs", "1", "--microbatch-size", "12")


def test_resuming_without_a_run_says_what_to_do(small):
    with pytest.raises(SystemExit, match="--resume needs a run in runs/emoji, got none"):
        small("--resume")


def test_the_table_shows_each_value_beside_its_chance(emoji):
    splits = {"unseen_drawing": unseen_drawings(emoji), "unseen_emoji": unseen_emoji(emoji)}
    metric = RetrievalRecall(k=(1, 5, 10))
    evaluator = Evaluator(TwoTowers(), task=one_side, metrics=[metric], device="cpu")
    results = recall_of(evaluator, metric, splits)
    results["unseen_emoji"][0]["text_to_image/recall@5"] = 0.5
    lines = results_table(results).splitlines()
    assert lines[0].split() == ["R@1", "chance", "R@5", "chance", "R@10", "chance"]
    chances = [line.split()[-6:][1::2] for line in lines[1:]]
    assert chances[0] == [f"{k / 1871:.2%}" for k in (1, 5, 10)]
    assert chances[1] == [f"{k / 372:.2%}" for k in (1, 5, 10)]
    assert chances[2] == [f"{k / 190:.2%}" for k in (1, 5, 10)]
    assert chances[3][0] == f"{2 / 380:.2%}"
    assert lines[4].split()[-4] == "50.0%"
