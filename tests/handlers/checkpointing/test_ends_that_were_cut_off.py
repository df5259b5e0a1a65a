"""The end of an epoch or of a run that was cut off: by a kill, an exception, or a signal."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch.utils.data import DataLoader

from diptych.engine import EvaluationEvents, MetricsEvents, RunEvents, Trainer
from diptych.handlers import CheckpointManager, EarlyStopping, Evaluation, JsonLines
from tests.handlers.checkpointing.test_checkpoint_manager import digest, make_loader, make_trainer

EPOCHS = 3


class FailedError(Exception):
    """Raised by a handler."""


class Killed(BaseException):
    """Imitates the end of the process."""


class Counter:
    """Counts its calls, as a part of the run's state, and publishes the count."""

    def __init__(self, name: str) -> None:
        self.name, self.calls = name, 0

    def count(self, trainer: Trainer) -> None:
        """Count a call."""
        self.calls += 1
        trainer.metrics.update({f"count/{self.name}": self.calls})

    def state_dict(self) -> dict[str, int]:
        """Return the count."""
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue a count."""
        self.calls = state["calls"]


def fail_once(error: type[BaseException], when: Callable[[Trainer], bool]) -> Any:
    """Return a handler that raises an error if a condition holds, once for all runs."""

    def fail(trainer: Trainer) -> None:
        if not raised and when(trainer):
            raised.append(error)
            raise error

    raised: list[type[BaseException]] = []
    return fail


# -- a kill in COMPLETED --------------------------------------------------------------------------


def completing(folder: Path, kill: bool, **limit: int) -> tuple[Trainer, list[str]]:
    """Run with handlers of COMPLETED before and after a manager; return what was called."""
    trainer, calls = make_trainer(), []
    for event in (Events.STARTED, RunEvents.EPOCH_CUT, Events.COMPLETED):
        trainer.add_event_handler(event, partial(calls.append, event.name))
    trainer.attach(CheckpointManager(folder / "checkpoints", every=100), JsonLines(folder))
    trainer.add_event_handler(
        Events.COMPLETED, lambda: trainer.metrics.update({"final/score": trainer.state.iteration})
    )
    if kill:
        trainer.add_event_handler(Events.COMPLETED, fail_once(Killed, lambda _: True))
    trainer.add_event_handler(Events.COMPLETED, partial(calls.append, "after"))
    try:
        trainer.run(make_loader(), **limit)
    except Killed:
        calls.append("killed")
    return trainer, calls


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_iters": 8}, {"max_iters": 12}])
def test_a_run_that_was_killed_in_completed_fires_it_alone_once_more(tmp_path, limit):
    cut = ["EPOCH_CUT"] if limit == {"max_iters": 8} else []
    _, calls = completing(tmp_path / "killed", kill=True, **limit)
    assert calls == ["STARTED", *cut, "COMPLETED", "killed"]
    resumed, calls = completing(tmp_path / "killed", kill=False, **limit)
    assert calls == ["COMPLETED", "after"]
    again, calls = completing(tmp_path / "killed", kill=False, **limit)
    assert calls == []
    whole, _ = completing(tmp_path / "whole", kill=False, **limit)
    assert digest(resumed) == digest(again) == digest(whole)
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("killed", "whole")]
    assert logs[0] == logs[1]
    assert b"final/score" in logs[0]


def test_a_killed_end_is_not_fired_if_a_larger_limit_continues_the_run(tmp_path):
    completing(tmp_path, kill=True, max_epochs=1)
    _, calls = completing(tmp_path, kill=False, max_epochs=2)
    assert calls == ["STARTED", "COMPLETED", "after"]
    _, calls = completing(tmp_path, kill=False, max_epochs=2)
    assert calls == []


def test_a_completed_that_fails_each_time_writes_one_checkpoint(tmp_path):
    for _ in range(3):
        trainer = make_trainer()
        trainer.attach(CheckpointManager(tmp_path))
        trainer.add_event_handler(Events.COMPLETED, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.run(make_loader(), max_epochs=1)
        assert trainer.state.iteration == 6
        assert [path.name for path in tmp_path.glob("*.pt")] == ["checkpoint_epoch_1.pt"]


def test_a_stopped_run_whose_last_iteration_was_reached_does_not_end_twice(tmp_path):
    for expected in (["COMPLETED"], []):
        trainer, calls = make_trainer(), []
        trainer.attach(CheckpointManager(tmp_path))
        trainer.add_event_handler(Events.ITERATION_COMPLETED(once=8), trainer.terminate)
        trainer.add_event_handler(Events.COMPLETED, partial(calls.append, "COMPLETED"))
        trainer.run(make_loader(), max_iters=8)
        assert calls == expected


# -- an exception at the end of an epoch ----------------------------------------------------------


def build(folder: Path, failing: Any = None, event: Any = Events.EPOCH_COMPLETED) -> Trainer:
    """Return a trainer with counting handlers before and after a failing one at an epoch's end."""
    trainer = make_trainer()
    trainer.add_event_handler(event, Counter("before").count)
    trainer.attach(Evaluation(make_loader()))
    if failing is not None:
        trainer.add_event_handler(event, failing)
    trainer.add_event_handler(event, Counter("after").count)
    trainer.attach(
        EarlyStopping(metric="val/loss", mode="min", patience=99),
        JsonLines(folder),
        CheckpointManager(folder / "checkpoints", best="val/loss", mode="min"),
    )
    return trainer


