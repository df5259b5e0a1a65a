"""Checkpoints that earlier versions wrote: runs resume from them and end as if nothing happened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ignite.engine import Events

from diptych.engine.state.checkpoint_structure import FORMAT
from tests.compatibility.training import EPOCHS, STOP, build

STORED = sorted(Path(__file__).parent.glob("format_*"))


def test_a_run_of_each_format_is_stored() -> None:
    assert {folder.name for folder in STORED} == {f"format_{n}" for n in range(1, FORMAT + 1)}
    for folder in STORED:
        for path in folder.glob("checkpoint_*.pt"):
            assert f"format_{torch.load(path, weights_only=True)['format']}" == folder.name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the run that nobody has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, loader = build(folder)
    trainer.run(loader, max_epochs=EPOCHS)
    return folder


@pytest.mark.parametrize("stored", STORED, ids=lambda folder: folder.name)
def test_a_stored_run_ends_as_the_uninterrupted_one_did(
    stored: Path, whole: Path, tmp_path: Path
) -> None:
    for there, here in zip(_logged(stored), _logged(whole), strict=False):
        if here[1] != pytest.approx(there[1], rel=1e-4):
            pytest.skip("this CPU draws other random numbers than the one that stored the run")
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
    end = torch.load(folder / "end.pt", weights_only=True)
    torch.testing.assert_close(trainer.model.state_dict(), end, rtol=1e-4, atol=1e-5)
    # The log goes on without a step twice.
    resumed, expected = _logged(folder), _logged(whole)
    assert [tags for tags, _ in resumed] == [tags for tags, _ in expected]
    for (_, values), (_, others) in zip(resumed, expected, strict=True):
        assert values == pytest.approx(others, rel=1e-4)


def _logged(run: Path) -> list[tuple[tuple[str, ...], list[float]]]:
    """Return the tags and values of each line of a run's log, the step first."""
    log = (run / "metrics.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in log.splitlines()]
    return [(tuple(line), list(line.values())) for line in lines]
