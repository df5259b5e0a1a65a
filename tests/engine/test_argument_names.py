"""A keyword that a function does not have is an error that names the right one."""

from __future__ import annotations

import inspect

import pytest
from torch import nn
from torch.optim import SGD

from diptych.engine import Trainer, tasks
from diptych.engine.argument_names import FOR_RUN, names_the_right_argument
from tests.engine.models import trainer_of


@pytest.mark.parametrize(
    ("keyword", "way_out"),
    [
        ("epochs", "Pass max_epochs= instead"),
        ("num_epochs", "Pass max_epochs= instead"),
        ("max_steps", "Pass max_iters= instead"),
        ("steps_per_epoch", "Pass epoch_length= instead"),
        ("max_epoch", "Pass max_epochs= instead"),
        ("max_itters", "Pass max_iters= instead"),
        ("train_loader", "Pass data= instead"),
        ("val_loader", r"Attach Evaluation\(loader\)"),
        ("gpus", "Pass device= to Trainer"),
        ("seed", "Pass seed= to Trainer"),
        ("accumulate_grad_batches", "Pass microbatch_size= to Trainer"),
        ("fast_dev_run", r"Call trainer.dry_run\(loader\)"),
    ],
)
def test_run_names_the_right_argument(keyword, way_out):
    trainer = trainer_of()
    with pytest.raises(TypeError, match=f"the arguments of run .*, got {keyword}. {way_out}"):
        trainer.run([], **{keyword: 3})
    assert trainer.outcome is None


@pytest.mark.parametrize(
    ("keyword", "way_out"),
    [
        ("criterion", "Pass loss= instead"),
        ("gradient_accumulation_steps", "Pass microbatch_size= instead"),
        ("max_epochs", r"Pass it to the run: trainer.run\(loader, max_epochs=...\)"),
        ("limit_train_batches", r"Pass it to the run: trainer.run\(loader, epoch_length=...\)"),
        ("percision", "Pass precision= instead"),
        ("callbacks", r"Attach handlers with trainer.attach\(handler, ...\)"),
    ],
)
def test_trainer_names_the_right_argument(keyword, way_out):
    model = nn.Linear(1, 1)
    optimizer = SGD(model.parameters())
    with pytest.raises(TypeError, match=f"the arguments of Trainer .*, got {keyword}. {way_out}"):
        Trainer(model, nn.MSELoss(), optimizer, task=tasks.classification, **{keyword: 3})


def test_the_arguments_of_trainer_that_run_sends_on_are_all_of_them():
    own = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert own <= set(FOR_RUN)


def test_train_names_its_own_argument():
    with pytest.raises(TypeError, match=r"got max_epochs\. Pass num_epochs= instead"):
        trainer_of().train([], max_epochs=3)


def test_a_name_that_resembles_none_lists_the_arguments():
    @names_the_right_argument({})
    def walk(steps: int, *, pace: float = 1.0) -> float:
        return steps * pace

    assert walk(3, pace=0.5) == 1.5
    with pytest.raises(
        TypeError, match=r"the arguments of walk must be among steps, pace, got colour$"
    ):
        walk(3, colour="red")


def test_the_signature_stays_readable():
    assert list(inspect.signature(Trainer.run).parameters)[1:] == [
        "data",
        "max_epochs",
        "max_iters",
        "epoch_length",
    ]
    assert "optimizer" in inspect.signature(Trainer).parameters
