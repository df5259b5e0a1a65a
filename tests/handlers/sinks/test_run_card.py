"""The summaries before and after a run: their content, where they are written, and how."""

from __future__ import annotations

import io

import pytest
import torch
from ignite.engine import Events
from torch import nn
from torch.utils.data import DataLoader

from diptych.engine import Trainer
from diptych.handlers import CheckpointManager, RunCard, Throughput
from tests.handlers.runs import (
    Squares,
    Stop,
    Terminal,
    classifier,
    loader,
    make_trainer,
    report_each_epoch,
    stop_at,
)


def cards(stream: io.StringIO) -> dict[str, str]:
    """Return the lines of a card or two by their names."""
    lines = [line for line in stream.getvalue().splitlines() if line]
    return {line[:8].strip(): line[8:] for line in lines}


def run(trainer: Trainer, epochs: int = 2, **options: object) -> io.StringIO:
    stream = io.StringIO()
    trainer.attach(RunCard(stream=stream, **options))
    trainer.run(loader(), max_epochs=epochs)
    return stream


def test_the_start_shows_model_batch_length_and_directory(tmp_path):
    told = cards(run(make_trainer(microbatch_size=1), directory=tmp_path))

    assert told["model"] == "Sequential, 26 parameters, all train: 0 16, 2 10"
    assert told["batch"] == "2, in pieces of 1, fp32 on cpu"
    assert told["length"] == "2 epochs of 6 steps, 12 in all"
    assert told["run"] == str(tmp_path)


def test_the_trainable_share_is_shown_and_small_components_are_counted_together():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(7)), nn.Linear(3, 2))
    model[7].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    trainer = classifier(model, optimizer)

    told = cards(run(trainer, epochs=1))

    assert told["model"].startswith("Sequential, 71 parameters, 63 (88.7%) train: 0 9, ")
    assert told["model"].endswith("5 9, 2 more 17")


def test_the_batch_size_is_shown_if_the_loader_has_one():
    batches = list(loader())
    for data, expected in ((batches, "fp32 on cpu"), (DataLoader(Squares(), 4), "4, fp32 on cpu")):
        stream = io.StringIO()
        trainer = make_trainer().attach(RunCard(stream=stream))

        trainer.run(data, max_iters=2)

        assert cards(stream)["batch"] == expected
        assert cards(stream)["length"].startswith("2 steps in all")


@pytest.mark.parametrize(("mode", "expected"), [("max", "0.75, epoch 2"), ("min", "0.25, epoch 1")])
def test_the_end_shows_the_best_value_and_its_step(mode, expected):
    trainer = make_trainer().attach(Throughput())
    report_each_epoch(trainer, 0.25, 0.75, 0.5)

    told = cards(run(trainer, epochs=3, best="val/recall@1", mode=mode))

    step = {"max": 12, "min": 6}[mode]
    assert told["best"] == f"val/recall@1 {expected}, step {step}"
    assert told["done"].startswith("epoch 3, step 18, in 0:0")
    assert told["done"].endswith(" samples/s")


def test_nan_is_never_the_best():
    trainer = make_trainer()
    report_each_epoch(trainer, float("nan"), 0.25, float("nan"))

    assert "0.25, epoch 2" in cards(run(trainer, epochs=3, best="val/recall@1"))["best"]


def test_without_a_metric_the_end_shows_the_last_loss():
    trainer = make_trainer()

    told = cards(run(trainer))

    last = trainer.metrics.record.values["train/loss"]
    assert told["loss"] == f"{last:#.4g}, at the last log point"
    assert "best" not in told
    assert "samples/s" not in told["done"]


def test_the_speed_is_that_of_all_iterations():
    trainer = make_trainer()
    rates = iter([100.0, 400.0])
    seconds = iter([0.5, 0.25])
    trainer.metrics.gauge("time/samples_per_second", lambda: next(rates))
    trainer.metrics.gauge("time/step", lambda: next(seconds))

    told = cards(run(trainer, epochs=1))

    # 4 iterations of 0.5 seconds at 100, then 2 of 0.25 at 400: 400 samples in 2.5 seconds.
    assert told["done"].endswith(", 160 samples/s")


def test_a_resumed_run_shows_its_position_and_keeps_its_best_value(tmp_path):
    def trained(epochs: int) -> io.StringIO:
        trainer = make_trainer().attach(CheckpointManager(tmp_path))
        report_each_epoch(trainer, 0.75, 0.5)
        return run(trainer, epochs, best="val/recall@1", directory=tmp_path)

    first, second = trained(1), trained(2)

    assert "resumed after" not in first.getvalue()
    assert f"{tmp_path}, resumed after epoch 1, step 6\n" in second.getvalue()
    assert "val/recall@1 0.75, epoch 1, step 6\n" in second.getvalue()


def test_a_run_that_is_continued_inside_an_epoch_says_so():
    trainer = make_trainer()
    stream = run_until(trainer, 8)
    trainer.run(trainer.state.dataloader, max_epochs=2)

    assert "resumed after step 8, in epoch 2\n" in stream.getvalue()


def run_until(trainer: Trainer, iteration: int) -> io.StringIO:
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED,
        lambda: trainer.terminate() if trainer.state.iteration == iteration else None,
    )
    return run(trainer)


@pytest.mark.parametrize("signal", [SystemExit(143), KeyboardInterrupt()])
def test_a_run_that_a_signal_ended_was_stopped(signal):
    def stop() -> None:
        raise signal

    trainer, stream = make_trainer(), io.StringIO()
    trainer.attach(RunCard(stream=stream))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), stop)

    with pytest.raises(type(signal)):
        trainer.run(loader(), max_epochs=1)

    assert "stopped epoch 1, step 3," in stream.getvalue()
    assert "failed" not in stream.getvalue()


def test_a_run_that_was_stopped_or_failed_says_so_once():
    stream = run_until(make_trainer(), 8)
    assert stream.getvalue().count("stopped epoch 2, step 8,") == 1
    assert "done" not in stream.getvalue()

    failing, stream = make_trainer(), io.StringIO()
    stop_at(failing, 3)
    failing.attach(RunCard(stream=stream))
    with pytest.raises(Stop):
        failing.run(loader(), max_epochs=2)
    assert stream.getvalue().count("failed  epoch 1, step 3,") == 1


def test_colour_is_for_terminals_that_want_it(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def written(stream: io.StringIO) -> str:
        make_trainer().attach(RunCard(stream=stream)).run(loader(), max_epochs=1)
        return stream.getvalue()

    assert "\x1b[2mmodel  \x1b[0m Sequential" in written(Terminal())
    assert "\x1b" not in written(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in written(Terminal())


def test_the_cards_are_short(tmp_path):
    trainer = make_trainer().attach(Throughput())
    report_each_epoch(trainer, 0.5, 0.75)

    stream = run(trainer, directory=tmp_path, best="val/recall@1")

    assert len(stream.getvalue().splitlines()) == 7


def test_another_rank_writes_nothing(monkeypatch):
    monkeypatch.setattr("diptych.handlers.sinks.run_card.rank", lambda: 1)

    assert run(make_trainer()).getvalue() == ""


def test_the_batch_size_of_all_ranks_is_shown(monkeypatch):
    from diptych.handlers.sinks import run_card as module

    monkeypatch.setattr(module, "world_size", lambda: 2)

    assert module._size(loader()) == "2 = 2 ranks x 1"
    assert module._size(DataLoader(Squares(), 4)) == "8 = 2 ranks x 4"
