"""An optimizer with train() and eval(): what is scored, exported, saved and trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from diptych.engine import CompositeOptimizer, SeededLoader, StepEvents, Trainer, tasks
from diptych.engine.optimizers.optimizer_modes import evaluation_weights, trained_weights
from diptych.handlers import CheckpointManager, Evaluation


class Averaging(torch.optim.SGD):
    """SGD whose evaluation mode holds a running mean; as schedule-free, its flag is in the groups.

    The weights that are trained are y = 0.9 x + 0.1 z, of the mean x and plain SGD's z. Switching
    the mode computes one of x and y from the other, which rounds.
    """

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["train_mode"] = False

    def switch(self, *, to_train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != to_train:
                group["train_mode"] = to_train
                for p in group["params"]:
                    if "z" in self.state[p]:
                        weight = 0.1 if to_train else 1 - 1 / 0.9
                        with torch.no_grad():
                            p.lerp_(self.state[p]["z"], weight)

    def train(self) -> None:
        self.switch(to_train=True)

    def eval(self) -> None:
        self.switch(to_train=False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert group["train_mode"], "an update needs training mode"
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, 1 - 1 / 0.9)  # x
                z.add_(p.grad, alpha=-group["lr"])
                p.lerp_(z, 0.2)  # the new x
                p.lerp_(z, 0.1)  # the new y


class Swapping(torch.optim.SGD):
    """SGD that swaps a running mean with the weights, and whose mode is an attribute."""

    mode = "train"

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert self.mode == "train", "an update needs training mode"
        super().step()
        for p in self.held():
            self.state[p].setdefault("mean", p.clone()).lerp_(p, 0.2)

    def held(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def swap(self, mode: str) -> None:
        if self.mode != mode:
            self.mode = mode
            for p in self.held():
                if "mean" in self.state[p]:
                    weights = p.clone()
                    p.copy_(self.state[p]["mean"])
                    self.state[p]["mean"].copy_(weights)

    def train(self) -> None:
        self.swap("train")

    def eval(self) -> None:
        self.swap("eval")


def composite(params: Any, lr: float) -> CompositeOptimizer:
    first, *rest = params
    return CompositeOptimizer(torch.optim.SGD([first], lr=lr), Swapping(rest, lr=lr))


every_kind = pytest.mark.parametrize("kind", [Averaging, Swapping, composite])


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Random images with labels."""

    def __init__(self, seed: int = 0) -> None:
        self.images = torch.randn(24, 3, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.images[index], "label": torch.tensor(index % 2)}


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def make_trainer(kind: Any, *handlers: Any) -> Trainer:
    model = make_model()
    settings = {"task": tasks.classification, "device": "cpu", "seed": 2}
    optimizer = kind(model.parameters(), lr=0.5)
    return Trainer(model, nn.CrossEntropyLoss(), optimizer, **settings).attach(*handlers)


def loader(seed: int = 0, *, shuffle: bool = True) -> SeededLoader:
    return SeededLoader(Samples(seed), batch_size=4, seed=5, shuffle=shuffle)


def held_out() -> Evaluation:
    return Evaluation(loader(3, shuffle=False))


def loss_of(model: nn.Module) -> float:
    held = Samples(3)
    labels = torch.arange(24) % 2
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(held.images), labels))


