"""An exception in any phase of a run: the next run gives what a run without it gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from ignite.engine import Events
from ignite.handlers import EMAHandler, PiecewiseLinear
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import DataLoader, Dataset

from diptych.engine import (
    EvaluationEvents,
    MetricsEvents,
    RunEvents,
    SeededLoader,
    StepEvents,
    Trainer,
    tasks,
)
from diptych.handlers import Evaluation, GradientClipping, WeightAverage

SAMPLES, BATCH, EPOCHS = 22, 4, 2
LENGTH = 6
KINDS = [RuntimeError, KeyboardInterrupt]


class Planted:
    """Calls that raise once, at a given time, each under a name.

    Attributes:
        at: the name of the call, and which of its calls raises; None: no call does.
    """

    def __init__(self, at: tuple[str, int] | None, kind: type[BaseException]) -> None:
        self.at, self.kind, self.calls = at, kind, 0

    def __call__(self, name: str) -> None:
        if self.at is not None and name == self.at[0]:
            self.calls += 1
            if self.calls == self.at[1]:
                self.at = None
                raise self.kind(name)


class Samples(Dataset[dict[str, Tensor]]):
    """Samples with noise from three global generators."""

    def __init__(self, planted: Planted) -> None:
        self.planted, self.broken = planted, 7

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        noise = random.random() + np.random.rand() + torch.rand(())
        if index == self.broken:
            self.planted("fetch")
        return {"image": torch.full((3,), index / 11) + noise, "label": torch.tensor(index % 2)}


class Noisy(nn.Module):
    """Adds noise of Python and NumPy; the raising part comes after the draws."""

    def __init__(self, planted: Planted) -> None:
        super().__init__()
        self.planted = planted

    def forward(self, x: Tensor) -> Tensor:
        x = x + random.gauss(0, 0.1) + np.random.randn() / 10
        if self.training:
            self.planted("forward")
            x.register_hook(lambda _: self.planted("backward"))
        else:
            self.planted("evaluation")
        return x


class QueueLoss(nn.Module):
    """Cross entropy with a small queue in place, a large one, and a centre that is replaced."""

    def __init__(self, planted: Planted) -> None:
        super().__init__()
        self.planted = planted
        self.register_buffer("queue", torch.zeros(12, 2))
        self.register_buffer("large", torch.zeros(40_000, 2))
        self.register_buffer("constant", torch.ones(70_000))
        self.register_buffer("centre", torch.zeros(2))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        near = (self.queue.mean() + self.large.sum() + self.centre.sum()) * self.constant[0]
        if self.training:
            with torch.no_grad():
                for queue in (self.queue, self.large):
                    rows = (int(self.place) + torch.arange(len(logits))) % len(queue)
                    queue[rows] = logits.detach() / 100
                self.centre = 0.9 * self.centre + 0.1 * logits.detach().mean(0)
                self.place += len(logits)
            self.planted("loss")
        return F.cross_entropy(logits, labels) + 0.1 * near * logits.mean()


def noise(batch: dict[str, Tensor], planted: Planted) -> dict[str, Tensor]:
    """Return the batch with noise; raise after the draw if it is planned."""
    changed = {**batch, "image": batch["image"] + 0.1 * torch.randn_like(batch["image"])}
    planted("transform")
    return changed


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.02),
    "momentum": lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.9),
}


@attrs.define
class Run:
    """A training with everything that draws, counts or remembers, and its records.

    Attributes:
        planted: the call that raises.
        records: each published record.
        calls: the calls of the handlers that follow the weights.
    """

    planted: Planted
    optimizer: str = "adamw"
    settings: dict[str, Any] = attrs.field(factory=dict)
    loader_kind: str = "seeded"
    records: list[Any] = attrs.field(factory=list)
    calls: list[tuple[str, int]] = attrs.field(factory=list)
    trainer: Trainer = attrs.field(init=False)
    average: EMAHandler = attrs.field(init=False)
    loader: Any = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(
            spectral_norm(nn.Linear(3, 8)),
            nn.BatchNorm1d(8),
            nn.Dropout(0.3),
            Noisy(self.planted),
            nn.Linear(8, 2),
        )
        optimizer = OPTIMIZERS[self.optimizer](model.parameters())
        optimizer.register_step_pre_hook(lambda *_: self.planted("before the optimizer"))
        self.trainer = trainer = Trainer(
            model,
            QueueLoss(self.planted),
            optimizer,
            task=tasks.classification,
            transform=lambda batch: noise(batch, self.planted),
            device="cpu",
            seed=5,
            log_every=4,
            **self.settings,
        )
        optimizer.register_step_post_hook(lambda *_: self.planted("after the optimizer"))
        self.loader = self.make_loader()
        trainer.attach(
            GradientClipping(max_norm=1.0),
            WeightAverage(decay=0.9),
            Evaluation([next(iter(SeededLoader(Samples(Planted(None, OSError)), BATCH)))], every=3),
        )
        self.attach_ignite()
        for event in self.events():
            trainer.add_event_handler(event, self.note, event.name)
            trainer.add_event_handler(event, self.fail, event.name)
            trainer.add_event_handler(event, self.note, f"{event.name}, last")
        trainer.add_event_handler(
            MetricsEvents.LOGGED, lambda: self.records.append(trainer.metrics.record)
        )

    def attach_ignite(self) -> None:
        """Attach a schedule and an average of Ignite, which count their calls."""
        schedule = PiecewiseLinear(self.trainer.optimizer, "lr", [(0, 0.01), (8, 0.05), (12, 0.0)])
        self.trainer.add_event_handler(Events.ITERATION_STARTED, schedule)
        self.average = EMAHandler(self.trainer.model, momentum=0.2)
        self.average.attach(self.trainer)

    @staticmethod
    def events() -> list[Any]:
        """Return the events with a handler that may raise."""
        own = [event for event in Events if event.name not in LEFT_OUT]
        more = [EvaluationEvents.EVALUATED, MetricsEvents.LOGGED, MetricsEvents.EPOCH_PUBLISHED]
        return [*own, *StepEvents, *more, RunEvents.SAFE_POINT]

    def note(self, trainer: Trainer, name: str) -> None:
        """Note a call, and publish a value."""
        trainer.metrics.update({f"own/{name}": float(trainer.state.iteration)})
        self.calls.append((name, trainer.state.iteration))

    def fail(self, _: Trainer, name: str) -> None:
        """Raise if it is planned."""
        self.planted(name)

    def make_loader(self) -> Any:
        """Return a loader; a torch loader draws its order from the global generator."""
        samples = Samples(self.planted)
        if self.loader_kind == "seeded":
            return SeededLoader(samples, BATCH, seed=3)
        return DataLoader(samples, BATCH, shuffle=True)

    def play(self, kind: type[BaseException] | None = None) -> dict[str, Any]:
        """Train to the end, catch an exception on the way, and return all that is to be equal."""
        if kind is not None:
            with pytest.raises(kind):
                self.trainer.run(self.loader, max_epochs=EPOCHS)
            assert self.planted.at is None
        self.trainer.run(self.loader, max_epochs=EPOCHS)
        return self.state()

    def state(self) -> dict[str, Any]:
        """Return weights, buffers, optimizer, average, records, histories and the generators."""
        trainer = self.trainer
        return {
            "model": _copied(trainer.model.state_dict()),
            "loss": _copied(trainer.loss.state_dict()),
            "optimizer": trainer.optimizer.state_dict(),
            "average": _copied(self.average.ema_model.state_dict()),
            "records": self.records,
            "history": trainer.metrics.state_dict()["history"],
            "generators": (random.getstate(), np.random.get_state()[1:], torch.get_rng_state()),
        }


LEFT_OUT = {"EXCEPTION_RAISED", "TERMINATE", "INTERRUPT", "TERMINATE_SINGLE_EPOCH"}
LEFT_OUT |= {"DATALOADER_STOP_ITERATION"}


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in state.items() if isinstance(value, Tensor)}


def same(one: Any, other: Any) -> bool:
    """Return whether two nested structures hold the same values, bit for bit."""
    if isinstance(one, (Tensor, np.ndarray)):
        return bool((torch.as_tensor(one) == torch.as_tensor(other)).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of the parts that differ."""
    return [key for key in one if not same(one[key], other[key])]


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """The state after a run without an exception."""
    return Run(Planted(None, OSError)).play()