def outcome(folder: Path, trainer: Trainer) -> tuple[str, bytes, dict[str, list[float]], str]:
    manager = next(h for h in trainer.handlers if isinstance(h, CheckpointManager))
    history = trainer.metrics.state_dict()["history"]
    best = manager.get_best_checkpoint().name
    return digest(trainer), (folder / "metrics.jsonl").read_bytes(), history, best


def expected_outcome(folder: Path, event: Any = Events.EPOCH_COMPLETED) -> Any:
    trainer = build(folder, event=event)
    trainer.run(make_loader(), max_epochs=EPOCHS)
    return outcome(folder, trainer)


@pytest.mark.parametrize(
    "event",
    [Events.EPOCH_COMPLETED, MetricsEvents.EPOCH_PUBLISHED, EvaluationEvents.EVALUATED],
)
def test_an_epoch_whose_end_failed_is_saved_and_the_run_resumes_with_the_handler_that_failed(
    tmp_path, event
):
    failing = fail_once(FailedError, lambda trainer: trainer.state.epoch == 2)
    cut = build(tmp_path / "a", failing, event)
    with pytest.raises(FailedError):
        cut.run(make_loader(), max_epochs=EPOCHS)
    path = tmp_path / "a" / "checkpoints" / "checkpoint_epoch_2_iteration_12.pt"
    assert path.exists()
    started = []
    resumed = build(tmp_path / "a", failing, event)
    resumed.add_event_handler(
        Events.STARTED, lambda: started.append((resumed.state.epoch, resumed.state.iteration))
    )
    resumed.run(make_loader(), max_epochs=EPOCHS)
    assert started == [(2, 12)]
    assert outcome(tmp_path / "a", resumed) == expected_outcome(tmp_path / "b", event)


def test_a_loader_without_positions_keeps_the_epoch_too(tmp_path):
    digests = []
    for failing in (None, fail_once(FailedError, lambda _: True)):
        for _ in range(1 if failing is None else 2):
            trainer = make_trainer()
            trainer.attach(CheckpointManager(tmp_path / str(failing is None)))
            if failing is not None:
                trainer.add_event_handler(Events.EPOCH_COMPLETED, failing)
            loader = DataLoader(list(make_loader().dataset), batch_size=4)
            try:
                trainer.run(loader, max_epochs=2)
            except FailedError:
                assert trainer.state.iteration == 6
        digests.append(digest(trainer))
    assert digests[0] == digests[1]


