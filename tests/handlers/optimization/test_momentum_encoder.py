"""MomentumEncoder against plain arithmetic in float64."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import Tensor, nn

from diptych.engine import SeededLoader, StepEvents, Trainer, certify
from diptych.handlers import CheckpointManager, Evaluation
from diptych.handlers.optimization.momentum_encoder import MomentumEncoder
from diptych.losses import MoCoLoss
from tests.handlers.runs import Squares, Stop, kept_records, stop_at


class TwoEncoders(nn.Module):
    """An encoder with a batch norm, and another one of the same structure."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.target = copy.deepcopy(self.online)
        nn.init.zeros_(self.target[0].weight)


def queries_and_keys(model: TwoEncoders, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        keys = model.target(batch["image"].flip(1))
    return {"query": model.online(batch["image"]), "key": keys}


def make_loader(batches: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"image": image} for image in torch.randn(batches, 4, 3, generator=generator)]


def make_trainer(model: nn.Module | None = None, **settings: Any) -> Trainer:
    torch.manual_seed(1)
    model = TwoEncoders() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)
    loss = MoCoLoss(dim=2, queue_size=8)
    return Trainer(model, loss, optimizer, task=queries_and_keys, device="cpu", seed=3, **settings)


def states_of(trainer: Trainer) -> list[dict[str, dict[str, Tensor]]]:
    """Return a list that fills with copies of both parts: at the start, after each update."""
    states: list[dict[str, dict[str, Tensor]]] = []

    def note() -> None:
        parts = dict(trainer.model.named_children())
        states.append({name: copy.deepcopy(part.state_dict()) for name, part in parts.items()})

    trainer.add_event_handler(Events.STARTED, note)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    return states


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_target_follows_by_the_recursion(schedule):
    trainer = make_trainer().attach(MomentumEncoder(momentum=0.8, schedule=schedule))
    states = states_of(trainer)
    trainer.run(make_loader(), max_epochs=2)
    for key in ("0.weight", "1.bias", "2.weight"):
        expected = states[0]["online"][key].double()
        for k, state in enumerate(states[1:]):
            m = 0.8
            if schedule == "cosine":
                m = 1 - (1 - 0.8) * (math.cos(math.pi * k / 12) + 1) / 2
            expected = m * expected + (1 - m) * state["online"][key].double()
            torch.testing.assert_close(state["target"][key].double(), expected, rtol=1e-5, atol=0)
        assert not torch.equal(states[-1]["target"][key], states[-1]["online"][key])


def test_a_run_starts_with_a_target_equal_to_the_online_part():
    trainer = make_trainer().attach(MomentumEncoder())
    states = states_of(trainer)
    trainer.run(make_loader(), max_epochs=1)
    for key, value in states[0]["online"].items():
        assert torch.equal(states[0]["target"][key], value), key


def test_running_statistics_are_averaged_and_counters_copied():
    model = TwoEncoders()
    trainer = make_trainer(model).attach(MomentumEncoder(momentum=0.5))
    means = []
    # The target's own forward pass moves its statistics before they follow.
    trainer.add_event_handler(
        "LOSS_COMPUTED",
        lambda: means.append([part[1].running_mean.clone() for part in model.children()]),
    )
    trainer.run(make_loader(1), max_epochs=1)
    online, target = means[0]
    torch.testing.assert_close(model.target[1].running_mean, (online + target) / 2)
    assert model.target[1].num_batches_tracked == model.online[1].num_batches_tracked == 1


def test_the_target_gets_no_gradient_and_no_weight_decay():
    trainer = make_trainer().attach(MomentumEncoder(momentum=0.0))
    trainer.run(make_loader(), max_epochs=1)
    assert not any(p.requires_grad for p in trainer.model.target.parameters())
    assert all(p.grad is None for p in trainer.model.target.parameters())
    for a, b in zip(
        trainer.model.online.parameters(), trainer.model.target.parameters(), strict=True
    ):
        assert torch.equal(a, b)


def test_a_skipped_update_does_not_move_the_target():
    trainer = make_trainer().attach(MomentumEncoder(momentum=0.5))

    @trainer.on("GRADIENTS_READY")
    def remove_gradients() -> None:
        if trainer.state.iteration == 3:
            for parameter in trainer.model.parameters():
                parameter.grad = None

    states = states_of(trainer)
    trainer.run(make_loader(), max_epochs=1)
    weights = [state["target"]["0.weight"] for state in states]
    assert [torch.equal(a, b) for a, b in itertools.pairwise(weights)].index(True) == 2


def test_the_target_keeps_the_mode_that_the_user_gave_it_over_evaluations_and_a_resume(tmp_path):
    def modes(epochs: int) -> set[tuple[bool, bool]]:
        model, found = TwoEncoders(), set[tuple[bool, bool]]()
        model.target.eval()
        trainer = make_trainer(model)
        held_out = Evaluation(make_loader(1), loss=False)
        trainer.attach(MomentumEncoder(momentum=0.9), held_out, CheckpointManager(tmp_path))
        trainer.add_event_handler(
            StepEvents.LOSS_COMPUTED,
            lambda: found.add((model.online.training, model.target[1].training)),
        )
        trainer.run(make_loader(2), max_epochs=epochs)
        return found

    assert modes(2) == {(True, False)}
    assert modes(3) == {(True, False)}


