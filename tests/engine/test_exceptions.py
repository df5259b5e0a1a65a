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
    CompositeOptimizer,
    EvaluationEvents,
    MetricsEvents,
    ResumeError,
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
            if x.requires_grad:  # the first pass over micro-batches has no graph
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
                    queue[rows] = logits.detach().float() / 100
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


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("settings", [{"microbatch_size": 2}, {"precision": "bf16"}])
@pytest.mark.parametrize("name", ["loss", "backward", "before the optimizer", "OPTIMIZER_STEPPED"])
def test_micro_batches_precisions_and_optimizers_are_undone_too(name, settings, optimizer):
    expected = Run(Planted(None, OSError), optimizer, settings).play()
    found = Run(Planted((name, 3), OSError), optimizer, settings).play(OSError)

    assert differences(found, expected) == []


def small(optimizer: Any = torch.optim.SGD, **settings: Any) -> tuple[Trainer, list[Any]]:
    """Return a trainer of one layer with dropout, and two batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.2), nn.Linear(4, 2))
    data = [{"image": torch.randn(4, 3), "label": torch.arange(4) % 2} for _ in range(2)]
    settings = {"task": tasks.classification, "device": "cpu", "seed": 1, **settings}
    optimizer = optimizer(model.parameters(), lr=0.1)
    return Trainer(model, nn.CrossEntropyLoss(), optimizer, **settings), data


class CutOff(torch.optim.SGD):
    """Raises after it has changed some of the weights, or before it has changed any."""

    at: str | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if self.at == "inside":
            self.param_groups[0]["params"][1].mul_(0.5)
        if self.at is not None:
            self.at = None
            raise KeyboardInterrupt
        return super().step(closure)


@pytest.mark.parametrize("settings", [{}, {"precision": "fp16"}])
def test_an_update_that_was_cut_off_is_refused_until_a_state_is_loaded(settings):
    trainer, data = small(CutOff, **settings)
    weights, position = _copied(trainer.model.state_dict()), trainer.state_dict()
    trainer.optimizer.at = "inside"
    with pytest.raises(KeyboardInterrupt):
        trainer.run(data, max_epochs=1)
    for _ in range(2):
        with pytest.raises(ResumeError, match="after it had changed some of the weights"):
            trainer.run(data, max_epochs=1)
    trainer.model.load_state_dict(weights)
    trainer.load_state_dict({**position, "max_epochs": 1})
    trainer.run(data, max_epochs=1)
    expected, data = small(**settings)
    expected.run(data, max_epochs=1)
    assert same(trainer.model.state_dict(), expected.model.state_dict())


@pytest.mark.parametrize("settings", [{}, {"precision": "fp16"}])
def test_an_update_that_raises_before_it_has_changed_a_weight_is_repeated(settings):
    trainer, data = small(CutOff, **settings)
    trainer.optimizer.at = "before"
    with pytest.raises(KeyboardInterrupt):
        trainer.run(data, max_epochs=1)
    trainer.run(data, max_epochs=1)
    expected, data = small(**settings)
    expected.run(data, max_epochs=1)
    assert same(trainer.model.state_dict(), expected.model.state_dict())


class Overflowing(nn.Module):
    """A loss whose gradient overflows in fp16 at the first call."""

    def __init__(self, planted: Planted) -> None:
        super().__init__()
        self.planted, self.calls = planted, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.seen += 1
        self.planted("loss")
        value = F.cross_entropy(logits, labels)
        return value * torch.where(self.seen == 2, torch.inf, 1.0)


@pytest.mark.parametrize("time", [1, 2, 3])
@pytest.mark.parametrize("name", ["loss", *(event.name for event in StepEvents)])
def test_the_scaler_and_its_skipped_updates_are_those_of_a_whole_run(name, time):
    def play(at: tuple[str, int] | None) -> dict[str, Any]:
        planted = Planted(at, OSError)
        trainer, data = small(precision="fp16")
        trainer.loss = Overflowing(planted)
        for event in StepEvents:
            trainer.add_event_handler(event, lambda _, name=event.name: planted(name))
        if at is not None:
            with pytest.raises(OSError, match=name):
                trainer.run(data, max_epochs=2)
        trainer.run(data, max_epochs=2)
        assert trainer.scaler is not None
        return {
            "model": _copied(trainer.model.state_dict()),
            "scaler": trainer.scaler.state_dict(),
            "skipped": trainer.skipped_steps.item(),
            "iteration": trainer.state.iteration,
        }

    expected = play(None)
    assert expected["skipped"] == 1
    assert differences(play((name, time)), expected) == []


@attrs.define
class OwnStep:
    """A step of the user's own, and handlers of its last event; one of them raises once.

    Attributes:
        place: where: before the update, between it and its event, in that event; None: nowhere.
        seen: the iterations in which the handlers were called, the second one's negative.
    """

    place: str | None
    seen: list[int] = attrs.field(factory=list)

    def fail_at(self, place: str, trainer: Trainer) -> None:
        """Raise in the second iteration if this is the place."""
        if self.place == place and trainer.state.iteration == 2:
            self.place = None
            raise OSError(place)

    def __call__(self, trainer: Trainer, batch: Any) -> None:
        output = trainer.task(trainer.model, batch)
        trainer.optimizer.zero_grad()
        trainer.loss(*output.values()).backward()
        self.fail_at("before", trainer)
        trainer.optimizer.step()
        self.fail_at("between", trainer)
        trainer.fire_event(StepEvents.OPTIMIZER_STEPPED)

    def play(self) -> tuple[dict[str, Tensor], list[int], int]:
        """Train; return weights, calls and iterations."""
        trainer, data = small(step=self)
        last = StepEvents.OPTIMIZER_STEPPED
        trainer.add_event_handler(last, lambda: self.seen.append(trainer.state.iteration))
        trainer.add_event_handler(last, lambda: self.fail_at("after", trainer))
        trainer.add_event_handler(last, lambda: self.seen.append(-trainer.state.iteration))
        if self.place is not None:
            with pytest.raises(OSError, match=self.place):
                trainer.run(data, max_epochs=2)
        trainer.run(data, max_epochs=2)
        return _copied(trainer.model.state_dict()), self.seen, trainer.state.iteration


@pytest.mark.parametrize("place", ["before", "between", "after"])
def test_a_step_of_the_users_own_counts_once_it_has_made_an_update(place, caplog):
    expected = OwnStep(None).play()
    assert same(OwnStep(place).play(), expected)
    assert expected[1:] == ([1, -1, 2, -2, 3, -3, 4, -4], 4)
    assert ("The update counts" in caplog.text) == (place != "before")


def test_a_large_buffer_that_changes_for_the_first_time_is_not_silently_wrong():
    class Late(nn.Module):
        """A loss that changes a large buffer from its third call on."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.register_buffer("table", torch.zeros(70_000))

        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            self.calls += 1
            if self.calls >= 3:
                self.table[0] += 1
            if self.calls == 3:
                raise OSError("planned")
            return F.cross_entropy(logits, labels)

    trainer, data = small()
    trainer.loss = Late()
    with pytest.raises(OSError, match="planned"):
        trainer.run(data, max_epochs=2)
    with pytest.raises(ResumeError, match="buffers table, which had never changed before"):
        trainer.run(data, max_epochs=2)


