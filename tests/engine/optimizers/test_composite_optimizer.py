"""CompositeOptimizer: equal to its members alone, bit for bit, behind the interface of one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import Tensor, nn
from torch.optim import Optimizer

from diptych.engine import (
    CheckpointError,
    CompositeOptimizer,
    SeededLoader,
    Trainer,
    TrainStep,
    certify,
    tasks,
)
from diptych.engine.step.train_step import check_fp16
from diptych.handlers import (
    CheckpointManager,
    GradientClipping,
    GradientDiagnostics,
    LearningRate,
    LossGuard,
    WeightAverage,
)
from diptych.losses import CLIPLoss, share_logit_scale
from tests.engine import sharded


def make_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def make_members(
    model: nn.Sequential, lr: float = 0.1, *, fused: bool = False
) -> tuple[Optimizer, Optimizer]:
    groups = [
        {"params": model[0].parameters(), "name": "stem"},
        {"params": [model[2].bias], "lr": lr / 2, "name": "bias"},
    ]
    kind = (
        torch.optim.Adam if fused else torch.optim.SGD
    )  # a fused SGD may not skip its first update
    settings: dict[str, Any] = {"fused": True} if fused else {"momentum": 0.9}
    first = kind(groups, lr=lr, **settings)
    rest = [model[2].weight, *model[4].parameters()]
    second = torch.optim.AdamW(rest, lr=lr / 10, fused=fused)
    return first, second


def make_batches(count: int = 6, *, bad: int | None = None) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 4, 3, generator=generator)
    if bad is not None:
        images[bad, 0, 0] = float("nan")
    return [{"image": image, "label": torch.arange(4) % 2} for image in images]


def make_trainer(model: nn.Module, optimizer: Optimizer, **settings: Any) -> Trainer:
    loss = nn.CrossEntropyLoss()
    settings = {"task": tasks.classification, "device": "cpu", "seed": 3, **settings}
    return Trainer(model, loss, optimizer, log_every=1, **settings)


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["image"]), batch["label"])


def plain_loop(model: nn.Sequential, members: tuple[Optimizer, ...], epochs: int = 1) -> None:
    """Train without the library: both optimizers step after each batch."""
    for batch in make_batches() * epochs:
        for member in members:
            member.zero_grad()
        loss_of(model, batch).backward()
        for member in members:
            member.step()


def assert_equal_weights(model: nn.Module, other: nn.Module) -> None:
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_a_trainer_equals_a_plain_loop_over_the_members():
    expected, model = make_model(), make_model()
    plain_loop(expected, make_members(expected), epochs=2)
    make_trainer(model, CompositeOptimizer(*make_members(model))).run(make_batches(), max_epochs=2)
    assert_equal_weights(model, expected)


def test_the_groups_are_those_of_the_members_and_stay_live():
    model = make_model()
    composite = CompositeOptimizer(*(members := make_members(model)))
    assert [group.get("name") for group in composite.param_groups] == ["stem", "bias", None]
    assert composite.param_groups[2] is members[1].param_groups[0]
    composite.param_groups[1]["lr"] = 7.0
    assert members[0].param_groups[1]["lr"] == 7.0
    members[0].load_state_dict(members[0].state_dict())  # replaces its groups
    assert composite.param_groups[0] is members[0].param_groups[0]


def test_added_groups_come_last_and_need_a_member():
    model, extra = make_model(), [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    composite = CompositeOptimizer(*(members := make_members(model)))
    with pytest.raises(ValueError, match=r"one of the 2 members, got None\. Pass"):
        composite.add_param_group({"params": [extra[0]]})
    composite.add_param_group({"params": extra[0], "name": "late"}, member=0)
    composite.add_param_group({"params": [extra[1]], "name": "later", "member": 1})
    members[0].add_param_group({"params": [extra[2]], "name": "last"})
    names = [group.get("name") for group in composite.param_groups]
    assert names == ["stem", "bias", None, "late", "later", "last"]
    assert members[0].param_groups[2] is composite.param_groups[3]
    with pytest.raises(ValueError, match="a member holds already"):
        composite.add_param_group({"params": [extra[1]]}, member=0)


def test_groups_can_be_taken_away_again():
    composite = CompositeOptimizer(*make_members(make_model()))
    before = composite.param_groups
    composite.add_param_group({"params": [nn.Parameter(torch.zeros(1))]}, member=0)
    composite.param_groups = before
    assert all(a is b for a, b in zip(composite.param_groups, before, strict=True))
    assert len(composite.members[0].param_groups) == 2


def test_a_state_has_torchs_layout_and_continues_exactly(tmp_path):
    expected, first = make_model(), make_model()
    plain_loop(expected, make_members(expected), epochs=2)
    composite = CompositeOptimizer(*make_members(first))
    plain_loop(first, (composite,))
    state = composite.state_dict()
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    assert numbers == list(range(6))
    held = [p for group in composite.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        shapes = {value.shape for value in values.values() if value.ndim}
        assert shapes == {held[number].shape}
    torch.save(state, tmp_path / "state.pt")

    second = make_model()
    second.load_state_dict(first.state_dict())
    again = CompositeOptimizer(*make_members(second, lr=9.0))
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    plain_loop(second, (again,))
    assert_equal_weights(second, expected)


def test_a_state_with_added_groups_goes_to_the_right_members():
    states = []
    for order in ((0, 1), (1, 0)):
        model = make_model()
        model.register_parameter("a", nn.Parameter(torch.ones(2)))
        model.register_parameter("b", nn.Parameter(torch.ones(3)))
        composite = CompositeOptimizer(*make_members(model))
        for member, name in zip(order, ("a", "b"), strict=True):
            composite.add_param_group({"params": [getattr(model, name)]}, member=member)
        (model.a.sum() + model.b.sum() + loss_of(model, make_batches()[0])).backward()
        composite.step()
        states.append((composite, model))
    (composite, model), (other, _) = states
    again = CompositeOptimizer(*make_members(copied := copy.deepcopy(model)))
    again.add_param_group({"params": [copied.b]}, member=1)
    again.add_param_group({"params": [copied.a]}, member=0)
    again.load_state_dict(composite.state_dict())
    assert [len(group["params"]) for group in again.param_groups] == [2, 1, 3, 1, 1]
    assert torch.equal(
        again.state[copied.a]["momentum_buffer"], composite.state[model.a]["momentum_buffer"]
    )
    with pytest.raises(ValueError, match="must have the groups of the state"):
        CompositeOptimizer(*make_members(make_model())).load_state_dict(other.state_dict())


def test_a_state_of_other_members_is_refused():
    model = make_model()
    composite = CompositeOptimizer(*make_members(model))
    other = CompositeOptimizer(*make_members(model)[::-1])
    with pytest.raises(ValueError, match="those of the state, SGD, AdamW, got AdamW, SGD"):
        other.load_state_dict(composite.state_dict())


def test_a_copy_is_independent():
    model = make_model()
    composite = CompositeOptimizer(*make_members(model))
    plain_loop(model, (composite,))
    both = copy.deepcopy((model, composite))
    plain_loop(model, (composite,))
    plain_loop(both[0], (both[1],))
    assert_equal_weights(*[model, both[0]])
    assert both[1].param_groups[0]["params"][0] is both[0][0].weight


def test_the_states_of_all_parameters_are_visible_and_can_be_cleared():
    model = make_model()
    composite = CompositeOptimizer(*(members := make_members(model)))
    assert model[0].weight not in composite.state
    plain_loop(model, (composite,))
    assert len(composite.state) == 6
    assert composite.state[model[4].weight] is members[1].state[model[4].weight]
    assert composite.state.get(torch.zeros(1)) is None
    composite.state.clear()
    assert not members[0].state
    assert not members[1].state


def test_hooks_are_called_once_for_a_step_of_all_and_of_some():
    model = make_model()
    composite = CompositeOptimizer(*make_members(model))
    calls: list[str] = []
    composite.register_step_pre_hook(lambda *_: calls.append("before"))
    composite.register_step_post_hook(lambda *_: calls.append("after"))
    composite.members[1].register_step_post_hook(lambda *_: calls.append("second"))
    composite.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    composite.step()
    composite.step(members=[0])
    assert calls == ["before", "second", "after", "before", "after"]
    assert composite.state_dict()["note"] == 1


def test_a_closure_is_evaluated_once():
    model = make_model()
    composite = CompositeOptimizer(*make_members(model))
    values = []

    def closure() -> float:
        loss = loss_of(model, make_batches()[0])
        loss.backward()
        values.append(float(loss.detach()))
        return values[-1]

    assert composite.step(closure) == values[0]
    assert len(values) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_fp16_skips_and_makes_the_updates_of_both_members(fused):
    check_fp16(torch.device("cpu"))
    models = []
    for together in (False, True):
        model = make_model()
        members = make_members(model, fused=fused)
        optimizers = (CompositeOptimizer(*members),) if together else members
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)
        for batch in make_batches() * 8:
            for optimizer in optimizers:
                optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_of(model, batch)
            scaler.scale(loss).backward()
            infinite = any(not p.grad.isfinite().all() for p in model.parameters())
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
                if together or not infinite:  # alone, each optimizer judges its own gradients
                    scaler.step(optimizer)
            scaler.update()
        models.append(model)
    assert_equal_weights(*models)


@pytest.mark.parametrize("fused", [False, True])
def test_a_trainer_in_fp16_skips_the_same_updates_for_both_members(fused):
    check_fp16(torch.device("cpu"))
    model = make_model()
    optimizer = CompositeOptimizer(*make_members(model, fused=fused))
    trainer = make_trainer(model, optimizer, precision="fp16")
    before = copy.deepcopy(model)
    trainer.run(make_batches(1, bad=0), max_epochs=1)
    assert_equal_weights(model, before)
    assert trainer.skipped_steps == 1


class Alternating(TrainStep):
    """Steps one member after each batch, in turn."""

    def update(self) -> None:
        turn = self._trainer.state.iteration % 2
        if self.scaler is None:
            self.optimizer.members[turn].step()
        else:
            self.scaler.step(self.optimizer, members=[turn])
            self.scaler.update()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_of_ones_own_steps_one_member(precision):
    model = make_model()
    settings = {"step": Alternating, "precision": precision}
    trainer = make_trainer(model, CompositeOptimizer(*make_members(model)), **settings)
    moved: list[tuple[bool, bool]] = []

    def note() -> None:
        weights = [model[i].weight.detach().clone() for i in (0, 4)]
        changed = [not torch.equal(a, b) for a, b in zip(weights, before, strict=True)]
        moved.append((changed[0], changed[1]))
        before[:] = weights

    before = [model[i].weight.detach().clone() for i in (0, 4)]
    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    trainer.attach(GradientClipping(max_norm=1.0))
    trainer.run(make_batches(4), max_epochs=1)
    made = [pair for pair in moved if any(pair)]  # fp16 may skip the first ones
    assert made in ([(False, True), (True, False)] * 2, [(True, False), (False, True)] * 2)


def test_clipping_and_diagnostics_see_the_gradients_of_all_members():
    model = make_model()
    trainer = make_trainer(model, CompositeOptimizer(*make_members(model)))
    trainer.attach(GradientClipping(max_norm=1e-3), GradientDiagnostics(every=1))
    trainer.run(make_batches(1), max_epochs=1)
    expected = make_model()
    loss_of(expected, make_batches(1)[0]).backward()
    norm = torch.cat([p.grad.flatten() for p in expected.parameters()]).norm()
    torch.testing.assert_close(trainer.metrics.record.values["gradients/norm"], float(norm))
    clipped = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert float(clipped) == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize("average", [False, True])
def test_a_guard_leaves_out_the_updates_of_all_members(average):
    models = []
    for bad in (None, 3):
        model = make_model()
        trainer = make_trainer(model, CompositeOptimizer(*make_members(model)))
        held = [WeightAverage(decay=0.5)] if average else []
        trainer.attach(LossGuard(), *held)
        batches = make_batches(6, bad=bad)
        trainer.run(batches if bad is not None else batches[:3] + batches[4:], max_epochs=1)
        models.append(model)
        if held:
            state = held[0].average_state_dict()
            models[-1] = copy.deepcopy(model)
            models[-1].load_state_dict(state)
    assert_equal_weights(*models)


def test_schedules_set_the_rates_of_all_members():
    model = make_model()
    trainer = make_trainer(model, CompositeOptimizer(*make_members(model, lr=1.0)))
    trainer.attach(LearningRate(warmup=4, decay="constant"))
    trainer.run(make_batches(2), max_epochs=1)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert rates == pytest.approx([0.5, 0.25, 0.05])
    assert trainer.metrics.record.values["train/learning_rate/stem"] == pytest.approx(0.5)


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The samples of `make_batches`, one by one."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        batch = make_batches()[index // 4]
        return {key: value[index % 4] for key, value in batch.items()}


def managed(folder: Path) -> Trainer:
    model = make_model()
    model.register_parameter("late", nn.Parameter(torch.ones(())))
    optimizer = CompositeOptimizer(*make_members(model))
    trainer = make_trainer(model, optimizer, task=scaled)
    trainer.attach(LearningRate(warmup=2), CheckpointManager(folder, every=4))

    @trainer.on(Events.EPOCH_STARTED(once=2))
    def add(engine: Trainer) -> None:
        engine.optimizer.add_param_group({"params": [model.late], "name": "late"}, member=0)

    return trainer


def scaled(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"logits": model(batch["image"]) * model.late, "label": batch["label"]}


def test_a_killed_run_with_an_added_group_resumes_exactly(tmp_path):
    whole = managed(tmp_path / "whole")
    whole.run(SeededLoader(Samples(), 4, seed=5), max_epochs=3)
    first = managed(tmp_path / "cut")
    first.add_event_handler(Events.ITERATION_COMPLETED(once=11), lambda t: t.terminate())
    first.run(SeededLoader(Samples(), 4, seed=5), max_epochs=3)
    second = managed(tmp_path / "cut")
    second.run(SeededLoader(Samples(), 4, seed=5), max_epochs=3)
    assert len(second.optimizer.param_groups) == 4
    assert_equal_weights(second.model, whole.model)
    assert whole.model.late != 1


def test_a_run_with_other_members_is_refused_before_anything_is_modified(tmp_path):
    def build(kind: Any) -> Trainer:
        model = make_model()
        first, *_ = make_members(model)
        rest = [model[2].weight, *model[4].parameters()]
        trainer = make_trainer(model, CompositeOptimizer(first, kind(rest, lr=0.01)))
        return trainer.attach(CheckpointManager(tmp_path))

    build(torch.optim.AdamW).run(SeededLoader(Samples(), 4, seed=5), max_epochs=1)
    trainer = build(torch.optim.Adagrad)
    with pytest.raises(CheckpointError, match="of SGD, AdamW, got CompositeOptimizer of SGD, Adag"):
        trainer.run(SeededLoader(Samples(), 4, seed=5), max_epochs=2)
    assert_equal_weights(trainer.model, make_model())


def test_certify_passes_with_several_optimizers():
    model = make_model()
    trainer = make_trainer(model, CompositeOptimizer(*make_members(model)), microbatch_size=2)
    trainer.attach(GradientClipping(max_norm=0.1), LearningRate(warmup=1))
    report = certify(trainer, make_batches(1)[0], ranks=False)
    assert report.passed, str(report)


def test_a_member_that_needs_a_closure_is_refused():
    model = make_model()
    first, _ = make_members(model)
    rest = [model[2].weight, *model[4].parameters()]
    with pytest.raises(ValueError, match="without a closure, got LBFGS"):
        make_trainer(model, CompositeOptimizer(first, torch.optim.LBFGS(rest)))


class AscendsFirst(torch.optim.SGD):
    """Refuses an update without a closure when it is asked for one, as some optimizers do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise AssertionError(*self.param_groups[0]["text"])


