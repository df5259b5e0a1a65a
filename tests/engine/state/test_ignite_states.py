"""The states of Ignite's handlers and metrics, wherever they are attached, go on after a kill."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite import handlers as ignite_handlers
from ignite.engine import Engine, Events, create_supervised_evaluator
from ignite.metrics import Accuracy, Average, EpochMetric, MetricsLambda, RunningAverage
from torch import Tensor, nn

from diptych.engine import MetricsEvents, SeededLoader, Trainer, tasks
from diptych.handlers import CheckpointManager, Evaluation

Notes = list[Any]
Add = Callable[[Trainer, Notes, Path], None]
IMAGES = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
PAIRS = [(image, torch.tensor(number % 2)) for number, image in enumerate(IMAGES)]


class KilledError(Exception):
    """Ends a run without any of the handlers of its end."""


def loss_of(output: Any) -> float:
    return float(output.loss)


def noted(trainer: Trainer, notes: Notes, *names: str, event: Any = Events.EPOCH_COMPLETED) -> None:
    trainer.add_event_handler(
        event, lambda: notes.append([float(trainer.state.metrics[name]) for name in names])
    )


def supervised(trainer: Trainer) -> Engine:
    """Validate as Ignite's own examples do, which leaves the model in eval mode."""
    evaluator = create_supervised_evaluator(trainer.model, {"accuracy": Accuracy()})
    batch = IMAGES, torch.arange(12) % 2

    @trainer.on(Events.EPOCH_COMPLETED)
    def validate() -> None:
        evaluator.run([batch])

    return evaluator


def stopping_of_an_evaluator(trainer: Trainer, notes: Notes, _: Path) -> None:
    stopping = ignite_handlers.EarlyStopping(2, lambda _: -trainer.state.epoch, trainer)
    supervised(trainer).add_event_handler(Events.COMPLETED, stopping)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: notes.append(stopping.counter))


def stopping_that_a_function_calls(trainer: Trainer, notes: Notes, _: Path) -> None:
    stopping = ignite_handlers.EarlyStopping(2, lambda _: -trainer.state.epoch, trainer)

    @trainer.on(Events.EPOCH_COMPLETED)
    def judge(engine: Engine) -> None:
        stopping(engine)
        notes.append(stopping.counter)


def stopping_reset_at_the_start(trainer: Trainer, notes: Notes, _: Path) -> None:
    stopping = ignite_handlers.EarlyStopping(2, lambda _: -trainer.state.epoch, trainer)
    stopping.attach(supervised(trainer), Events.COMPLETED, reset_engine=trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: notes.append(stopping.counter))


def counter_at_an_evaluation(trainer: Trainer, notes: Notes, _: Path) -> None:
    class Counter:
        count = 0

        def add(self) -> None:
            self.count += 1
            notes.append(self.count)

        def state_dict(self) -> dict[str, int]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.count = state["count"]

    evaluation = Evaluation(SeededLoader(PAIRS, batch_size=4), every=2)
    trainer.attach(evaluation)
    evaluation.evaluator.add_event_handler(Events.COMPLETED, Counter().add)


def plateau_of_an_evaluator(trainer: Trainer, notes: Notes, _: Path) -> None:
    plateau = ignite_handlers.ReduceLROnPlateauScheduler(
        trainer.optimizer, "score", factor=0.5, patience=1
    )
    evaluator = supervised(trainer)
    evaluator.add_event_handler(Events.COMPLETED, lambda e: e.state.metrics.update(score=1.0))
    evaluator.add_event_handler(Events.COMPLETED, plateau)


def files_of_an_evaluator(trainer: Trainer, notes: Notes, folder: Path) -> None:
    saver = ignite_handlers.DiskSaver(folder / "best", require_empty=False)
    best = ignite_handlers.Checkpoint(
        {"model": trainer.model},
        saver,
        score_function=lambda _: (0.5, 0.9, 0.3, 0.95)[trainer.state.epoch - 1],
        global_step_transform=lambda *_: trainer.state.epoch,
    )
    supervised(trainer).add_event_handler(Events.COMPLETED, best)
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: notes.append(Path(str(best.last_checkpoint)).name)
    )


def running_averages(trainer: Trainer, notes: Notes, _: Path) -> None:
    RunningAverage(output_transform=loss_of).attach(trainer, "own")
    RunningAverage(Average(output_transform=loss_of)).attach(trainer, "of a metric")
    noted(trainer, notes, "own", "of a metric", event=Events.ITERATION_COMPLETED)


def metrics_of_an_epoch(trainer: Trainer, notes: Notes, _: Path) -> None:
    mean = Average(output_transform=loss_of)
    MetricsLambda(lambda a, b: a - b, mean, Average(output_transform=lambda _: 1.0)).attach(
        trainer, "difference"
    )
    EpochMetric(
        lambda first, _: float(first.median()),
        output_transform=lambda output: (output.loss.reshape(1), torch.zeros(1)),
        check_compute_fn=False,
    ).attach(trainer, "median")
    noted(trainer, notes, "difference", "median")


def warm_restarts(trainer: Trainer, notes: Notes, _: Path) -> None:
    restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(trainer.optimizer, 5)
    scheduler = ignite_handlers.LRScheduler(restarts, save_history=True)
    trainer.add_event_handler(Events.ITERATION_STARTED, scheduler)
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda e: notes.append(len(e.state.param_history["lr"]))
    )


