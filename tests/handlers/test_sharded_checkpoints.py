"""Checkpoints of a sharded model: any number of ranks resumes the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from diptych.engine import CheckpointError
from diptych.engine.distributed.dtensor import full_tensor
from diptych.handlers import CheckpointManager, GradientClipping, WeightAverage
from diptych.handlers.checkpointing import sharded_tensors
from tests.engine import sharded
from tests.engine.sharded import make_trainer, weights_of

ALL = 6
"""Iterations of the whole run, two epochs; it is interrupted after four, inside the second."""


def trained(
    shard: bool, folder: Path | None, iterations: int = ALL, **options: Any
) -> dict[str, Tensor]:
    """Return the final tensors of a run, with or without checkpoints."""
    trainer, average = make_trainer(shard, microbatch_size=3), WeightAverage(decay=0.9)
    trainer.attach(GradientClipping(max_norm=0.5), average)
    if folder is not None:
        trainer.attach(CheckpointManager(folder, every=2, **options))
    trainer.run(sharded.loader(), max_iters=iterations)
    found = {f"model.{name}": value for name, value in weights_of(trainer.model).items()}
    found |= {f"average.{name}": full_tensor(v) for name, v in average.average_state_dict().items()}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{name}": full_tensor(value) for name, value in state.items()}
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, exact: bool) -> None:
    assert found.keys() == expected.keys()
    assert len([name for name in found if name.startswith("optimizer.")]) > 50
    for name, value in expected.items():
        if exact:
            assert found[name].equal(value), name
        else:
            torch.testing.assert_close(
                found[name], value, rtol=1e-9, atol=1e-12, msg=lambda t, n=name: f"{n}: {t}"
            )


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    """Return the final tensors of one uninterrupted process."""
    return trained(False, None)


@pytest.fixture(scope="module")
def cut(ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run on two ranks that was interrupted after four iterations."""
    folder: Path = tmp_path_factory.mktemp("cut") / "checkpoints"
    ranks.run(trained, [(True, folder, 4)] * 2)
    return folder


@pytest.fixture
def copy(cut: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(cut, tmp_path / "copy"))


@pytest.mark.parametrize("background", [False, True])
def test_a_resumed_run_ends_bit_for_bit_like_the_uninterrupted_run(ranks, tmp_path, background):
    options = {"background": background}
    expected = ranks.run(trained, [(True, None)] * 2)
    ranks.run(_cut_off, [(tmp_path, options)] * 2)
    for found, other in zip(ranks.run(trained, [(True, tmp_path)] * 2), expected, strict=True):
        assert_same(found, other, exact=True)


def _cut_off(folder: Path, options: dict[str, Any]) -> None:
    trained(True, folder, 4, **options)


def test_one_process_resumes_a_model_that_two_ranks_sharded(copy, alone):
    assert_same(trained(False, copy), alone, exact=False)


def test_two_ranks_resume_a_sharded_model_without_sharding_it(ranks, copy, alone):
    for found in ranks.run(trained, [(False, copy)] * 2):
        assert_same(found, alone, exact=False)


@pytest.mark.parametrize("count", [1, 2])
def test_two_ranks_shard_a_model_that_was_saved_whole(ranks, tmp_path, alone, count):
    if count == 1:
        trained(False, tmp_path, 4)
    else:
        ranks.run(trained, [(False, tmp_path, 4)] * 2)
    for found in ranks.run(trained, [(True, tmp_path)] * 2):
        assert_same(found, alone, exact=False)


@pytest.mark.slow  # for the start of the third rank
def test_three_ranks_resume_a_model_that_two_ranks_sharded(ranks, copy, alone):
    for found in ranks.run(trained, [(True, copy)] * 3):
        assert_same(found, alone, exact=False)


# -- what is on the disk --------------------------------------------------------------------------