@pytest.mark.parametrize("text", [[], ["it requires closure, but it was not provided"]])
def test_an_optimizer_that_asks_for_a_closure_at_its_first_update_is_refused(text: Any):
    model = make_model()
    optimizer = AscendsFirst([{"params": model.parameters(), "text": text}], lr=0.1)
    trainer = make_trainer(model, optimizer)
    with pytest.raises(ValueError, match=r"got AscendsFirst.* Pass a step of your own"):
        trainer.run(make_batches(1), max_epochs=1)


def test_an_optimizer_that_fails_otherwise_raises_its_own_error():
    model = make_model()
    optimizer = AscendsFirst([{"params": model.parameters(), "text": ["no memory"]}], lr=0.1)
    with pytest.raises(AssertionError, match="no memory"):
        make_trainer(model, optimizer).run(make_batches(1), max_epochs=1)


def test_members_that_do_not_fit_are_refused():
    model = make_model()
    first, second = make_members(model)
    with pytest.raises(ValueError, match="one optimizer or more, got none"):
        CompositeOptimizer()
    with pytest.raises(TypeError, match=r"must be a torch Optimizer, got \["):
        CompositeOptimizer([first, second])  # type: ignore[arg-type]
    again = torch.optim.SGD(model[4].parameters(), lr=1.0)
    with pytest.raises(ValueError, match=r"one of shape \(2, 4\) in the members 1 and 2"):
        CompositeOptimizer(first, second, again)