def parameter_of_the_state(trainer: Trainer, notes: Notes, _: Path) -> None:
    ignite_handlers.LambdaStateScheduler(lambda n: 2.0 * n, "weight", create_new=True).attach(
        trainer, Events.EPOCH_STARTED
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: notes.append(e.state.weight))


def attribute_of_the_state(trainer: Trainer, notes: Notes, _: Path) -> None:
    trainer.state.alpha = 1.0

    @trainer.on(Events.ITERATION_COMPLETED)
    def decay(engine: Trainer) -> None:
        engine.state.alpha *= 0.9
        engine.state.losses = [*getattr(engine.state, "losses", ()), engine.state.output.loss]
        notes.append((engine.state.alpha, len(engine.state.losses)))


CASES: list[Add] = [
    *(stopping_of_an_evaluator, stopping_that_a_function_calls, stopping_reset_at_the_start),
    *(counter_at_an_evaluation, plateau_of_an_evaluator, files_of_an_evaluator),
    *(running_averages, metrics_of_an_epoch, warm_restarts),
    *(parameter_of_the_state, attribute_of_the_state),
]


def run(add: Add, folder: Path, killed_at: int | None = None) -> tuple[Notes, dict[str, Tensor]]:
    """Train for four epochs of three iterations; return the notes with the weights."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = Trainer(
        model, nn.CrossEntropyLoss(), optimizer, task=tasks.classification, device="cpu", seed=2
    )
    notes: Notes = []
    add(trainer, notes, folder)
    trainer.attach(CheckpointManager(folder / "checkpoints", every=(killed_at or 13) - 1))

    @trainer.on(Events.ITERATION_COMPLETED)
    def note(engine: Trainer) -> None:
        if engine.state.iteration == killed_at:
            shutil.copytree(folder / "checkpoints", folder / "kept")
            raise KilledError
        notes.append(optimizer.param_groups[0]["lr"])

    loader = SeededLoader(PAIRS, batch_size=4, seed=3)
    if killed_at is None:
        trainer.run(loader, max_epochs=4)
    else:
        with pytest.raises(KilledError):
            trainer.run(loader, max_epochs=4)
        shutil.rmtree(folder / "checkpoints")  # with what was saved after the exception
        (folder / "kept").rename(folder / "checkpoints")
    return notes, model.state_dict()


KILLED = [
    pytest.param(add, at, marks=[] if (at == 8) == (add is not CASES[0]) else pytest.mark.slow)
    for add in CASES
    for at in (4, 8)
]
"""After the end of an epoch, and inside of one."""


@pytest.mark.parametrize(("add", "killed_at"), KILLED)
def test_the_rest_of_a_killed_run_is_that_of_a_whole_one(add: Add, killed_at: int, tmp_path: Path):
    notes, weights = run(add, tmp_path / "whole")
    run(add, tmp_path / "killed", killed_at)
    rest, resumed = run(add, tmp_path / "killed")
    assert 0 < len(rest) < len(notes)
    assert rest == notes[-len(rest) :]
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def test_a_changed_attribute_of_the_state_applies_and_is_logged(tmp_path: Path, caplog):
    def make(alpha: float) -> Add:
        def add(trainer: Trainer, notes: Notes, _: Path) -> None:
            trainer.state.alpha = alpha
            trainer.add_event_handler(
                Events.ITERATION_COMPLETED, lambda e: notes.append(e.state.alpha)
            )

        return add

    run(make(1.0), tmp_path, killed_at=4)
    notes, _ = run(make(2.0), tmp_path)
    assert notes[0] == 2.0
    assert "state.alpha 1.0 -> 2.0 (changed in the script)." in caplog.messages


def test_a_file_that_a_killed_run_has_replaced_does_not_end_the_next_one(tmp_path: Path):
    run(files_of_an_evaluator, tmp_path, killed_at=5)
    (tmp_path / "best" / "model_1_0.5000.pt").unlink()
    notes, _ = run(files_of_an_evaluator, tmp_path)
    assert [name for name in notes if isinstance(name, str)][-1] == "model_4_0.9500.pt"
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["model_4_0.9500.pt"]


def test_a_state_taken_at_the_last_log_point_of_an_epoch_has_the_end_of_the_epoch_before_it():
    def trainer_with(ends: list[int]) -> Trainer:
        torch.manual_seed(1)
        model = nn.Linear(3, 2)
        trainer = Trainer(
            model,
            nn.CrossEntropyLoss(),
            torch.optim.SGD(model.parameters(), lr=0.1),
            task=tasks.classification,
            device="cpu",
            log_every=2,
        )
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda e: ends.append(e.state.epoch))
        return trainer

    loader, states, ends = SeededLoader(PAIRS, batch_size=4), list[Any](), list[int]()
    trainer = trainer_with([])
    trainer.add_event_handler(MetricsEvents.LOGGED, lambda e: states.append(e.state_dict()))
    trainer.run(loader, max_epochs=2)
    resumed = trainer_with(ends)
    resumed.load_state_dict(states[1])  # after iteration 3, the last of the first epoch
    resumed.run(loader, max_epochs=2)
    assert ends == [1, 2]