def test_the_momentum_is_published():
    trainer = make_trainer(log_every=1)
    trainer.attach(MomentumEncoder(momentum=0.6, schedule="cosine", total=4))
    records = kept_records(trainer)
    trainer.run(make_loader(), max_epochs=1)
    found = [record.values["train/momentum"] for record in records]
    cosine = [math.cos(math.pi * min(k, 4) / 4) for k in range(6)]
    assert found == pytest.approx([1 - 0.4 * (1 + c) / 2 for c in cosine])


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_an_interruption_does_not_change_the_target(schedule):
    def build() -> tuple[Trainer, SeededLoader]:
        handler = MomentumEncoder(momentum=0.8, schedule=schedule)
        return make_trainer().attach(handler), SeededLoader(Squares(), 4, seed=3)

    report = certify.interruption(build, steps=12, at=5)
    assert report.passed, str(report)


def test_a_killed_and_resumed_run_ends_with_the_target_of_an_uninterrupted_one(tmp_path):
    def run(folder: str, *, killed: bool = False) -> Trainer:
        trainer = make_trainer().attach(
            MomentumEncoder(momentum=0.8, schedule="cosine"),
            CheckpointManager(tmp_path / folder, every=2),
        )
        if killed:
            stop_at(trainer, 5)
        trainer.run(SeededLoader(Squares(), 4, seed=3), max_epochs=3)
        return trainer

    whole = run("whole").model.state_dict()
    with pytest.raises(Stop):
        run("killed", killed=True)
    for key, value in run("killed").model.state_dict().items():
        assert torch.equal(value, whole[key]), key


def test_parts_are_found_by_path_or_by_function():
    model = nn.ModuleDict({"a": TwoEncoders(), "b": TwoEncoders()})
    handler = MomentumEncoder(online="a.online", target=lambda model: model["b"].online)
    make_trainer(model).attach(handler)
    assert not any(p.requires_grad for p in model["b"].online.parameters())
    assert all(p.requires_grad for p in model["a"].parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "keys"}, "must be parts of the model, got 'keys'; there are online, online.0"),
        ({"target": "online"}, "target must share no tensor with online"),
        ({"target": "online.0"}, "target must share no tensor with online"),
        ({"online": "online.0", "target": "target.2"}, "a difference in bias, weight"),
        ({"target": lambda _: nn.Linear(3, 4)}, "must be modules of the model"),
    ],
)
def test_parts_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer().attach(MomentumEncoder(**arguments))


@pytest.mark.filterwarnings("ignore:model has .* in float16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_target_in_half_precision_is_refused(dtype):
    with pytest.raises(ValueError, match="at least the precision of float32, got torch"):
        make_trainer(TwoEncoders().to(dtype)).attach(MomentumEncoder())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"schedule": "linear"}, "schedule"),
        ({"total": 0}, "total"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MomentumEncoder(**arguments)


def test_a_cosine_without_a_length_is_refused():
    trainer = make_trainer().attach(MomentumEncoder(schedule="cosine"))
    with pytest.raises(ValueError, match="a cosine schedule needs the length of the run"):
        trainer.run((batch for batch in make_loader()), max_epochs=1)


def test_a_finished_cosine_stays_at_its_end_when_the_run_is_extended(tmp_path, caplog):
    def build(**settings: Any) -> Trainer:
        handler = MomentumEncoder(momentum=0.8, schedule="cosine", **settings)
        return make_trainer(log_every=1).attach(handler, CheckpointManager(tmp_path))

    build().run(SeededLoader(Squares(), 4, seed=3), max_epochs=2)
    trainer = build()
    records = kept_records(trainer)
    trainer.run(SeededLoader(Squares(), 4, seed=3), max_epochs=3)
    done = trainer.state.iteration * 2 // 3
    momenta = {r.step: r.values["train/momentum"] for r in records}
    assert momenta == dict.fromkeys(range(done + 1, trainer.state.iteration + 1), 1.0)
    assert f"The schedule of the momentum has {done} iterations" in caplog.text
    assert "to MomentumEncoder" in caplog.text


def follow_on_a_rank(half: int) -> dict[str, Tensor]:
    """Train on this rank's half of each batch; return the weights of both parts."""
    trainer = make_trainer().attach(MomentumEncoder(momentum=0.8))
    batches = [{"image": b["image"][2 * half : 2 * half + 2]} for b in make_loader()]
    trainer.run(batches, max_epochs=1)
    return {name: p.detach() for name, p in trainer.model.named_parameters()}


def test_all_ranks_have_the_same_target(ranks):
    first, second = ranks.run(follow_on_a_rank, [(0,), (1,)])
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(second[key], value), key
    assert not torch.equal(first["target.0.weight"], first["online.0.weight"])