def weights(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def evaluated(optimizer: Any, model: nn.Module) -> float:
    """Return the loss of the evaluation weights, without the library's contexts."""
    optimizer.eval()
    value = loss_of(model)
    optimizer.train()
    return value


@every_kind
def test_the_score_is_that_of_the_evaluation_weights(kind):
    trainer = make_trainer(kind, held_out())
    trainer.run(loader(), max_epochs=2)
    (score,) = trainer.metrics.get_history("val/loss")[-1:]
    assert score == pytest.approx(evaluated(trainer.optimizer, trainer.model), abs=1e-5)
    assert abs(score - loss_of(trainer.model)) > 1e-4


def beside_another(kind: Any, *handlers: Any) -> tuple[Trainer, Any]:
    """Return a trainer of the first weight, and an optimizer of the rest that a function steps."""
    trainer = make_trainer(lambda params, lr: torch.optim.SGD([next(params)], lr), *handlers)
    other = kind(list(trainer.model.parameters())[1:], lr=0.5)
    trainer.add_event_handler(StepEvents.OPTIMIZER_STEPPED, other.step)
    return trainer, other


@pytest.mark.parametrize("kind", [Averaging, Swapping])
def test_an_optimizer_beside_the_trainers_is_evaluated_and_exported_in_its_own_mode(kind, tmp_path):
    manager = CheckpointManager(tmp_path, best="val/loss", mode="min", keep=1, export=True)
    trainer, other = beside_another(kind, held_out(), manager)
    trainer.run(loader(), max_epochs=2)
    scores = trainer.metrics.get_history("val/loss")
    assert scores[-1] == pytest.approx(evaluated(other, trainer.model), abs=1e-5)
    assert abs(scores[-1] - loss_of(trainer.model)) > 1e-4
    fresh = make_model()
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert loss_of(fresh) == pytest.approx(min(scores), abs=1e-5)


@every_kind
def test_an_evaluation_does_not_change_the_run(kind):
    plain, watched = make_trainer(kind), make_trainer(kind, held_out())
    watched.attach(Evaluation(loader(4), every=2, prefix="often", at_start=True))
    for trainer in (plain, watched):
        trainer.run(loader(), max_epochs=2)
    for one, other in zip(weights(plain), weights(watched), strict=True):
        assert torch.equal(one, other)


@every_kind
def test_functions_of_a_user_may_switch_the_mode_too(kind):
    plain, switched = make_trainer(kind), make_trainer(kind, evaluation := held_out())
    optimizer: Any = switched.optimizer
    evaluation.evaluator.add_event_handler(Events.STARTED, lambda _: optimizer.eval())
    evaluation.evaluator.add_event_handler(Events.COMPLETED, lambda _: optimizer.train())
    plain.run(loader(), max_epochs=2)
    switched.run(loader(), max_epochs=2)
    for one, other in zip(weights(plain), weights(switched), strict=True):
        assert torch.equal(one, other)


@every_kind
@pytest.mark.parametrize("background", [False, True])
def test_the_exported_file_holds_the_weights_that_were_scored(kind, background, tmp_path):
    manager = CheckpointManager(
        tmp_path, best="val/loss", mode="min", keep=1, export=True, background=background
    )
    trainer = make_trainer(kind, held_out(), manager)
    trainer.run(loader(), max_epochs=4)
    fresh = make_model()
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    best = min(trainer.metrics.get_history("val/loss"))
    assert loss_of(fresh) == pytest.approx(best, abs=1e-5)


def test_an_export_that_a_killed_process_missed_is_made_from_the_checkpoint(tmp_path):
    def build() -> Trainer:
        manager = CheckpointManager(tmp_path, best="val/loss", mode="min", export=True)
        return make_trainer(Swapping, held_out(), manager)

    build().run(loader(), max_epochs=2)
    exported = tmp_path / "model.safetensors"
    expected = load_file(exported)
    exported.unlink()
    build().run(loader(), max_epochs=2)
    for key, value in load_file(exported).items():
        assert torch.equal(value, expected[key])


@every_kind
@pytest.mark.parametrize("stays_in_eval", [False, True])
def test_a_killed_run_resumes_exactly(kind, stays_in_eval, tmp_path):
    def build(folder: Path) -> Trainer:
        trainer = make_trainer(kind, held_out())
        optimizer: Any = trainer.optimizer
        if stays_in_eval:  # as in a plain loop, which trains, evaluates, and saves what it sees
            trainer.add_event_handler(Events.EPOCH_STARTED, lambda _: optimizer.train())
            trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: optimizer.eval())
        return trainer.attach(CheckpointManager(folder))

    whole, first = build(tmp_path / "whole"), build(tmp_path / "cut")
    whole.run(loader(), max_epochs=4)
    first.add_event_handler(Events.EPOCH_COMPLETED(once=2), lambda t: t.terminate())
    first.run(loader(), max_epochs=4)
    again = build(tmp_path / "cut")
    again.run(loader(), max_epochs=4)
    assert again.metrics.get_history("val/loss") == whole.metrics.get_history("val/loss")
    for one, other in zip(weights(again), weights(whole), strict=True):
        assert torch.equal(one, other)


@every_kind
def test_a_run_puts_the_optimizer_into_training_mode(kind):
    trainer = make_trainer(kind)
    optimizer: Any = trainer.optimizer
    optimizer.eval()
    trainer.run(loader(), max_epochs=1)
    optimizer.eval()
    trainer.run(loader(), max_epochs=2)


def stepped(kind: Any) -> tuple[nn.Module, Any]:
    model = make_model()
    optimizer = kind(model.parameters(), lr=0.5)
    optimizer.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(Samples().images).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model, optimizer


@every_kind
def test_contexts_nest_and_restore_after_an_error(kind):
    model, optimizer = stepped(kind)
    trained = [p.detach().clone() for p in model.parameters()]
    expected = evaluated(*reversed(stepped(kind)))
    with pytest.raises(RuntimeError, match="inside"), evaluation_weights(optimizer):  # noqa: PT012
        assert loss_of(model) == expected
        with evaluation_weights(optimizer):
            optimizer.eval()
        assert loss_of(model) == expected
        with trained_weights(optimizer):
            assert all(map(torch.equal, model.parameters(), trained))
        assert loss_of(model) == expected
        raise RuntimeError("inside")
    assert all(map(torch.equal, model.parameters(), trained))
    optimizer.step()


@every_kind
def test_a_context_leaves_an_optimizer_in_evaluation_mode_as_it_was(kind):
    model, optimizer = stepped(kind)
    optimizer.eval()
    before = [p.detach().clone() for p in model.parameters()]
    with evaluation_weights(optimizer):
        pass
    with trained_weights(optimizer):
        assert not all(map(torch.equal, model.parameters(), before))
    assert all(map(torch.equal, model.parameters(), before))
    optimizer.train()
    optimizer.step()


@every_kind
def test_weights_that_are_no_numbers_do_not_hide_the_mode(kind):
    model, optimizer = stepped(kind)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with evaluation_weights(optimizer):
        pass
    optimizer.step()  # still in training mode


def test_an_optimizer_without_modes_is_left_alone():
    parameter = nn.Parameter(torch.ones(1))
    optimizer: Optimizer = torch.optim.SGD([parameter], lr=1.0)
    with evaluation_weights(optimizer), trained_weights(optimizer):
        assert parameter == 1
    both = CompositeOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0), optimizer)
    with evaluation_weights(both):
        assert parameter == 1
