"""Scripts that differ between two ranks, for the tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Events
from ignite.handlers import Timer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from diptych.engine import SeededLoader, Trainer, tasks
from diptych.handlers import (
    CheckpointManager,
    Evaluation,
    GradientClipping,
    InBatchAccuracy,
    JsonLines,
    LearningRate,
    ToLogger,
    WeightAverage,
)
from tests.engine.models import FEATURES, IMAGE, CoupledLoss, TwoTower, paired, sgd, trainer_of

Script = Callable[[bool, Path], object]
"""Builds a trainer and runs it, on the second rank in another way (True)."""


class OtherTower(nn.Sequential):
    """A tower with another activation, whose parameters have the same shapes."""


class WithRank(CoupledLoss):
    """A loss that knows its rank, as losses of other libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.device = dist.get_rank(), f"cuda:{dist.get_rank()}"


class OwnNoise:
    """A transform whose generator has a seed of its own on each rank."""

    def __init__(self, seed: int, size: float = 0.1) -> None:
        self.generator, self.size = torch.Generator().manual_seed(seed), size

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        noise = torch.randn(batch["image"].shape, generator=self.generator)
        return {**batch, "image": batch["image"] + self.size * noise}


def built(*handlers: Any, **parts: Any) -> Trainer:
    """Return a trainer with the same weights on all ranks."""
    torch.manual_seed(0)
    return trainer_of(**parts).attach(*handlers)


def ran(trainer: Trainer, batches: int = 2, **limits: Any) -> None:
    """Run on batches of this rank's own."""
    torch.manual_seed(dist.get_rank())
    trainer.run([paired(4) for _ in range(batches)], **limits)


def with_model(change: Callable[[nn.Module], object]) -> Script:
    """Return a script whose model is changed on the second rank."""

    def script(unlike: bool, _: Path) -> None:
        model = TwoTower().double()
        if unlike:
            change(model)
        ran(built(model=model))

    return script


def with_handlers(everywhere: Any = (), *, alone: Any = ()) -> Script:
    """Return a script with handlers on both ranks, and others on the second one only."""

    def script(unlike: bool, folder: Path) -> None:
        handlers = [make(folder) for make in (*everywhere, *(alone if unlike else ()))]
        ran(built(*handlers))

    return script


def with_parts(**parts: Callable[[bool], Any]) -> Script:
    """Return a script with arguments of the trainer that depend on whether the rank is unlike."""
    return lambda unlike, _: ran(built(**{name: make(unlike) for name, make in parts.items()}))


def other_rate(unlike: bool, _: Path) -> None:
    model, loss = TwoTower().double(), CoupledLoss().double()
    ran(built(model=model, loss=loss, optimizer=sgd(model, loss, lr=0.2 if unlike else 0.1)))


def other_order(unlike: bool, _: Path) -> None:
    handlers = [GradientClipping(max_norm=1.0), LearningRate()]
    ran(built(*(reversed(handlers) if unlike else handlers)))


def replace_activation(model: nn.Module) -> None:
    model.image[1] = nn.ReLU()


def other_seed_of_the_order(unlike: bool, _: Path) -> None:
    data = TensorDataset(torch.randn(8, IMAGE), torch.arange(8) % 2)
    loader = SeededLoader(data, 4, seed=7 + unlike, collate=lambda rows: rows)
    built(step=lambda *_: None).run(loader)


def shards_of_the_data(unlike: bool, _: Path) -> None:
    built().run([paired(4)] * (3 if unlike else 5), max_epochs=2, epoch_length=2)


def evaluation(prefix: str = "val", **settings: Any) -> Callable[[Path], Evaluation]:
    def make(_: Path) -> Evaluation:
        torch.manual_seed(dist.get_rank())
        return Evaluation([paired(4)], prefix=prefix, **settings)

    return make


def freeze_during_the_run(unlike: bool, _: Path) -> None:
    trainer = built()
    tower = trainer.model.image if unlike else trainer.model.text
    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: tower.requires_grad_(False))
    ran(trainer, max_epochs=3)


def freeze_before_the_first_update(unlike: bool, _: Path) -> None:
    trainer = built()
    if unlike:
        layer = trainer.model.image[0]
        trainer.add_event_handler(Events.STARTED, lambda: layer.requires_grad_(False))
    ran(trainer)


def two_evaluations(unlike: bool, folder: Path) -> None:
    ran(built(evaluation(every=2 if unlike else 1)(folder)))


