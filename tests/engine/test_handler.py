"""The contract of a handler: defaults, keys, and attaching all of several or none."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import attrs
import pytest
import torch
from ignite.engine import Events
from torch import nn

from diptych.engine import Change, Finding, Handler, RunEvents, StepEvents, Trainer, contract_of
from diptych.engine.evaluator import EvaluatesModel, Evaluator
from diptych.engine.handler import Attachable, Stateful
from diptych.engine.settings import TrainerSettings
from tests.engine.models import CoupledLoss, TwoTower, paired, sgd, trainer_of


class Scaling(Handler):
    """Halves gradients; one for each name."""

    changes = frozenset({Change.GRADIENTS})

    def __init__(self, name: str = "") -> None:
        self.name = name

    @property
    def role(self) -> str:
        return self.name

    def attach(self, trainer: Trainer) -> None:
        trainer.add_event_handler(StepEvents.GRADIENTS_READY, lambda: None)


class Plain:
    """An object with attach() and nothing else."""

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.STARTED, lambda: None)


class Failing(Plain):
    """Adds what a handler can add, and fails."""

    def attach(self, engine: Any) -> None:
        super().attach(engine)
        engine.attach(Plain())
        engine.every(3, lambda _: None)
        engine.every(2, lambda _: None, RunEvents.SAFE_POINT)
        engine.metrics.gauge("planted", lambda: 1.0)
        for handler in engine.handlers_of(EvaluatesModel):
            handler.evaluator.add_event_handler(Events.COMPLETED, lambda: None)
        raise ValueError("planted")


class Evaluating(Plain):
    """A handler with an evaluator, as `Evaluation` is."""

    prefix = "val"

    def __init__(self) -> None:
        self.evaluator = Evaluator(nn.Identity(), task=lambda model, batch: {})


def test_a_handler_has_a_key_of_its_class_and_role():
    assert Scaling().key == "Scaling"
    assert Scaling("image").key == "Scaling[image]"


def test_a_handler_reports_unless_it_declares_a_change():
    class Silent(Handler):
        def attach(self, trainer: Trainer) -> None:
            trainer.add_event_handler(Events.STARTED, lambda: None)

    assert contract_of(Silent()).changes == frozenset()
    assert contract_of(Scaling()).changes == {Change.GRADIENTS}


def test_a_handler_must_say_how_it_attaches():
    with pytest.raises(TypeError, match="attach"):
        type("Nothing", (Handler,), {})()


def test_a_plain_object_has_the_defaults():
    contract = contract_of(Plain())

    assert (contract.key, contract.changes, contract.findings) == ("Plain", frozenset(), ())


def test_a_plain_object_may_declare_its_changes_in_words():
    declared = type("Declared", (Plain,), {"changes": ("weights", "random numbers")})()

    assert contract_of(declared).changes == {Change.WEIGHTS, Change.RANDOM_STATE}


def test_an_unknown_word_for_a_change_is_an_error():
    with pytest.raises(ValueError, match="colours"):
        contract_of(type("Declared", (Plain,), {"changes": ("colours",)})())


def test_an_attribute_of_another_library_is_no_declaration():
    foreign = type("Foreign", (Plain,), {"changes": lambda self: None})()

    assert contract_of(foreign).changes == frozenset()


def test_findings_of_all_handlers_come_in_the_order_of_iterations():
    class Found(Scaling):
        def __init__(self, step: int) -> None:
            super().__init__(str(step))
            self.found = Finding("rule", step, "evidence", "remedy")

        @property
        def findings(self) -> list[Finding]:
            return [self.found]

    trainer = trainer_of().attach(Found(5), Plain(), Found(2))

    assert [finding.step for finding in trainer.findings] == [2, 5]


def test_handlers_are_found_by_class_and_by_protocol():
    first, second, plain = Scaling("a"), Scaling("b"), Plain()
    trainer = trainer_of().attach(first, plain, second)

    assert trainer.handlers_of(Scaling) == [first, second]
    assert trainer.handlers_of(Attachable) == [first, plain, second]
    assert trainer.handlers_of(Stateful) == []


def registered(trainer: Trainer) -> Any:
    """Return everything that handlers can register with a trainer."""
    engines = [trainer, *(h.evaluator for h in trainer.handlers_of(EvaluatesModel))]
    return (
        [[(one.event, one.function, one.period) for one in e.listeners] for e in engines],
        [{e: list(found) for e, found in engine._event_handlers.items()} for engine in engines],
        dict(trainer.metrics._gauges),
        list(trainer.handlers),
    )


def test_an_attach_that_fails_half_way_leaves_nothing_attached():
    trainer = trainer_of().attach(Evaluating())
    trainer.every(5, print)
    before = registered(trainer)
    with pytest.raises(ValueError, match="planted"):
        trainer.attach(Scaling(), Plain(), Failing(), Plain())

    assert registered(trainer) == before
    trainer.run([paired(3)] * 2, max_epochs=1)  # and nothing of it fires


def test_an_object_that_is_no_handler_keeps_those_before_it_from_being_attached():
    trainer = trainer_of()
    with pytest.raises(TypeError, match="attach"):
        trainer.attach(Plain(), object())

    assert trainer.handlers == []


OTHERS = {
    "precision": "bf16",
    "microbatch_size": 2,
    "device": torch.device("cpu"),
    "prefetch": False,
    "compile": True,
    "seed": 5,
    "log_every": 7,
    "shard": True,
}


def test_a_replica_has_every_setting_and_part_of_its_original():
    assert set(OTHERS) == {field.name for field in attrs.fields(TrainerSettings)}
    model, loss = TwoTower(), CoupledLoss()
    trainer = Trainer(
        model,
        loss,
        sgd(model, loss),
        task=lambda model, batch: {},
        transform=lambda batch: batch,
        **OTHERS,
    ).attach(Plain())
    replica = trainer.replica([Scaling()])

    assert replica.settings == trainer.settings
    assert (replica.model, replica.loss, replica.optimizer) == (model, loss, trainer.optimizer)
    assert (replica.task, replica.transform, replica.step) == (
        trainer.task,
        trainer.transform,
        trainer.step,
    )
    assert [type(handler) for handler in replica.handlers] == [Scaling]
    assert [type(handler) for handler in trainer.handlers] == [Plain]


def test_a_replica_takes_other_parts_and_settings():
    trainer = trainer_of(microbatch_size=2)
    model = TwoTower().to(torch.float64)
    loss = CoupledLoss()
    replica = trainer.replica(model=model, loss=loss, optimizer=sgd(model, loss), log_every=1)

    assert replica.model is model
    assert (replica.settings.log_every, replica.settings.microbatch_size) == (1, 2)
    with pytest.raises(TypeError, match="microbatch"):
        trainer.replica(microbatch=3)


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in (*trainer.model.parameters(), *trainer.loss.parameters())]


def test_copied_parts_give_an_independent_trainer_where_a_copy_is_refused():
    trainer = trainer_of(microbatch_size=2)
    data = [paired(4)]
    trainer.run(data, max_epochs=1)
    for copied in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match=r"must not be copied or pickled.*trainer\.replica\("):
            copied(trainer)
    model, loss, optimizer = copy.deepcopy((trainer.model, trainer.loss, trainer.optimizer))
    replica = trainer.replica(model=model, loss=loss, optimizer=optimizer)
    before = weights(trainer)
    trainer.run(data, max_epochs=2)
    after = weights(trainer)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(replica), strict=True))
    replica.run(data, max_epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(after, weights(replica), strict=True))
