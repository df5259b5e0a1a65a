"""Each row of the table in docs/guide/resuming.md: a script that has changed, and what happens."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diptych.engine import (
    CheckpointError,
    CompositeOptimizer,
    ResumeError,
    RunEvents,
    Trainer,
    tasks,
)
from diptych.engine.state.run_state import load_run_state, run_state
from diptych.handlers import EarlyStopping, GradientClipping, LearningRate, WeightAverage
from diptych.losses import CLIPLoss
from tests.engine.state.scripts import (
    EPOCH,
    SGD,
    Script,
    data_set,
    freeze,
    group,
    halve_after,
    identical,
    lines,
    resumed,
    saved_by,
    scripts_of,
    shifted_by,
    step,
)

PAGE = Path(__file__).parents[3] / "docs/guide/resuming.md"


# The row of the page, what differs, the log line, and a check of the resumed trainer.
APPLIED: list[tuple[str, dict[str, Any], str, Callable[[Trainer], object]]] = [
    (
        "the learning rate",
        {"rate": (0.1, 0.01)},
        "optimizer.groups.0.lr 0.1 -> 0.01",
        lambda t: group(t)["lr"] == 0.01,
    ),
    (
        "the learning rate",
        {"rate": (0.1, 0.01), "handlers": [(LearningRate(warmup=2),)] * 2},
        "optimizer.groups.0.initial_lr 0.1 -> 0.01",
        lambda t: group(t)["initial_lr"] == 0.01,
    ),
    (
        "the learning rate",
        {"rate": (0.1, 0.01), "scheduler": (step, step)},
        "optimizer.groups.0.initial_lr 0.1 -> 0.01",
        lambda t: group(t)["lr"] == pytest.approx(0.005) and group(t)["initial_lr"] == 0.01,
    ),
    (
        "the learning rate",
        {"rate": (0.1, 0.01), "function": [halve_after(0)] * 2},
        "optimizer.groups.0.lr 0.1 -> 0.01",
        lambda t: group(t)["lr"] == pytest.approx(0.005),
    ),
    (
        "another option of the optimizer",
        {"options": ({"weight_decay": 0.0}, {"weight_decay": 0.5})},
        "optimizer.groups.0.weight_decay 0.0 -> 0.5",
        lambda t: group(t)["weight_decay"] == 0.5,
    ),
    (
        "a handler's settings",
        {"handlers": [(GradientClipping(max_norm=norm),) for norm in (1.0, 0.5)]},
        "handlers.GradientClipping.max_norm 1.0 -> 0.5",
        lambda t: t.handlers[0].max_norm == 0.5,
    ),
    (
        "a handler's settings",
        {"handlers": [(WeightAverage(decay=decay),) for decay in (0.9, 0.99)]},
        "handlers.WeightAverage.decay 0.9 -> 0.99",
        lambda t: t.handlers[0].decay == 0.99,
    ),
    (
        "a new handler",
        {"handlers": [(), (GradientClipping(max_norm=0.5),)]},
        "handlers.GradientClipping absent -> present",
        lambda t: True,
    ),
    (
        "a new handler",
        {"handlers": [(), (EarlyStopping(metric="train/loss", patience=9),)]},
        "The checkpoint has no state of EarlyStopping[train/loss]; they start fresh",
        lambda t: t.handlers[0].best is None,
    ),
    (
        "a handler that was removed",
        {"handlers": [(GradientClipping(max_norm=0.5),), ()]},
        "handlers.GradientClipping present -> absent",
        lambda t: True,
    ),
    (
        "a schedule that was removed",
        {"handlers": [(LearningRate(warmup=2),), ()]},
        "The checkpoint has states of handlers that are not attached, which are ignored: Learn",
        lambda t: group(t)["lr"] == 0.1,
    ),
    (
        "the order of handlers",
        {
            "handlers": [
                (LearningRate(warmup=2), GradientClipping(max_norm=0.5)),
                (GradientClipping(max_norm=0.5), LearningRate(warmup=2)),
            ]
        },
        "order of handlers LearningRate, GradientClipping -> GradientClipping, LearningRate",
        lambda t: True,
    ),
    (
        "a parameter, frozen or not",
        {"frozen": ((), ("0.weight", "0.bias"))},
        "requires_grad of 0.weight, 0.bias True -> False",
        lambda t: not t.model[0].weight.requires_grad and t.model[1].weight.requires_grad,
    ),
    (
        "a module in eval mode, or not",
        {"evaluating": ((), (1,))},
        "training of model.1 True -> False",
        lambda t: not t.model[1].training,
    ),
    (
        "an attribute or the class of a module",
        {"dropout": (0.1, 0.3)},
        "modules.model.3.p 0.1 -> 0.3",
        lambda t: t.model[3].p == 0.3,
    ),
    (
        "an attribute or the class of a module",
        {"activation": (nn.ReLU, nn.Tanh)},
        "modules.model.2.class torch.nn.modules.activation.ReLU -> "
        "torch.nn.modules.activation.Tanh",
        lambda t: isinstance(t.model[2], nn.Tanh),
    ),
    (
        "task, transform or step",
        {"transform": (shifted_by(0.1), shifted_by(0.2))},
        "transform.closure.distance 0.1 -> 0.2",
        lambda t: True,
    ),
    (
        "precision or seed",
        {"arguments": ({"seed": 0}, {"seed": 1})},
        "trainer.seed 0 -> 1",
        lambda t: t.settings.seed == 1,
    ),
    (
        "the order of the samples, between two epochs",
        {"loader": ({"seed": 0}, {"seed": 1})},
        "loader.seed 0 -> 1",
        lambda t: t.state.dataloader.seed == 1,
    ),
    (
        "the data",
        {"data_seed": (0, 1)},
        "loader.dataset.tensors float32 (32, 8)",
        lambda t: True,
    ),
]


@pytest.mark.parametrize(
    ("changed", "line", "holds"),
    [row[1:] for row in APPLIED],
    ids=[f"{number} {row[0]}" for number, row in enumerate(APPLIED)],
)
def test_what_the_script_says_now_applies_and_is_logged(
    changed: dict[str, Any],
    line: str,
    holds: Callable[[Trainer], object],
    caplog: pytest.LogCaptureFixture,
):
    before, now = scripts_of(**changed)
    trainer = resumed(now, saved_by(before))
    assert trainer.state.iteration == EPOCH
    assert holds(trainer)
    (told,) = lines(caplog)
    assert told.startswith(line)
    if "checkpoint" not in line:
        assert told.endswith("(changed in the script).")


@pytest.mark.parametrize(
    "changed",
    [row[1] for row in APPLIED],
    ids=[f"{number} {row[0]}" for number, row in enumerate(APPLIED)],
)
def test_with_refuse_a_changed_script_is_an_error_and_changes_nothing(changed: dict[str, Any]):
    before, now = scripts_of(**changed)
    state, trainer = saved_by(before), now.build()
    trainer.state.dataloader = now.data()
    untouched = copy.deepcopy(run_state(trainer))
    with pytest.raises(CheckpointError, match='because of changes="refuse", got '):
        load_run_state(trainer, state, "refuse")
    assert identical(run_state(trainer), untouched)


REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    (
        "another model, loss or optimizer",
        {"width": (16, 20)},
        CheckpointError,
        r"model must match the checkpoint, .*0\.weight \(16, 8\) instead of \(20, 8\)",
    ),
    (
        "another model, loss or optimizer",
        {"optimizer": (SGD, torch.optim.AdamW)},
        CheckpointError,
        "optimizer must be the checkpoint's SGD, got AdamW.*load_weights",
    ),
    (
        "other parameter groups",
        {"groups": (1, 2)},
        CheckpointError,
        r"optimizer must have the checkpoint's groups, of \[6\] parameters, got \[4, 2\]",
    ),
    (
        "the order of the samples, inside an epoch",
        {"loader": ({"seed": 0}, {"seed": 1})},
        ResumeError,
        "loader's seed must be 0, as when the run was saved inside an epoch, got 1",
    ),
    (
        "the order of the samples, inside an epoch",
        {"loader": ({}, {"batch_size": 16})},
        ResumeError,
        "loader's batch_size must be 8, .* got 16",
    ),
    (
        "the order of the samples, inside an epoch",
        {"loader": ({}, {"shuffle": False})},
        ResumeError,
        "loader's shuffle must be True, .* got False",
    ),
    (
        "the order of the samples, inside an epoch",
        {"samples": (32, 40)},
        ResumeError,
        "loader's samples must be 32, .* got 40",
    ),
]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [row[1:] for row in REFUSED],
    ids=[f"{number} {row[0]}" for number, row in enumerate(REFUSED)],
)
def test_what_cannot_be_applied_is_an_error_and_changes_nothing(
    changed: dict[str, Any], error: type[Exception], message: str
):
    before, now = scripts_of(**changed)
    state, trainer = saved_by(before, at=EPOCH + 1), now.build()
    trainer.state.dataloader = now.data()
    untouched = copy.deepcopy(run_state(trainer))
    with pytest.raises(error, match=message):
        load_run_state(trainer, state)
    assert identical(run_state(trainer), untouched)


class NotToBeLoaded:
    """A handler whose state cannot be loaded, after it has changed the trainer."""

    def attach(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for parameter in self.trainer.model.parameters():
            parameter.requires_grad_(False)
        self.trainer.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
        self.trainer.task = tasks.two_views
        if state:
            raise CheckpointError("no")


def test_a_handler_that_fails_to_load_leaves_the_trainer_as_it_was():
    first, second = (
        Script(handlers=(GradientClipping(max_norm=1.0), NotToBeLoaded())) for _ in "ab"
    )
    state, trainer = saved_by(first), second.build()
    state["handlers"]["NotToBeLoaded"] = {"bad": True}
    untouched = copy.deepcopy(run_state(trainer))
    task = trainer.task
    with pytest.raises(CheckpointError, match=r"^no$"):
        load_run_state(trainer, state)
    assert identical(run_state(trainer), untouched)
    assert trainer.task is task


@pytest.mark.parametrize(
    ("kind", "option", "part"),
    [
        (torch.optim.AdamW, {"amsgrad": True}, "max_exp_avg_sq"),
        (torch.optim.RMSprop, {"momentum": 0.9}, "momentum_buffer"),
        (torch.optim.RMSprop, {"centered": True}, "grad_avg"),
        (SGD, {"momentum": 0.9}, "momentum_buffer"),
    ],
)
@pytest.mark.parametrize("composite", [False, True])
def test_an_option_that_needs_another_part_of_the_state_starts_with_zeros(
    kind: Callable[..., torch.optim.Optimizer],
    option: dict[str, Any],
    part: str,
    composite: bool,
):
    def optimizer(groups: Any, **options: Any) -> torch.optim.Optimizer:
        made = kind(groups, **options)
        return CompositeOptimizer(made) if composite else made

    def look(trainer: Trainer) -> None:
        states = [trainer.optimizer.state[p] for p in trainer.model.parameters()]
        found.append(all(not state.get(part, torch.zeros(())).any() for state in states))
        trainer.add_event_handler(
            Events.COMPLETED, lambda: found.append(all(state[part].any() for state in states))
        )

    found: list[bool] = []
    before, now = scripts_of(optimizer=[optimizer] * 2, options=({}, option))
    state, trainer = saved_by(before), now.build()
    trainer.add_event_handler(RunEvents.RESTORE, lambda trainer: load_run_state(trainer, state))
    trainer.add_event_handler(Events.STARTED, look)

    trainer.run(now.data(), max_epochs=2)

    assert found == [True, True]


def test_nothing_is_logged_if_nothing_has_changed(caplog: pytest.LogCaptureFixture):
    handlers = (LearningRate(warmup=2), GradientClipping(max_norm=1.0))
    for script in (Script(handlers=handlers), Script(scheduler=step), Script(evaluating=(1,))):
        trainer = resumed(script, saved_by(script, at=EPOCH + 1), "refuse")
        assert trainer.state.iteration == EPOCH + 1
    assert not lines(caplog)


def test_what_a_function_has_changed_is_so_after_a_resume(caplog: pytest.LogCaptureFixture):
    trainer = resumed(Script(function=freeze), saved_by(Script(function=freeze)))
    assert not trainer.model[0].weight.requires_grad
    assert not trainer.model[1].training
    assert trainer.model[3].p == 0.25
    assert not lines(caplog)


def test_a_function_at_an_event_that_has_changed_is_logged_as_information(
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.INFO)
    resumed(Script(function=freeze), saved_by(Script()))
    assert (
        "functions.EPOCH_STARTED freeze absent -> present (a function at an event, changed in the "
        "script)."
    ) in lines(caplog, logging.INFO)
    assert not lines(caplog)


def test_each_function_at_an_event_is_described():
    trainer = Script().build()
    for factor in (1, 2):
        trainer.add_event_handler(Events.STARTED, lambda trainer, factor=factor: factor)
    for event in (Events.STARTED, Events.COMPLETED):
        trainer.add_event_handler(event, freeze)
    described = trainer.identity.values["functions"]
    assert list(described) == [
        "STARTED <lambda>",
        "STARTED <lambda>#2",
        "STARTED freeze",
        "COMPLETED freeze",
    ]
    assert described["STARTED <lambda>"] != described["STARTED <lambda>#2"]


class Hidden:
    """A handler of another library that shows none of its settings."""

    def __init__(self) -> None:
        self._rule = object()

    def attach(self, trainer: Trainer) -> None:
        trainer.add_event_handler(Events.STARTED, freeze)


def test_a_handler_that_shows_no_setting_is_not_compared():
    trainer = Script().build().attach(Hidden())
    assert trainer.identity.not_compared["handlers.Hidden"].endswith("Hidden")


def test_a_changed_rate_does_not_reach_the_scheduler_of_another_optimizer():
    def build(rate: float) -> tuple[Trainer, Any]:
        trainer = Script(rate=rate, scheduler=step).build()
        other = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(other, 1)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _: other.step())
        trainer.add_event_handler(Events.EPOCH_COMPLETED, scheduler.step)
        return trainer, scheduler

    (first, _), (second, scheduler) = build(0.1), build(0.2)
    first.run(Script().data(), max_epochs=1)
    load_run_state(second, run_state(first))
    assert scheduler.base_lrs == [1.0]
    assert second.optimizer.param_groups[0]["initial_lr"] == 0.2


def add_group(trainer: Trainer) -> None:
    if trainer.state.epoch == 1:
        extra = [p for n, p in trainer.model.named_parameters() if n in Late.LATER]
        trainer.optimizer.add_param_group({"params": extra, "lr": 0.02, "weight_decay": 0.3})


class Late(SGD):
    """An optimizer that lacks two parameters until a function adds them."""

    LATER = ("4.weight", "4.bias")

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__([{**groups[0], "params": groups[0]["params"][:-2]}], **options)


def test_a_parameter_group_that_was_added_during_the_run_is_restored(
    caplog: pytest.LogCaptureFixture,
):
    script = Script(optimizer=Late, function=add_group, options={"momentum": 0.9})
    trainer = resumed(script, saved_by(script))
    added = trainer.optimizer.param_groups[1]
    assert [p.shape for p in added["params"]] == [(4, 16), (4,)]
    assert (added["lr"], added["weight_decay"]) == (0.02, 0.3)
    assert "momentum_buffer" in trainer.optimizer.state[added["params"][0]]
    assert not lines(caplog)


def test_the_initial_value_of_a_learned_temperature_is_logged_and_the_learned_one_stays(
    caplog: pytest.LogCaptureFixture,
):
    def build(temperature: float) -> Trainer:
        torch.manual_seed(0)
        model, loss = nn.Linear(4, 4), CLIPLoss(temperature=temperature)
        optimizer = SGD([*model.parameters(), *loss.parameters()], lr=0.1)
        return Trainer(model, loss, optimizer, task=lambda m, b: {"a": m(b), "b": m(-b)})

    first, second = build(0.07), build(0.5)
    first.run([torch.randn(4, 4)], max_epochs=2)
    load_run_state(second, run_state(first))
    assert second.loss.temperature.logit_scale.equal(first.loss.temperature.logit_scale)
    assert any("learned value stays" in line for line in lines(caplog))


def test_two_handlers_of_one_key_get_the_states_of_their_settings(
    caplog: pytest.LogCaptureFixture,
):
    def stopping(*patience: int) -> Trainer:
        early = (EarlyStopping(metric="train/loss", patience=number) for number in patience)
        return Script(handlers=tuple(early)).build()

    def judged(*values: int) -> list[int]:
        trainer = stopping(*values)
        load_run_state(trainer, state)
        return [handler.state_dict()["best"] for handler in trainer.handlers]

    first = stopping(8, 9)
    first.run(Script().data(), max_epochs=1)
    state = copy.deepcopy(run_state(first))
    keys = "EarlyStopping[train/loss]", "EarlyStopping[train/loss]#2"
    for number, key in enumerate(keys):
        state["handlers"][key]["best"] = number

    assert judged(8, 9) == [0, 1]
    assert not lines(caplog)
    assert judged(9, 8) == [1, 0]
    assert judged(9) == [1]
    assert judged(7, 9, 8) == [None, 1, 0]


class Weighted(nn.Module):
    """A loss with class weights: in a buffer, in the checkpoint or not, or in an attribute."""

    def __init__(self, weight: Tensor, way: str) -> None:
        super().__init__()
        if way == "attribute":
            self.weight = weight
        else:
            self.register_buffer("weight", weight, persistent=way != "not persistent")
        self.moves = way == "queue"

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.moves:
            self.weight += 0.5
        return nn.functional.cross_entropy(logits, labels, self.weight)


def weighted(weight: float, way: str) -> Trainer:
    trainer, weights = Script().build(), torch.tensor([1.0, 1.0, 1.0, weight])
    loss = nn.CrossEntropyLoss(weights) if way == "torch" else Weighted(weights, way)
    trainer.loss = loss
    return trainer


@pytest.mark.parametrize(
    ("way", "last", "told"),
    [
        ("torch", 2.0, "tensors.loss.weight .*changed in the script"),
        ("attribute", 2.0, "tensors.loss.weight .*changed in the script"),
        ("not persistent", 2.0, "tensors.loss.weight .*changed in the script"),
        ("persistent", 1.0, "initial.weight .*value stays"),
        ("queue", 3.0, None),  # four updates have moved it: what it started from is past
    ],
)
def test_other_class_weights_apply_unless_the_checkpoint_holds_them(
    way: str, last: float, told: str | None, caplog: pytest.LogCaptureFixture
):
    first, second = weighted(1.0, way), weighted(2.0, way)
    first.run(Script().data(), max_epochs=1)
    state = copy.deepcopy(run_state(first))
    load_run_state(weighted(1.0, way), state)
    assert not lines(caplog)

    load_run_state(second, state)

    assert second.loss.weight[-1] == last
    found = lines(caplog)
    assert len(found) == (told is not None)
    assert told is None or re.search(told, found[0])


@pytest.mark.parametrize("name", ["torch", "ranks", "microbatch_size"])
def test_another_environment_is_logged_and_never_refused(
    name: str, caplog: pytest.LogCaptureFixture
):
    script = Script()
    state = saved_by(script)
    if name == "torch":
        state["identity"]["versions"]["torch"] = "1.0"
    elif name == "ranks":
        state["identity"]["ranks"] = 4
    else:
        script = Script(arguments={"microbatch_size": 2})
    resumed(script, state, "refuse")
    (told,) = lines(caplog)
    assert name in told
    assert told.endswith("(another environment).")


def test_a_checkpoint_without_an_identity_is_loaded_and_logged_once(
    caplog: pytest.LogCaptureFixture,
):
    state = saved_by(Script(rate=0.1))
    del state["identity"], state["current"]
    trainer = resumed(Script(rate=0.01), state)
    assert group(trainer)["lr"] == 0.1
    (told,) = lines(caplog)
    assert "does not say how its run was built" in told


def test_a_torch_loader_is_compared_by_its_sampler(caplog: pytest.LogCaptureFixture):
    first, second = Script().build(), Script().build()
    first.run(DataLoader(data_set(), batch_size=8, shuffle=True), max_epochs=1)
    second.state.dataloader = DataLoader(data_set(), batch_size=8)
    load_run_state(second, run_state(first))
    assert any("sampler.class" in line for line in lines(caplog))


def test_every_row_of_the_page_has_a_test():
    section = PAGE.read_text("utf-8").partition("## What may differ when a run resumes")[2]
    rows = re.findall(r"^\| ([^|]+?) \|", section.partition("\n## ")[0], re.MULTILINE)[1:]
    tested = {row[0] for row in (*APPLIED, *REFUSED)}
    others = {  # rows with a test of their own above
        "nothing",
        "what a function or handler had changed during the run",
        "what it had replaced: a module, the loader, task, transform or step; the memory of a "
        "handler without `state_dict`, or of a function in its closure",
        "a parameter group that was added during the run",
        "a function at an event",
        "the initial value of a learned parameter, or of a buffer of the loss before any change",
        "class weights of a torch loss, a tensor attribute, a buffer that is not saved",
        "versions, device, ranks, micro-batch",
        "a checkpoint of an earlier version",
        "a larger `max_epochs`",
    }
    assert set(rows) - {"---"} == tested | others