PHASES = ["fetch", "transform", "forward", "loss", "backward"]
HOOKS = ["before the optimizer", "after the optimizer"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("time", [1, 2])
@pytest.mark.parametrize("name", [*PHASES, *HOOKS, "evaluation"])
def test_an_exception_in_a_phase_changes_nothing(name, time, kind, whole):
    found = Run(Planted((name, time), kind)).play(kind)

    assert differences(found, whole) == []


@pytest.mark.parametrize("time", [1, 2])
@pytest.mark.parametrize("event", Run.events(), ids=lambda event: event.name)
def test_an_exception_in_an_event_changes_nothing(event, time, whole):
    times = {Events.STARTED: 1, Events.COMPLETED: 1}
    time = min(time, times.get(event, time))
    found = Run(Planted((event.name, time), KeyboardInterrupt)).play(KeyboardInterrupt)

    assert differences(found, whole) == []


@pytest.mark.parametrize("index", [0, 7, 21])
@pytest.mark.parametrize("kind", ["seeded", "torch"])
def test_a_batch_that_could_not_be_read_is_read_again(kind, index):
    expected = Run(Planted(None, OSError), loader_kind=kind).play()
    for time in (1, 2):
        run = Run(Planted(("fetch", time), OSError), loader_kind=kind)
        run.loader.dataset.broken = index

        assert differences(run.play(OSError), expected) == []