def composed(shard: bool, folder: Path | None = None) -> dict[str, Any]:
    """Train two towers, each with its own optimizer; return the weights."""
    torch.manual_seed(0)
    model = sharded.TwoTowers().double()
    loss = share_logit_scale(CLIPLoss(), model)
    optimizer = CompositeOptimizer(
        torch.optim.SGD(model.image.parameters(), lr=0.1, momentum=0.9),
        torch.optim.AdamW(model.text.parameters(), lr=1e-2),
        torch.optim.SGD([model.logit_scale], lr=1e-2),
    )
    settings = {"task": tasks.image_text, "device": "cpu", "seed": 0, "shard": shard}
    trainer = Trainer(model, loss, optimizer, **settings)
    trainer.attach(GradientClipping(max_norm=0.1), LearningRate(warmup=2))
    if folder is not None:
        trainer.attach(CheckpointManager(folder))
        if not list(folder.glob("*.pt")):
            trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), lambda t: t.terminate())
    trainer.run(sharded.loader(), max_epochs=2)
    return {"weights": sharded.weights_of(model), "records": []}


def test_members_of_a_sharded_model_train_and_resume_as_in_one_process(ranks, tmp_path):
    expected = composed(shard=False)
    for found in ranks.run(composed, [(True,)] * 2):
        sharded.assert_equal_runs(found, expected)
    ranks.run(composed, [(True, tmp_path)] * 2)
    for found in ranks.run(composed, [(True, tmp_path)] * 2):
        sharded.assert_equal_runs(found, expected)
