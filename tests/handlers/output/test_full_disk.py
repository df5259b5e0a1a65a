"""A full disk: the run goes on, recovers, and ends with the weights and lines of any other."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events

from diptych import handlers
from diptych.engine import Trainer
from diptych.engine.errors import CheckpointError
from diptych.handlers import (
    HistoryPlots,
    JsonLines,
    ProgressBar,
    RunCard,
    RunRecord,
    TensorBoard,
    Throughput,
    default_handlers,
    read_records,
)
from diptych.handlers.output.output_handler import OutputHandler
from tests.handlers.output.outage import Outage, fill, small_disk
from tests.handlers.runs import loader, make_trainer, report_each_epoch
from tests.handlers.test_contract import EXAMPLES, EXPORTED
from tests.handlers.test_contract import make_loader as contract_loader
from tests.handlers.test_contract import make_trainer as contract_trainer

WRITERS = sorted(name for name in EXAMPLES if issubclass(EXPORTED[name], OutputHandler))
OUTAGES = {"from the start": (1, 9, 0), "in the middle": (3, 8, 300), "to the end": (5, None, 0)}
"""The first iteration, the one that ends it, and the size up to which a file may grow."""


def test_every_handler_that_writes_is_guarded():
    others = set(EXAMPLES) - set(WRITERS)
    sources = {name: Path(module_file(name)).read_text("utf-8") for name in others}
    words = ("write_atomically", ".open(", "write_text", "write_bytes", "stream.write")
    writing = {name for name, text in sources.items() if any(word in text for word in words)}
    # The weights are a result of the run, and not a log: that they are not written is an error.
    assert writing <= {"WeightAverage", "CheckpointManager", "LossGuard"}
    assert {"TensorBoard", "JsonLines", "WandB", "ProgressBar", "RunRecord"} <= set(WRITERS)


def module_file(name: str) -> str:
    import sys

    return str(sys.modules[EXPORTED[name].__module__].__file__)


@pytest.mark.parametrize("outage", OUTAGES)
@pytest.mark.parametrize("name", WRITERS)
def test_no_handler_that_writes_ends_the_run_or_changes_it(name, outage, tmp_path):
    plain = contract_trainer()
    plain.run(contract_loader(), max_epochs=2)
    trainer = contract_trainer().attach(EXAMPLES[name].build(tmp_path))
    disk = Outage(trainer, *OUTAGES[outage])

    try:
        trainer.run(contract_loader(), max_epochs=2)
    finally:
        disk.end()

    assert trainer.state.iteration == 12
    for key, value in plain.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[key], value), key


def everything(folder: Path, card: io.StringIO) -> list[Any]:
    """Return the sinks and reports that write into a run's directory."""
    return [
        RunRecord(folder),
        Throughput(),
        TensorBoard(folder),
        JsonLines(folder),
        ProgressBar(stream=io.StringIO()),
        RunCard(stream=card),
        HistoryPlots(folder, every=1),
    ]


def trained(
    folder: Path, card: io.StringIO, disturb: Callable[[Trainer], Outage] | None = None
) -> Trainer:
    trainer = make_trainer(log_every=1)
    report_each_epoch(trainer, 0.25, 0.75, 0.5)
    trainer.attach(*everything(folder, card))
    outage = None if disturb is None else disturb(trainer)
    try:
        trainer.run(loader(), max_epochs=3)
    finally:
        if outage is not None:
            outage.end()
    return trainer


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith("time/")
    }