def test_a_handler_that_fails_each_time_adds_no_files(tmp_path):
    found = []
    for _ in range(3):
        trainer = make_trainer()
        manager = CheckpointManager(tmp_path)
        trainer.attach(manager)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.run(make_loader(), max_epochs=EPOCHS)
        found.append([(p.name, p.stat().st_mtime_ns) for p in tmp_path.glob("*.pt")])
        assert manager.get_best_checkpoint() is None
    assert [name for name, _ in found[0]] == ["checkpoint_epoch_1_iteration_6.pt"]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_asks_the_process_to_end_at_once_is_not_answered_with_a_save(tmp_path, error):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, fail_once(error, lambda _: True))
    with pytest.raises(error):
        trainer.run(make_loader(), max_epochs=EPOCHS)
    assert not list(tmp_path.glob("*.pt"))


def test_an_exception_inside_an_epoch_is_not_saved(tmp_path):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path, every=4))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run(make_loader(), max_epochs=EPOCHS)
    assert [path.name for path in tmp_path.glob("*.pt")] == ["checkpoint_epoch_1_iteration_4.pt"]


def test_a_save_that_fails_does_not_replace_the_error_of_the_run(tmp_path, monkeypatch, caplog):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: 1 / 0)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ZeroDivisionError):
        trainer.run(make_loader(), max_epochs=EPOCHS)
    assert "The run could not be saved where it failed" in caplog.text


# -- a signal during an evaluation ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_signal_ends_an_evaluation_at_its_batch_and_the_run_repeats_it(
    tmp_path, number, error, epoch, caplog
):
    cut, batches = build(tmp_path / "a"), []
    evaluation = next(h for h in cut.handlers if isinstance(h, Evaluation))

    @evaluation.evaluator.on(Events.ITERATION_COMPLETED)
    def count() -> None:
        batches.append(cut.state.epoch)
        if batches.count(epoch) == 2:
            os.kill(os.getpid(), number)

    with pytest.raises(error) as raised:
        cut.run(make_loader(), max_epochs=EPOCHS)
    assert batches.count(epoch) == 2  # of six
    assert error is KeyboardInterrupt or raised.value.code == 128 + number
    folder = tmp_path / "a" / "checkpoints"
    path = folder / f"checkpoint_epoch_{epoch}_iteration_{6 * epoch}.pt"
    assert f"Signal {int(number)} ends the run here. It resumes from {path}" in caplog.text
    assert "Traceback" not in caplog.text

    resumed = build(tmp_path / "a")
    resumed.run(make_loader(), max_epochs=EPOCHS)
    assert outcome(tmp_path / "a", resumed) == expected_outcome(tmp_path / "b")


@pytest.mark.parametrize("error", [SystemExit, FailedError])
@pytest.mark.parametrize("iteration", [4, 6, 8, 12])  # 6 and 12 end an epoch
def test_an_evaluation_that_was_cut_off_inside_an_epoch_is_repeated_with_what_follows_it(
    tmp_path, iteration, error
):
    def make(folder: Path, *, kill: bool) -> tuple[Trainer, list[Any]]:
        trainer, seen = make_trainer(), []
        evaluation = Evaluation(make_loader(), every=2)
        trainer.every(1, Counter("before").count)
        trainer.attach(evaluation)
        trainer.every(2, Counter("after").count)

        @trainer.on(Events.ITERATION_COMPLETED)
        def look() -> None:
            batch, terms = trainer.state.batch["image"], trainer.terms
            seen.append((trainer.state.iteration, batch.sum().item(), float(terms["loss"])))

        if kill:

            @evaluation.evaluator.on(Events.ITERATION_COMPLETED(event_filter=lambda _, n: n == 3))
            def stop() -> None:
                if trainer.state.iteration == iteration:
                    if error is FailedError:
                        raise FailedError
                    os.kill(os.getpid(), signal.SIGTERM)

        checkpoints = CheckpointManager(folder / "checkpoints", best="val/loss", mode="min")
        trainer.attach(JsonLines(folder), checkpoints)
        return trainer, seen

    cut, first = make(tmp_path / "a", kill=True)
    with pytest.raises(error):
        cut.run(make_loader(), max_epochs=EPOCHS)
    resumed, rest = make(tmp_path / "a", kill=False)
    started = []
    resumed.add_event_handler(Events.STARTED, lambda: started.append(resumed.state.iteration))
    resumed.run(make_loader(), max_epochs=EPOCHS)
    whole, seen = make(tmp_path / "b", kill=False)
    whole.run(make_loader(), max_epochs=EPOCHS)
    assert started == [iteration]
    assert first + rest == seen
    assert outcome(tmp_path / "a", resumed) == outcome(tmp_path / "b", whole)


