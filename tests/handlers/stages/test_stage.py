"""Stages and plans with wrong arguments, or that do not fit their trainer, are refused."""

from __future__ import annotations

import pytest
import torch

from diptych.engine import SeededLoader
from diptych.handlers import LearningRate, Stage, StagePlan
from diptych.losses import CrossEntropyLoss, OneOf
from tests.handlers.staged import (
    ALL,
    HEAD,
    Squares,
    loader,
    make_trainer,
)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Stage("s", trains="haed", epochs=1, lr=0.1), "'s': .* got 'haed', .* Similar names: head"),
        (
            Stage("s", trains=["head", "blocks"], epochs=1, by_component={"head": 0.1}),
            "'s': each trainable parameter must be in a group, got blocks.0.0.weight in none of h",
        ),
        (
            Stage("s", epochs=1, lr=0.1, by_component={"blocks": 0.1, "blocks.1": 0.1}),
            "'s': each parameter must be in one group, got blocks.1.0.weight in blocks and in bl",
        ),
        (
            Stage("s", epochs=1, lr=0.1, by_component={"head": {"lr": 1.0, "beta": 0.9}}),
            "options of 'head.*' must be options of AdamW, got 'beta'. Similar names: betas",
        ),
        (Stage("s", trains=(), epochs=1, lr=0.1), r"'s' must train a parameter, got \(\)"),
        (Stage("s", epochs=1, lr=0.1, loss="clip"), "CrossEntropyLoss has no 'active'"),
        (Stage("s", epochs=1, lr=0.1, settings={"model.drop.q": 1}), "Dropout has no 'q'"),
    ],
)
def test_a_stage_that_does_not_fit_the_trainer_is_refused_when_attached(stage, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(stage)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.1}, "stage 's' needs either epochs or steps, got None and None"),
        ({"lr": 0.1, "epochs": 1, "steps": 1}, "either epochs or steps, got 1 and 1"),
        ({"lr": 0.1, "epochs": 0}, "epochs must be a whole number >= 1, got 0"),
        ({"epochs": 1}, "needs lr, by_component or both, got neither"),
        ({"epochs": 1, "lr": -1.0}, "lr must be >= 0 and finite, got -1.0"),
        ({"epochs": 1, "lr": 0.1, "loss_weights": {"a": -1.0}}, "finite, got -1.0 for 'a'"),
        (
            {"epochs": 1, "lr": 0.1, "patience": 2},
            "patience of stage 's' needs a metric, got none",
        ),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Stage("s", **arguments)


def test_plans_with_wrong_stages_are_refused():
    with pytest.raises(ValueError, match="needs stages with different names, got none"):
        StagePlan([])
    with pytest.raises(ValueError, match=r"got \['head', 'head'\]"):
        StagePlan([HEAD, HEAD])
    with pytest.raises(ValueError, match=r"'b' loads the best .* needs a metric, got none"):
        StagePlan([HEAD, Stage("b", epochs=1, lr=0.1, load="best")])
    with pytest.raises(ValueError, match="got no previous stage"):
        StagePlan([Stage("b", epochs=1, lr=0.1, load="best")])


def test_handlers_and_optimizers_that_do_not_fit_a_plan_are_refused():
    with pytest.raises(ValueError, match="one StagePlan, got a second"):
        make_trainer(HEAD).attach(StagePlan([ALL]))
    with pytest.raises(ValueError, match="StagePlan replaces LearningRate, got both"):
        make_trainer(HEAD).attach(LearningRate()).run(loader())
    trainer = make_trainer(attach=False)
    model = trainer.model
    trainer.optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="makes the optimizer's groups, got an optimizer with 10"):
        trainer.attach(StagePlan([HEAD]))


def test_a_warm_up_as_long_as_its_stage_is_refused_before_the_first_iteration():
    late = Stage("late", epochs=1, lr=0.1, batch_size=10, schedule=LearningRate(warmup=2))
    trainer = make_trainer(HEAD, late)
    with pytest.raises(ValueError, match=r"'late' must be shorter than the 2 iterations .* got 2"):
        trainer.run(loader())
    assert trainer.state.iteration == 0


def test_a_batch_size_needs_a_seeded_loader():
    trainer = make_trainer(Stage("s", epochs=1, lr=0.1, batch_size=2))
    with pytest.raises(TypeError, match="'s' needs a SeededLoader, got a list"):
        trainer.run(list(loader()))


def test_a_metric_that_is_not_published_is_an_error():
    trainer = make_trainer(Stage("s", epochs=3, lr=0.1, metric="val/recal"))
    with pytest.raises(KeyError, match=r"^the metric of stage 's' must be .* got 'val/recal'"):
        trainer.run(loader())


def test_a_plan_describes_itself_only_when_attached():
    with pytest.raises(ValueError, match="must be attached to a trainer, got none"):
        StagePlan([HEAD]).describe()


def test_a_value_that_its_attribute_refuses_is_refused_when_attached():
    loss = OneOf(losses={"a": CrossEntropyLoss(), "b": CrossEntropyLoss()})
    with pytest.raises(ValueError, match="active must be one of a, b, got 'c'"):
        make_trainer(Stage("s", epochs=1, lr=0.1, loss="c"), loss=loss)
    assert loss.active == "a"


def test_a_batch_size_that_the_loader_cannot_fill_is_refused_before_the_first_iteration():
    trainer = make_trainer(HEAD, Stage("large", epochs=1, lr=0.1, batch_size=99))
    with pytest.raises(ValueError, match="batch_size of stage 'large' must fit its loader"):
        trainer.run(SeededLoader(Squares(), 4, drop_last=True))
    assert trainer.state.iteration == 0