def own_task(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return tasks.image_text(model, batch)


class OwnHandler:
    """A handler without a base class, which declares that it communicates."""

    collective = True

    def attach(self, trainer: Trainer) -> None:
        trainer.add_event_handler(Events.STARTED, dist.barrier)


def clipping(_: Path) -> GradientClipping:
    return GradientClipping(max_norm=1.0)


REFUSED: dict[str, tuple[Script, tuple[str, ...]]] = {
    "evaluation": (
        with_handlers(alone=[evaluation("unseen")]),
        ("handlers.Evaluation[unseen] absent on rank 0 and present on rank 1",),
    ),
    "evaluation when": (two_evaluations, ("Evaluation[val].every 1 on rank 0 and 2 on rank 1",)),
    "checkpoints": (
        with_handlers(alone=[lambda folder: CheckpointManager(folder / "own")]),
        ("handlers.CheckpointManager absent on rank 0",),
    ),
    "clipping": (
        with_handlers(alone=[clipping]),
        ("handlers.GradientClipping absent on rank 0",),
    ),
    "average": (
        with_handlers([evaluation()], alone=[lambda _: WeightAverage()]),
        ("handlers.WeightAverage absent on rank 0",),
    ),
    "published values": (
        with_handlers(alone=[lambda _: InBatchAccuracy(features=("image", "text"))]),
        ("handlers.InBatchAccuracy",),
    ),
    "own handler": (
        with_handlers(alone=[lambda _: OwnHandler()]),
        ("handlers.OwnHandler absent on rank 0",),
    ),
    "order": (other_order, ("order ['GradientClipping', 'LearningRate'] on rank 0",)),
    "frozen": (
        with_model(lambda model: model.image[0].requires_grad_(False)),
        (
            "requires_grad.image.0.weight True on rank 0 and False on rank 1",
            "requires_grad.image.0.bias True on rank 0",
        ),
    ),
    "frozen by a function": (
        freeze_before_the_first_update,
        (
            "the trainable parameters must be the same",
            "image.0.weight True on rank 0 and False on rank 1; image.0.bias True on rank 0",
        ),
    ),
    "frozen during the run": (
        freeze_during_the_run,
        (
            "image.0.weight True on rank 0 and False on rank 1",
            "text.0.weight False on rank 0 and True on rank 1",
        ),
    ),
    "eval mode": (
        with_model(lambda model: model.text.eval()),
        ("training.model.text True on rank 0 and False on rank 1",),
    ),
    "activation": (
        with_model(replace_activation),
        ("modules.model.image.1.class", "Tanh on rank 0 and torch", "ReLU on rank 1"),
    ),
    "structure": (
        lambda unlike, _: built(
            model=nn.Sequential(nn.Linear(IMAGE, FEATURES + unlike)).double(), loss=nn.MSELoss()
        ),
        (
            "the parameters and buffers must be the same",
            "model.0.weight float64 (4, 6) on rank 0 and float64 (5, 6) on rank 1",
        ),
    ),
    "rate": (other_rate, ("optimizer.groups.0.lr 0.1 on rank 0 and 0.2 on rank 1",)),
    "micro-batches": (
        with_parts(microbatch_size=lambda unlike: 2 if unlike else 4),
        ("trainer.microbatch_size 4 on rank 0 and 2 on rank 1",),
    ),
    "seed": (
        with_parts(seed=lambda unlike: 4 if unlike else 3),
        ("trainer.seed 3 on rank 0 and 4 on rank 1",),
    ),
    "task": (
        with_parts(
            task=lambda unlike: (lambda m, b: m(*b.values())) if unlike else tasks.image_text
        ),
        ("task",),
    ),
    "transform": (
        with_parts(transform=lambda unlike: OwnNoise(0, 0.2 if unlike else 0.1)),
        ("transform.size 0.1 on rank 0 and 0.2 on rank 1",),
    ),
    "order of the data": (other_seed_of_the_order, ("loader.seed 7 on rank 0 and 8 on rank 1",)),
    "epochs": (
        lambda unlike, _: ran(built(), max_epochs=2 + unlike),
        ("run.max_epochs 2 on rank 0 and 3 on rank 1",),
    ),
    "lengths": (
        lambda unlike, _: ran(built(), batches=2 + unlike),
        ("the length of an epoch must be the same on all ranks, got 2 on rank 0 and 3 on rank 1",),
    ),
}
"""Name: a script, and parts of the error that both ranks raise."""

ALLOWED: dict[str, Script] = {
    "sinks": with_handlers(
        alone=[lambda folder: JsonLines(folder / "one"), lambda _: ToLogger(lambda *_: None)]
    ),
    "handlers of other libraries": with_handlers(alone=[lambda _: Timer()]),
    "functions": lambda unlike, _: ran(with_function(unlike)),
    "other evaluation data": with_handlers([evaluation()]),
    "generators": with_parts(transform=lambda unlike: OwnNoise(5 + unlike)),
    "a loss with its rank": with_parts(loss=lambda _: WithRank().double()),
    "lengths, if epochs count iterations": shards_of_the_data,
    "directories": lambda unlike, folder: ran(
        built(CheckpointManager(folder / ("one" if unlike else "two")))
    ),
}
"""Scripts that differ in what may differ."""


def with_function(unlike: bool) -> Trainer:
    trainer = built()
    if unlike:
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: None)
    return trainer


def outcome(script: Script, folder: Path) -> str:
    """Return the error of a script on this rank; empty if it ran."""
    try:
        script(dist.get_rank() == 1, folder)
    except RuntimeError as error:
        return str(error)
    return ""


def outcomes(folder: Path) -> dict[str, str]:
    """Return the outcome of every script on one of the two ranks, by name."""
    scripts = {**{name: script for name, (script, _) in REFUSED.items()}, **ALLOWED}
    return {name: outcome(script, folder / name) for name, script in scripts.items()}
