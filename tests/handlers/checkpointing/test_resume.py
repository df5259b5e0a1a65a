"""The start of a run: the contents of its folder, and changes since."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from ignite.engine import Events
from torch.utils.data import DataLoader

from diptych.engine import CheckpointError, ResumeError, SeededLoader
from diptych.handlers import EarlyStopping, JsonLines
from diptych.handlers.checkpointing.checkpoint_manager import CheckpointManager
from tests.handlers.checkpointing.test_checkpoint_manager import digest, make_loader, make_trainer
from tests.handlers.runs import report_each_epoch


def run(folder, *handlers, epochs: int, stop: int | None = None, **settings):
    """Run with a manager on the folder, up to a stop; return trainer and manager."""
    trainer = make_trainer()
    manager = CheckpointManager(folder, **settings)
    trainer.attach(*handlers, manager)
    if stop is not None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop), trainer.terminate)
    trainer.run(make_loader(), max_epochs=epochs)
    return trainer, manager


def whole(epochs: int) -> str:
    trainer = make_trainer()
    trainer.run(make_loader(), max_epochs=epochs)
    return digest(trainer)


def test_a_run_starts_from_another_runs_path_and_continues_from_its_own_folder(tmp_path):
    _, first = run(tmp_path / "a", epochs=1)
    path = first.get_latest_checkpoint()
    _, own = run(tmp_path / "b", epochs=3, stop=14, every=1, resume=path)
    assert own.get_latest_checkpoint() == tmp_path / "b" / "checkpoint_epoch_3_iteration_14.pt"
    started = []
    again = make_trainer()
    again.add_event_handler(Events.STARTED, lambda: started.append(again.state.iteration))
    again.attach(CheckpointManager(tmp_path / "b", every=1, resume=path))
    again.run(make_loader(), max_epochs=3)
    assert started == [14]
    assert digest(again) == whole(3)


@pytest.mark.parametrize("as_name", [False, True])
def test_a_path_in_the_runs_own_folder_goes_back_to_it_and_drops_later_checkpoints(
    tmp_path, as_name
):
    run(tmp_path, epochs=5, keep=9)
    name = "checkpoint_epoch_2.pt"
    back = name if as_name else tmp_path / name
    _, manager = run(tmp_path, epochs=5, stop=15, every=1, keep=2, resume=back)
    assert manager.get_latest_checkpoint() == tmp_path / "checkpoint_epoch_3_iteration_15.pt"
    resumed, _ = run(tmp_path, epochs=5, every=1, keep=2)
    assert resumed.state.iteration == 30
    assert digest(resumed) == whole(5)


def test_a_relative_folder_stays_where_it_was_when_the_working_directory_changes(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer()
    trainer.attach(CheckpointManager("runs"))
    (tmp_path / "elsewhere").mkdir()
    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: os.chdir("elsewhere"))
    trainer.run(make_loader(), max_epochs=2)
    assert (tmp_path / "runs" / "checkpoint_epoch_2.pt").exists()
    assert not any((tmp_path / "elsewhere").iterdir())


def test_a_run_starts_in_an_empty_folder_with_resume_auto_and_none(tmp_path):
    for resume in ("auto", None):
        trainer, _ = run(tmp_path / str(resume), epochs=1, resume=resume)
        assert trainer.state.iteration == 6


def test_a_checkpoint_without_its_manifest_is_neither_removed_nor_ignored(tmp_path):
    _, manager = run(tmp_path / "a", epochs=1)
    (tmp_path / "b").mkdir()
    copy = tmp_path / "b" / "checkpoint_epoch_1.pt"
    shutil.copy(manager.get_latest_checkpoint(), copy)
    with pytest.raises(CheckpointError, match=f"Copy the manifest too, or use resume='{copy}'"):
        run(tmp_path / "b", epochs=2)
    assert copy.exists()
    resumed, _ = run(tmp_path / "b", epochs=2, resume=copy)
    assert digest(resumed) == whole(2)


def test_a_folder_of_unreadable_checkpoints_is_an_error_and_not_a_new_run(tmp_path):
    run(tmp_path, epochs=2)
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"none of 2 checkpoints .* can be read"):
        run(tmp_path, epochs=2)


def test_another_best_metric_ranks_later_checkpoints(tmp_path):
    trainer = make_trainer()
    report_each_epoch(trainer, 0.9, 0.1, tag="val/first")
    trainer.attach(CheckpointManager(tmp_path, best="val/first", keep=1))
    trainer.run(make_loader(), max_epochs=2)

    resumed = make_trainer()
    report_each_epoch(resumed, 0.9, 0.1, 0.5, 0.6, tag="val/first")
    report_each_epoch(resumed, 0.0, 0.0, 0.7, 0.2, tag="val/second")
    manager = CheckpointManager(tmp_path, best="val/second", keep=1)
    resumed.attach(manager)
    resumed.run(make_loader(), max_epochs=4)
    assert manager.get_best_checkpoint() == tmp_path / "checkpoint_epoch_3.pt"
    assert (tmp_path / "checkpoint_epoch_1.pt").exists()  # the best one by the first metric


def test_a_value_of_an_earlier_iteration_is_not_the_score_of_a_later_one(tmp_path):
    trainer = make_trainer()
    report_each_epoch(trainer, 0.9, tag="val/first")
    trainer.attach(CheckpointManager(tmp_path))
    trainer.run(make_loader(), max_epochs=1)
    resumed = make_trainer()
    report_each_epoch(resumed, 0.9, 0.1, tag="val/first")
    manager = CheckpointManager(tmp_path, every=1, best="val/first", keep=9)
    resumed.attach(manager)
    resumed.run(make_loader(), max_epochs=2)
    assert manager.get_best_checkpoint() == tmp_path / "checkpoint_epoch_2.pt"


def test_a_new_handler_starts_from_its_initial_state_and_a_missing_one_is_logged(tmp_path, caplog):
    run(tmp_path, EarlyStopping(metric="train/loss", patience=9), epochs=1)
    log = JsonLines(tmp_path / "log")
    resumed, _ = run(tmp_path, log, epochs=2)
    assert caplog.text.count("The checkpoint has no state of JsonLines; they start fresh") == 1
    assert caplog.text.count("which are ignored: EarlyStopping[train/loss]") == 1
    steps = [json.loads(line)["step"] for line in log.path.read_text().splitlines()]
    assert steps == [8, 12]
    assert digest(resumed) == whole(2)


def test_which_of_several_handlers_of_a_class_is_which_is_not_guessed(tmp_path):
    run(tmp_path, EarlyStopping(metric="train/loss", patience=9), epochs=1)
    two = [EarlyStopping(metric="train/loss", patience=patience) for patience in (9, 9)]
    with pytest.raises(CheckpointError, match=r"EarlyStopping\[train/loss\] handlers .* 1, got 2"):
        run(tmp_path, *two, epochs=2)


def test_other_versions_and_settings_are_logged(tmp_path, caplog):
    caplog.set_level("INFO")
    _, manager = run(tmp_path, epochs=1)
    path = manager.get_latest_checkpoint()
    state = torch.load(path, weights_only=True)
    state["identity"]["versions"]["torch"] = "1.0"
    state["identity"]["trainer"]["precision"] = "bf16"
    torch.save(state, tmp_path / "changed.pt")
    manager.load_checkpoint(tmp_path / "changed.pt")
    assert f"versions.torch 1.0 -> {torch.__version__}" in caplog.text
    assert "trainer.precision bf16 -> fp32 (changed in the script)" in caplog.text
    assert "microbatch_size" not in caplog.text


def test_with_refuse_a_changed_script_is_an_error_of_the_run_and_nothing_is_loaded(tmp_path):
    run(tmp_path, epochs=1)
    other = make_trainer()
    other.optimizer.param_groups[0]["weight_decay"] = 0.5
    other.attach(CheckpointManager(tmp_path, changes="refuse"), CheckpointManager(tmp_path / "b"))
    before = digest(other)
    with pytest.raises(CheckpointError, match=r"weight_decay 0.01 -> 0.5.*changes=\"apply\""):
        other.run(make_loader(), max_epochs=2)
    assert digest(other) == before
    assert other.state.iteration == 0
    with pytest.raises(ValueError, match="changes must be 'apply' or 'refuse', got 'ignore'"):
        CheckpointManager(tmp_path, changes="ignore")


def longer_loader() -> SeededLoader:
    return SeededLoader([*make_loader().dataset] * 2, 4)


def test_a_loader_of_another_length_is_an_error_inside_an_epoch(tmp_path):
    run(tmp_path, epochs=2, stop=8, every=1)
    other = make_trainer()
    other.attach(CheckpointManager(tmp_path))
    with pytest.raises(ResumeError, match="samples must be 22"):
        other.run(longer_loader(), max_epochs=3)


def test_a_loader_of_another_length_continues_between_two_epochs_and_is_logged(tmp_path, caplog):
    run(tmp_path, epochs=2, every=1)
    other = make_trainer()
    other.attach(CheckpointManager(tmp_path))
    other.run(longer_loader(), max_epochs=3)
    assert other.state.epoch_length == 11
    assert "Epochs have 11 batches from here on; before, 6." in caplog.text


def test_another_micro_batch_continues_with_the_same_samples(tmp_path):
    run(tmp_path, epochs=2, stop=8, every=1)
    seen: dict[int | None, list[float]] = {None: [], 2: []}
    for size, rows in seen.items():
        folder = tmp_path.with_name(f"{tmp_path.name}-{size}")
        shutil.copytree(tmp_path, folder)
        trainer = make_trainer(microbatch_size=size)
        trainer.attach(CheckpointManager(folder))

        @trainer.on(Events.ITERATION_STARTED)
        def look(engine, rows=rows):
            rows.extend(engine.state.batch["image"][:, 0].tolist())

        trainer.run(make_loader(), max_epochs=2)
    assert seen[None] == seen[2]
    assert len(seen[2]) == 14


def test_an_export_that_a_kill_prevented_is_written_when_the_run_resumes(tmp_path):
    from safetensors.torch import load_file

    first, _ = run(tmp_path, epochs=1, export=True)
    (tmp_path / "model.safetensors").unlink()
    run(tmp_path, epochs=1, export=True)
    exported = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(exported[k], v) for k, v in first.model.state_dict().items())


@pytest.mark.parametrize(
    ("epoch_length", "told"),
    [(2, "only where an epoch of 2 iterations ends with a pass of 3 batches"), (3, ""), (6, "")],
)
def test_epochs_that_end_inside_a_pass_are_logged_when_the_run_starts(
    tmp_path, caplog, epoch_length, told
):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path))
    dataset = torch.utils.data.Subset(make_loader().dataset, range(12))
    trainer.run(DataLoader(dataset, batch_size=4), max_epochs=1, epoch_length=epoch_length)
    assert told in caplog.text
    assert bool(told) == ("cannot go to a position" in caplog.text)