def test_an_update_outside_of_a_run_that_raises_is_not_continued_with_another_batch():
    planted = Planted(("OPTIMIZER_STEPPED", 1), OSError)
    trainer, data = small()
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEPPED, lambda: planted("OPTIMIZER_STEPPED"))
    with pytest.raises(OSError, match="OPTIMIZER_STEPPED"):
        trainer.make_update(data[0])
    trainer.make_update(data[1])
    other, data = small()
    for batch in data:
        other.make_update(batch)
    assert same(trainer.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("time", [1, 3])
@pytest.mark.parametrize("event", list(StepEvents), ids=lambda event: event.name)
def test_several_optimizers_are_continued_as_one(event, time):
    def play(at: tuple[str, int] | None) -> dict[str, Tensor]:
        planted = Planted(at, OSError)

        def both(weights: Any, lr: float) -> CompositeOptimizer:
            first, *rest = weights
            kinds = torch.optim.AdamW([first], lr=lr), torch.optim.SGD(rest, lr=lr, momentum=0.9)
            return CompositeOptimizer(*kinds)

        trainer, data = small(both)
        trainer.add_event_handler(event, lambda: planted(event.name))
        if at is not None:
            with pytest.raises(OSError, match=event.name):
                trainer.run(data, max_epochs=2)
        trainer.run(data, max_epochs=2)
        return _copied(trainer.model.state_dict())

    assert same(play((event.name, time)), play(None))


@pytest.mark.parametrize("own", [False, True], ids=["TrainStep", "own step"])
def test_an_exception_between_two_optimizers_is_refused_unless_the_step_calls_them_one_by_one(own):
    def both(weights: Any, lr: float) -> CompositeOptimizer:
        first, *rest = weights
        return CompositeOptimizer(torch.optim.SGD([first], lr=lr), CutOff(rest, lr=lr))

    def step(trainer: Trainer, batch: Any) -> None:
        trainer.optimizer.zero_grad()
        trainer.loss(*trainer.task(trainer.model, batch).values()).backward()
        for member in trainer.optimizer.members:
            member.step()

    trainer, data = small(both, step=step if own else None)
    trainer.optimizer.members[1].at = "before"
    with pytest.raises(KeyboardInterrupt):
        trainer.run(data, max_epochs=1)
    if own:
        trainer.run(data, max_epochs=1)
        assert trainer.state.iteration == len(data)
    else:
        with pytest.raises(ResumeError, match="after it had changed some of the weights"):
            trainer.run(data, max_epochs=1)