def test_a_signal_in_the_evaluation_before_training_starts_the_run_over(tmp_path, caplog):
    def run(*, kill: bool) -> Trainer:
        trainer = make_trainer()
        evaluation = Evaluation(make_loader(), at_start=True)
        trainer.attach(evaluation, CheckpointManager(tmp_path))
        if kill:
            evaluation.evaluator.add_event_handler(
                Events.ITERATION_COMPLETED(once=2), lambda: os.kill(os.getpid(), signal.SIGTERM)
            )
        trainer.run(make_loader(), max_epochs=1)
        return trainer

    with pytest.raises(SystemExit):
        run(kill=True)
    assert not list(tmp_path.glob("*.pt"))
    assert "Signal 15 ends the run here. It will start over." in caplog.text
    resumed = run(kill=False)
    whole = make_trainer()
    whole.run(make_loader(), max_epochs=1)
    assert digest(resumed) == digest(whole)
    assert len(resumed.metrics.get_history("val/loss")) == 2


def test_a_signal_in_the_evaluation_of_a_cut_end_repeats_that_evaluation(tmp_path):
    def run(folder: Path, *, kill: bool) -> tuple[Trainer, CheckpointManager]:
        trainer = make_trainer()
        evaluation, manager = Evaluation(make_loader()), CheckpointManager(folder, best="val/loss")
        trainer.attach(manager, evaluation)
        if kill:

            @evaluation.evaluator.on(Events.ITERATION_COMPLETED)
            def stop() -> None:
                if trainer.state.iteration == 8 and evaluation.evaluator.state.iteration == 2:
                    os.kill(os.getpid(), signal.SIGTERM)

        trainer.run(make_loader(), max_iters=8)
        return trainer, manager

    with pytest.raises(SystemExit):
        run(tmp_path / "a", kill=True)
    resumed, ranked = run(tmp_path / "a", kill=False)
    whole, expected = run(tmp_path / "b", kill=False)
    assert resumed.metrics.get_history("val/loss") == whole.metrics.get_history("val/loss")
    best = [
        torch.load(manager.get_best_checkpoint(), weights_only=True)["trainer"]["iteration"]
        for manager in (ranked, expected)
    ]
    assert best == [8, 8]  # the lowest loss is that of the evaluation which was repeated
    assert digest(resumed) == digest(whole)
    saved = torch.load(ranked.get_latest_checkpoint(), weights_only=True)
    assert saved["trainer"]["iteration"] == 8


class Buckets:
    """Makes batches of 16 samples; their number depends on the epoch."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the number of an epoch, from 0."""
        self.epoch = epoch

    def __iter__(self) -> Any:
        yield from (part.tolist() for part in torch.arange(16).chunk(len(self)))

    def __len__(self) -> int:
        return (4, 2, 8)[self.epoch]


def test_an_end_that_has_raised_continues_though_each_epoch_has_another_length(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    fail = fail_once(FailedError, lambda trainer: trainer.state.epoch == 2)
    ends: list[int] = []
    for _ in range(2):
        trainer = make_trainer()
        trainer.attach(CheckpointManager(tmp_path, every="epoch"))
        trainer.add_event_handler(Events.EPOCH_COMPLETED, fail)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda t: ends.append(t.state.iteration))
        loader = DataLoader(make_loader().dataset, batch_sampler=Buckets())
        try:
            trainer.run(loader, max_epochs=EPOCHS)
        except FailedError:
            continue

    assert ends == [4, 6, 14]
    assert not [record for record in caplog.records if "ends with a pass" in record.getMessage()]
