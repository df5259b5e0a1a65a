"""Checkpoints: their contents, resuming, and failures during a save."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from ignite.handlers import EMAHandler
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from diptych.engine import CheckpointError, ResumeError, SeededLoader, Trainer, tasks
from diptych.handlers.checkpointing.checkpoint_manager import CheckpointManager


class Model(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Dropout(0.3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits * self.scale, labels)


class Augmented(TensorDataset):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x, y = super().__getitem__(index)
        return {"image": x + 0.1 * torch.randn(6), "label": y}


def make_loader(seed: int = 0) -> SeededLoader:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(22, 6, generator=generator)
    return SeededLoader(Augmented(x, torch.arange(22) % 4), 4, seed=seed)


def make_trainer(width: int = 4, microbatch_size: int | None = None) -> Trainer:
    torch.manual_seed(1)
    model, loss = Model(width), Loss()
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=0.05)
    return Trainer(
        model,
        loss,
        optimizer,
        task=tasks.classification,
        seed=3,
        device="cpu",
        log_every=4,
        microbatch_size=microbatch_size,
    )


def digest(trainer: Trainer) -> str:
    state = {**trainer.model.state_dict(), **trainer.loss.state_dict()}
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest()


def record_values(trainer: Trainer) -> list[tuple[int, dict[str, float]]]:
    from diptych.engine import MetricsEvents

    records: list[tuple[int, dict[str, float]]] = []
    trainer.add_event_handler(
        MetricsEvents.LOGGED,
        lambda: records.append((trainer.metrics.record.step, trainer.metrics.record.values)),
    )
    return records


class Killed(BaseException):
    """Simulates the end of the process."""


@pytest.mark.parametrize("stop", [1, 3, 6, 7, 11, 12, 17])
def test_a_run_that_is_cut_anywhere_ends_like_the_uninterrupted_run(tmp_path, stop):
    whole = make_trainer()
    EMAHandler(whole.model, momentum=0.1).attach(whole)
    expected = record_values(whole)
    whole.run(make_loader(), max_epochs=3)

    cut = make_trainer()
    EMAHandler(cut.model, momentum=0.1).attach(cut)
    cut.attach(CheckpointManager(tmp_path, every=1))
    first = record_values(cut)

    @cut.on(Events.ITERATION_STARTED(once=stop + 1))
    def kill():
        raise Killed

    with pytest.raises(Killed):
        cut.run(make_loader(), max_epochs=3)

    torch.manual_seed(99)
    resumed = make_trainer()
    ema = EMAHandler(resumed.model, momentum=0.1)
    ema.attach(resumed)
    resumed.attach(CheckpointManager(tmp_path, every=1))
    second = record_values(resumed)
    resumed.run(make_loader(), max_epochs=3)

    assert digest(resumed) == digest(whole)
    assert first + second == expected
    assert resumed.metrics.get_history("train/loss") == whole.metrics.get_history("train/loss")


def test_a_checkpoint_loads_with_weights_only_and_bare_model_keys(tmp_path):
    trainer = make_trainer()
    manager = CheckpointManager(tmp_path)
    trainer.attach(manager)
    trainer.run(make_loader(), max_epochs=1)
    state = torch.load(manager.get_latest_checkpoint(), weights_only=True)
    assert list(state["model"]) == list(Model().state_dict())
    assert state["trainer"]["iteration"] == 6


def test_save_load_and_latest_can_be_called_by_hand(tmp_path):
    trainer = make_trainer()
    manager = CheckpointManager(tmp_path / "mine")
    trainer.attach(manager)
    path = manager.save_checkpoint(epoch=1, metrics={"loss": 0.5})
    before = digest(trainer)
    with torch.no_grad():
        trainer.model.body[0].weight.zero_()
    epoch, metrics = manager.load_checkpoint(str(path))
    assert (epoch, metrics) == (1, {"loss": 0.5})
    assert digest(trainer) == before
    assert path.name == "checkpoint_epoch_1.pt"
    assert manager.get_latest_checkpoint() == path


def test_saving_with_a_manager_that_is_not_attached_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="must be attached"):
        CheckpointManager(tmp_path).save_checkpoint(1, {})


def test_the_best_by_a_metric_and_the_latest_are_kept(tmp_path):
    trainer = make_trainer()
    scores = iter([0.1, 0.9, 0.3, 0.5, 0.2])

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate():
        value = {"val/accuracy": next(scores)}
        trainer.state.metrics.update(value)
        trainer.metrics.report(trainer.state.iteration, value)

    manager = CheckpointManager(tmp_path, best="val/accuracy", keep=2)
    trainer.attach(manager)
    trainer.run(make_loader(), max_epochs=5)
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert names == ["checkpoint_epoch_2.pt", "checkpoint_epoch_4.pt", "checkpoint_epoch_5.pt"]
    assert manager.get_best_checkpoint() == tmp_path / "checkpoint_epoch_2.pt"
    assert manager.get_latest_checkpoint() == tmp_path / "checkpoint_epoch_5.pt"


def test_without_a_metric_the_last_few_are_kept(tmp_path):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path, keep=2))
    trainer.run(make_loader(), max_epochs=4)
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert names == ["checkpoint_epoch_3.pt", "checkpoint_epoch_4.pt"]


@pytest.mark.parametrize("function", [True, False])
def test_a_metric_that_nobody_publishes_is_an_error_that_names_the_published_ones(
    tmp_path, function
):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path, best="val/recal@1"))
    if function:  # it could publish the metric, so that only the end of an epoch tells
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: None)
    with pytest.raises(CheckpointError, match=r"val/recal@1.*train/loss"):
        trainer.run(make_loader(), max_epochs=2)
    assert (tmp_path / "checkpoint_epoch_1.pt").exists() == function
    assert (trainer.state.iteration > 0) == function


def test_a_finished_run_does_nothing_and_more_epochs_continue_it(tmp_path, caplog):
    first = make_trainer()
    first.attach(CheckpointManager(tmp_path))
    first.run(make_loader(), max_epochs=2)
    again = make_trainer()
    again.attach(CheckpointManager(tmp_path))
    again.run(make_loader(), max_epochs=2)
    assert "nothing to do" in caplog.text.lower()
    assert digest(again) == digest(first)
    again.run(make_loader(), max_epochs=3)
    whole = make_trainer()
    whole.run(make_loader(), max_epochs=3)
    assert digest(again) == digest(whole)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one_and_names_it(
    tmp_path, caplog, damage
):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path))
    trainer.run(make_loader(), max_epochs=2)
    path = tmp_path / "checkpoint_epoch_2.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: 100 if damage == "truncated" else None])
    resumed = make_trainer()
    resumed.attach(CheckpointManager(tmp_path))
    resumed.run(make_loader(), max_epochs=3)
    assert "checkpoint_epoch_2.pt" in caplog.text
    whole = make_trainer()
    whole.run(make_loader(), max_epochs=3)
    assert digest(resumed) == digest(whole)


def test_a_checkpoint_of_another_model_names_what_differs(tmp_path):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path))
    trainer.run(make_loader(), max_epochs=1)
    other = make_trainer(width=8)
    other.attach(CheckpointManager(tmp_path))
    with pytest.raises(CheckpointError, match=r"model must match.*body.0.weight \(4, 6\) instead"):
        other.run(make_loader(), max_epochs=2)


def test_another_order_of_the_data_is_refused_inside_an_epoch(tmp_path):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path, every=2))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), trainer.terminate)
    trainer.run(make_loader(), max_epochs=1)
    resumed = make_trainer()
    resumed.attach(CheckpointManager(tmp_path, every=2))
    with pytest.raises(ResumeError, match="seed must be 0"):
        resumed.run(make_loader(seed=1), max_epochs=1)


def test_a_loader_without_positions_is_saved_at_the_end_of_each_epoch_only(tmp_path, caplog):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path, every=2, keep=9))
    loader = DataLoader(make_loader().dataset, batch_size=4)
    trainer.run(loader, max_epochs=2)
    assert "DataLoader cannot go to a position" in caplog.text
    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert names == ["checkpoint_epoch_1.pt", "checkpoint_epoch_2.pt"]


def test_incomplete_files_of_a_killed_save_are_removed(tmp_path):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path))
    trainer.run(make_loader(), max_epochs=1)
    (tmp_path / "checkpoint_epoch_2.pt.unfinished").write_bytes(b"half")
    (tmp_path / "checkpoint_epoch_2.pt").write_bytes(b"not in the manifest yet")
    (tmp_path / "checkpoint_epoch_2.pt.unlisted").touch()
    resumed = make_trainer()
    resumed.attach(CheckpointManager(tmp_path))
    resumed.run(make_loader(), max_epochs=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint_epoch_1.pt",
        "manifest.json",
        "run.lock",
    ]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("failing", [{2}, {3}])
def test_a_full_disk_is_logged_and_leaves_the_earlier_checkpoint_intact(
    tmp_path, monkeypatch, caplog, background, failing
):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path, keep=1, background=background))

    def full(_: int) -> None:
        if any((tmp_path / f"checkpoint_epoch_{n}.pt.unfinished").exists() for n in failing):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    if 3 in failing:  # nothing comes after it that could save the end of the run
        with pytest.raises(CheckpointError, match="No space left"):
            trainer.run(make_loader(), max_epochs=3)
    else:
        trainer.run(make_loader(), max_epochs=3)
        assert "checkpoint_epoch_2.pt could not be written" in caplog.text
    left = "checkpoint_epoch_2.pt" if 3 in failing else "checkpoint_epoch_3.pt"
    assert [p.name for p in tmp_path.glob("*.pt*")] == [left]
    torch.load(tmp_path / left, weights_only=True)


class Holds:
    """A handler whose state is any value."""

    def __init__(self, value: object) -> None:
        self.value = value

    def attach(self, trainer: Trainer) -> None:
        """Listen to nothing."""

    def state_dict(self) -> dict[str, object]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.value = state_dict["value"]


@pytest.mark.parametrize("background", [False, True])
def test_a_state_that_cannot_be_loaded_safely_is_refused_at_the_first_save(tmp_path, background):
    trainer = make_trainer()
    trainer.attach(Holds(len), CheckpointManager(tmp_path, background=background))
    with pytest.raises(CheckpointError, match=r"handlers.Holds.value must consist of tensors"):
        trainer.run(make_loader(), max_epochs=2)
    assert trainer.state.epoch == 1


@pytest.mark.parametrize("background", [False, True])
def test_an_interrupt_during_a_save_reaches_the_caller(tmp_path, monkeypatch, background):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path, background=background))

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(make_loader(), max_epochs=2)


def test_a_checkpoint_saved_again_by_hand_is_at_the_returned_path(tmp_path):
    trainer, manager = make_trainer(), CheckpointManager(tmp_path)
    trainer.attach(manager)
    trainer.run(make_loader(), max_epochs=1)
    for value in (1.0, 2.0, 3.0):
        path = manager.save_checkpoint(1, {"value": value})
        assert path.is_file()
        assert manager.load_checkpoint(path) == (1, {"value": value})
        assert manager.load_checkpoint("checkpoint_epoch_1.pt") == (1, {"value": value})
        assert len(list(tmp_path.glob("*.pt"))) == 1


def test_a_new_run_refuses_a_directory_with_checkpoints(tmp_path):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path))
    trainer.run(make_loader(), max_epochs=1)
    other = make_trainer()
    other.attach(CheckpointManager(tmp_path, resume=None))
    with pytest.raises(CheckpointError, match="must hold no checkpoint"):
        other.run(make_loader(), max_epochs=1)


def test_a_newer_format_asks_for_an_update(tmp_path):
    trainer = make_trainer()
    manager = CheckpointManager(tmp_path)
    trainer.attach(manager)
    path = manager.save_checkpoint(1, {})
    state = torch.load(path, weights_only=True)
    newer = Path(tmp_path / "newer.pt")
    torch.save({**state, "format": 99}, newer)
    with pytest.raises(CheckpointError, match=r"format must be at most .*, got 99"):
        manager.load_checkpoint(newer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"every": 0}, "every must be"), ({"mode": "most"}, "mode"), ({"keep": 0}, "keep")],
)
def test_arguments_out_of_range_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        CheckpointManager(tmp_path, **arguments)


def test_a_function_called_every_few_iterations_has_its_objects_state_saved(tmp_path):
    class Counter:
        count = 0

        def step(self, _: Trainer) -> None:
            self.count += 1

        def state_dict(self) -> dict[str, int]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.count = state["count"]

    counters = []
    for epochs in (1, 2):
        trainer, counter = make_trainer(), Counter()
        counters.append(counter)
        trainer.every(3, counter.step)
        trainer.attach(CheckpointManager(tmp_path))
        trainer.run(make_loader(), max_epochs=epochs)
    assert [counter.count for counter in counters] == [2, 4]