def test_a_checkpoint_is_a_file_of_plain_values_and_a_folder_with_a_file_for_each_rank(cut):
    names = {path.name for path in cut.iterdir()}
    checkpoints = {"checkpoint_epoch_1_iteration_2", "checkpoint_epoch_2_iteration_4"}
    assert names == {
        "manifest.json",
        "run.lock",
        *(f"{c}{end}" for c in checkpoints for end in (".pt", ".shards")),
    }
    path = cut / "checkpoint_epoch_2_iteration_4.pt"
    state = torch.load(path, weights_only=True)
    folder = path.with_suffix(".shards")
    files = {p.name: p.stat().st_size for p in folder.iterdir()}  # nothing pickled beside them
    assert {name: size for name, (size, _) in state["shards"]["files"].items()} == files
    assert len(files) == 2
    assert state["model"]["logit_scale"].shape == ()
    named = set(state["shards"]["tensors"])
    assert {"model.image.stem.weight", "handlers.WeightAverage.average.image.stem.weight"} <= named
    shared = torch.optim.AdamW(sharded.TwoTowers().parameters()).param_groups[0]["params"]
    assert len(named) == 4 * (len(shared) - 1)  # weights, average, two moments


def exporting(folder: Path) -> dict[str, Tensor]:
    trainer = make_trainer(True)
    manager = CheckpointManager(folder, every=1, keep=1, export=True)
    trainer.attach(manager)
    trainer.run(sharded.loader(), max_epochs=1)
    path = manager.save_checkpoint(7, {"val/loss": 1.0})
    trainer.run(trainer.batches.data, max_epochs=2)
    again = weights_of(trainer.model)
    assert manager.load_checkpoint(path) == (7, {"val/loss": 1.0})
    assert not weights_of(trainer.model)["image.stem.weight"].equal(again["image.stem.weight"])
    return again


def test_the_weights_are_exported_whole_and_old_folders_are_removed(ranks, tmp_path):
    from safetensors.torch import load_file

    weights, _ = ranks.run(exporting, [(tmp_path,)] * 2)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == weights.keys()
    for name, value in weights.items():
        assert written[name].equal(value)
    kept = {path.name for path in tmp_path.glob("*.shards*")}
    assert kept == {"checkpoint_epoch_7.shards", "checkpoint_epoch_2.shards"}


def test_all_ranks_resume_from_the_checkpoint_before_one_with_a_damaged_shard(ranks, copy, alone):
    share = sorted((copy / "checkpoint_epoch_2_iteration_4.shards").iterdir())[1]
    content = bytearray(share.read_bytes())
    content[len(content) // 2] ^= 1
    share.write_bytes(content)
    for found in ranks.run(trained, [(True, copy)] * 2):
        assert_same(found, alone, exact=False)


def failing(folder: Path) -> list[str]:
    """Return the error of a run whose second rank cannot write its last checkpoint."""
    trainer, manager = make_trainer(True), CheckpointManager(folder, every=1)
    trainer.attach(manager)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    def fill() -> None:
        if trainer.state.iteration == 3 and dist.get_rank() == 1:
            patch.setattr(sharded_tensors, "write_verified", full)

    trainer.add_event_handler("ITERATION_STARTED", fill)
    told = []
    with pytest.MonkeyPatch.context() as patch:
        try:
            trainer.run(sharded.loader(), max_epochs=1)
        except CheckpointError as error:
            told.append(str(error))
    return told


def test_a_rank_that_cannot_write_is_named_and_earlier_checkpoints_stay_intact(ranks, tmp_path):
    for (told,) in ranks.run(failing, [(tmp_path,)] * 2):
        assert "could not be written: rank 1: OSError: No space left on device" in told
    assert {p.name for p in tmp_path.glob("check*")} == {
        f"checkpoint_epoch_1_iteration_{i}{end}" for i in (1, 2) for end in (".pt", ".shards")
    }
    ranks.run(trained_with_defaults, [(tmp_path,)] * 2)


def trained_with_defaults(folder: Path) -> None:
    trainer = make_trainer(True)
    trainer.attach(CheckpointManager(folder, every=1))
    trainer.run(sharded.loader(), max_epochs=1)
    assert trainer.state.iteration == 3
