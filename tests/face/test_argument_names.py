"""A keyword that a function does not have is an error that names the right one."""

from __future__ import annotations

import inspect

import pytest
from torch import nn
from torch.optim import SGD

from diptych._argument_names import ELSEWHERE, names_the_right_argument
from diptych.engine import SeededLoader, Trainer, tasks
from diptych.handlers import (
    CheckpointManager,
    EarlyStopping,
    GradientClipping,
    LearningRate,
    RetrievalRecall,
)
from diptych.losses import CrossEntropyLoss, KoLeoLoss, NTXentLoss
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
    assert own <= set(ELSEWHERE)


def test_train_names_its_own_argument():
    with pytest.raises(TypeError, match=r"got max_epochs\. Pass num_epochs= instead"):
        trainer_of().train([], max_epochs=3)


def test_a_name_that_resembles_none_lists_the_arguments():
    @names_the_right_argument
    def walk(steps: int, *, pace: float = 1.0) -> float:
        return steps * pace

    assert walk(3, pace=0.5) == 1.5
    with pytest.raises(
        TypeError, match=r"the arguments of walk must be among steps, pace, got colour$"
    ):
        walk(3, colour="red")


def test_an_error_inside_of_the_function_is_left_as_it_is():
    @names_the_right_argument
    def walk(steps: int) -> str:
        return steps + "steps"

    with pytest.raises(TypeError, match="unsupported operand"):
        walk(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: EarlyStopping(monitor="val/loss"),
            "the arguments of EarlyStopping must be among metric, patience, mode, min_delta, got "
            "monitor. Pass metric= instead",
        ),
        (
            lambda: CheckpointManager("runs", save_top_k=2),
            "the arguments of CheckpointManager must be among directory, every, best, mode, keep, "
            "resume, background, export, changes, got save_top_k. Pass keep= instead",
        ),
        (
            lambda: LearningRate(lr=1e-3),
            "the arguments of LearningRate must be among warmup, decay, floor, total, got lr. Pass "
            "it to the optimizer",
        ),
        (
            lambda: RetrievalRecall(top_k=5),
            "the arguments of RetrievalRecall must be among k, relevance, output_transform, got "
            "top_k. Pass k= instead",
        ),
        (
            lambda: CrossEntropyLoss(smoothing=0.1),
            "the arguments of CrossEntropyLoss must be among label_smoothing, weight, ignore_index,"
            " got smoothing. Pass label_smoothing= instead",
        ),
        (
            lambda: KoLeoLoss(0.1),
            "KoLeoLoss must have no argument, got 0.1",
        ),
        (
            lambda: GradientClipping(1.0),
            "GradientClipping must get its arguments by name, got 1.0 without one. Write "
            "max_norm=..., or another of max_norm, max_value",
        ),
        (
            lambda: SeededLoader([1, 2]),
            "SeededLoader must get batch_size, got none. Write SeededLoader(dataset, batch_size)",
        ),
    ],
)
def test_handlers_losses_metrics_and_loaders_name_the_right_argument(call, message):
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value) == message


def test_a_loss_of_the_user_names_the_right_argument_through_its_base_class():
    class Sharp(NTXentLoss):
        def __init__(self, *, sharpness: float = 1.0, **rest: float) -> None:
            super().__init__(**rest)
            self.sharpness = sharpness

    assert Sharp(sharpness=2.0, temperature=0.2).sharpness == 2.0
    with pytest.raises(TypeError, match=r"got tau\. Pass temperature= instead"):
        Sharp(tau=0.2)


def test_the_signature_stays_readable():
    assert list(inspect.signature(Trainer.run).parameters)[1:] == [
        "data",
        "max_epochs",
        "max_iters",
        "epoch_length",
    ]
    assert "optimizer" in inspect.signature(Trainer).parameters
    assert list(inspect.signature(EarlyStopping).parameters)[:2] == ["metric", "patience"]
    assert "label_smoothing" in inspect.signature(CrossEntropyLoss).parameters


def test_arguments_of_any_number_are_not_said_to_be_missing():
    @names_the_right_argument
    def build(*parts: int, extra: int, **others: int) -> None: ...

    with pytest.raises(TypeError, match=r"^build must get extra, got none\. Write build\(extra="):
        build()
