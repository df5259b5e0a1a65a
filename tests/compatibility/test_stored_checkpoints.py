"""Checkpoints that earlier versions wrote: runs resume from them and end as if nothing happened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ignite.engine import Events

from diptych.engine.state.checkpoint_structure import FORMAT
from tests.compatibility.training import EPOCHS, STOP, build, run_to_the_stop

STORED = sorted(Path(__file__).parent.glob("format_*"))


def test_a_run_of_each_format_is_stored() -> None:
    assert {folder.name for folder in STORED} == {f"format_{n}" for n in range(1, FORMAT + 1)}
    for folder in STORED:
        for path in folder.glob("checkpoint_*.pt"):
            assert f"format_{torch.load(path, weights_only=True)['format']}" == folder.name


def skip_if_others_are_drawn(stored: Path, folder: Path) -> None:
    """Skip if a new run does not begin as the stored one: draws of dropout depend on the CPU."""
    run_to_the_stop(folder)
    here, there = (_logged(run / "metrics.jsonl") for run in (folder, stored))
    for (_, values), (_, expected) in zip(here, there, strict=True):
        if values != pytest.approx(expected, rel=1e-4):
            pytest.skip("this CPU draws other random numbers than the one that stored the run")


@pytest.mark.parametrize("stored", STORED, ids=lambda folder: folder.name)
def test_a_stored_run_ends_as_the_uninterrupted_one_did(stored: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stored, folder)
    trainer, loader = build(folder)
    iterations: list[tuple[int, int]] = []
    trainer.add_event_handler(
        Events.ITERATION_STARTED,
        lambda: iterations.append((trainer.state.epoch, trainer.state.iteration)),
    )

    trainer.run(loader, max_epochs=EPOCHS)

    assert iterations[0] == (2, STOP + 1)
    assert iterations[-1] == (EPOCHS, EPOCHS * len(loader))
    skip_if_others_are_drawn(stored, tmp_path / "fresh")
    end = torch.load(folder / "end.pt", weights_only=True)
    torch.testing.assert_close(trainer.model.state_dict(), end, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stored", STORED, ids=lambda folder: folder.name)
def test_the_log_of_a_stored_run_goes_on_without_a_step_twice(stored: Path, tmp_path: Path) -> None:
    folder, fresh = tmp_path / "run", tmp_path / "fresh"
    shutil.copytree(stored, folder)
    for run in (folder, fresh):
        trainer, loader = build(run)
        trainer.run(loader, max_epochs=EPOCHS)

    skip_if_others_are_drawn(stored, tmp_path / "begin")
    resumed, whole = (_logged(run / "metrics.jsonl") for run in (folder, fresh))
    assert [keys for keys, _ in resumed] == [keys for keys, _ in whole]
    for (_, values), (_, expected) in zip(resumed, whole, strict=True):
        assert values == pytest.approx(expected, rel=1e-4)


def _logged(path: Path) -> list[tuple[tuple[str, ...], list[float]]]:
    """Return the tags and values of each line, the step first."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [(tuple(line), list(line.values())) for line in lines]