@pytest.mark.parametrize("room", [0, 200, 1000])
@pytest.mark.parametrize(("first", "last"), [(1, 4), (4, 15), (10, 18)])
def test_after_an_outage_every_file_is_as_if_there_had_been_none(
    tmp_path, caplog, first, last, room
):
    whole = trained(tmp_path / "whole", io.StringIO())
    caplog.clear()
    card = io.StringIO()

    disturbed = trained(
        tmp_path / "disturbed", card, lambda trainer: Outage(trainer, first, last, room)
    )

    for name, value in whole.model.state_dict().items():
        assert torch.equal(disturbed.model.state_dict()[name], value)
    expected = (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert (tmp_path / "disturbed/metrics.jsonl").read_bytes() == expected
    assert scalars(tmp_path / "disturbed") == scalars(tmp_path / "whole")
    assert (tmp_path / "disturbed/settings.json").is_file()
    assert "<svg" in (tmp_path / "disturbed/report.html").read_text("utf-8")
    assert "missing" not in card.getvalue()
    errors = [r.message for r in caplog.records if "could not write" in r.message]
    assert 1 <= len(errors) == len(set(errors))


def test_without_room_to_the_end_the_card_counts_what_is_missing(tmp_path, caplog):
    card = io.StringIO()

    trained(tmp_path / "run", card, lambda trainer: Outage(trainer, 10, None))

    steps = [record.step for record in read_records(tmp_path / "run")]
    assert steps == [*range(1, 7), 6, *range(7, 10)]
    assert f"11 writes to {tmp_path / 'run' / 'metrics.jsonl'} (" in card.getvalue()
    assert f"{tmp_path}/run/events.out.tfevents." in card.getvalue()
    assert caplog.text.count("metrics.jsonl: ") == 1


def test_the_last_checkpoint_alone_is_worth_an_error(tmp_path):
    trainer = make_trainer(log_every=1)
    trainer.attach(*default_handlers(tmp_path / "run"))
    outage = Outage(trainer, 8, None)

    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            trainer.run(loader(), max_epochs=2)
    finally:
        outage.end()
    assert trainer.state.iteration == 12


def test_a_checkpoint_that_was_saved_during_an_outage_brings_the_lines_back(tmp_path):
    """The records wait while a checkpoint is saved on another disk, and a kill follows."""
    whole = trained(tmp_path / "whole", io.StringIO())
    assert whole.state.iteration == 18

    first = make_trainer(log_every=1)
    report_each_epoch(first, 0.25, 0.75, 0.5)
    first.attach(lines := JsonLines(tmp_path / "run"))
    outage = Outage(first, 5, None)
    states: list[dict[str, Any]] = []
    first.add_event_handler(Events.ITERATION_STARTED(once=9), lambda: states.append(state(lines)))
    first.add_event_handler(Events.ITERATION_STARTED(once=9), first.terminate)
    first.run(loader(), max_epochs=3)
    outage.end()
    assert [record.step for record in read_records(tmp_path / "run")] == [1, 2, 3, 4]

    second = JsonLines(tmp_path / "run")
    second.load_state_dict(states[0])
    rest = make_trainer(log_every=1).attach(second)
    rest.state.iteration = 8  # where it was saved; the weights do not matter here
    second._start(rest)
    second.close_destination(rest)

    found = (tmp_path / "run/metrics.jsonl").read_bytes().splitlines()
    assert found == (tmp_path / "whole/metrics.jsonl").read_bytes().splitlines()[:9]


def state(lines: JsonLines) -> dict[str, Any]:
    return lines.state_dict()


def test_on_a_file_system_that_is_really_full_the_default_handlers_go_on(tmp_path):
    try:
        with small_disk(tmp_path / "disk", "2m") as disk:
            really_full(disk)
    except PermissionError:
        pytest.skip("needs the right to mount a file system")


def really_full(disk: Path) -> None:
    whole = trained_on(disk / "whole", None)
    expected = (disk / "whole/metrics.jsonl").read_bytes()
    shutil.rmtree(disk / "whole")

    found = trained_on(disk / "run", disk)

    for name, value in whole.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value)
    assert (disk / "run/metrics.jsonl").read_bytes() == expected
    assert (disk / "run/checkpoints/checkpoint_epoch_3.pt").is_file()


def trained_on(folder: Path, disk: Path | None) -> Trainer:
    trainer = make_trainer(log_every=1)
    for index in range(12):
        trainer.metrics.gauge(f"a/value_{index}", lambda: torch.tensor(1.0))
    if disk is not None:
        trainer.add_event_handler(Events.ITERATION_STARTED(once=4), lambda: fill(disk))
        trainer.add_event_handler(Events.ITERATION_STARTED(once=15), (disk / "filler").unlink)
    trainer.attach(*default_handlers(folder, every=2))
    trainer.run(loader(), max_epochs=3)
    assert trainer.state.iteration == 18
    assert handlers.RunDirectory(folder).settings.is_file()
    return trainer
