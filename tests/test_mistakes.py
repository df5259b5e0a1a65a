"""Plausible mistakes: each is told before the first update, shortly, with the way out.

`MISTAKES` are errors, `REPORTED` are warnings and log lines about what works and is hardly meant.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diptych.engine import SeededLoader, TrainStep
from diptych.handlers import (
    CheckpointManager,
    EarlyStopping,
    Evaluation,
    GradientClipping,
    LearningRate,
    MomentumEncoder,
    RetrievalRecall,
    TensorBoard,
    WeightAverage,
)
from diptych.losses import (
    CLIPLoss,
    CrossEntropyLoss,
    MoCoLoss,
    SigLIPLoss,
)
from tests.mistakes.errors import MISTAKES
from tests.mistakes.makers import (
    BATCH,
    IMAGES,
    Samples,
    TwoTowers,
    part_replaced_after_the_optimizer,
    run,
    see,
    trainer,
)

LONGEST = 420
"""Characters of a message."""

FOREIGN: dict[str, tuple[Callable[..., object], str]] = {
    "accumulate_grad_batches": (trainer, "Pass microbatch_size= instead"),
    "gradient_accumulation_steps": (trainer, "Pass microbatch_size= instead"),
    "max_epochs": (trainer, "trainer.run(loader, max_epochs=...)"),
    "criterion": (trainer, "Pass loss= instead"),
    "amp": (trainer, "Pass precision= instead"),
    "gradient_clip_val": (trainer, "Attach GradientClipping(max_norm=...)"),
    "val_loader": (trainer, "Attach Evaluation(loader)"),
    "lr_scheduler": (trainer, "Attach LearningRate(...)"),
    "default_root_dir": (trainer, "Attach default_handlers(directory)"),
    "tokenizer": (trainer, "Tokenize in the data set"),
    "save_top_k": (lambda **one: CheckpointManager("a", **one), "Pass keep= instead"),
    "dirpath": (CheckpointManager, "Pass directory= instead"),
    "monitor": (EarlyStopping, "Pass metric= instead"),
    "every_n_epochs": (lambda **one: Evaluation([BATCH], **one), "Pass every= instead"),
    "warmup_steps": (LearningRate, "Pass warmup= instead"),
    "max_grad_norm": (GradientClipping, "Pass max_norm= instead"),
    "ema_decay": (WeightAverage, "Pass decay= instead"),
    "decay": (MomentumEncoder, "Pass momentum= instead"),
    "log_dir": (TensorBoard, "Pass directory= instead"),
    "top_k": (RetrievalRecall, "Pass k= instead"),
    "collate_fn": (lambda **one: SeededLoader(Samples(), 2, **one), "Pass collate= instead"),
    "tau": (CLIPLoss, "Pass temperature= instead"),
    "gather_with_grad": (CLIPLoss, "features of all are gathered"),
    "smoothing": (CrossEntropyLoss, "Pass label_smoothing= instead"),
    "reduction": (CrossEntropyLoss, "Leave it out"),
    "memory_bank_size": (MoCoLoss, "Pass queue_size= instead"),
    "logit_bias": (SigLIPLoss, "Pass bias= instead"),
}

REPORTED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a part replaced after the optimizer was built": (
        part_replaced_after_the_optimizer,
        ["optimizer lacks text.weight, text.bias of the model", "Build the optimizer last"],
    ),
    "a model in a wrapper for several GPUs": (
        lambda _: trainer(nn.DataParallel(TwoTowers())),
        ["model is wrapped in DataParallel", "model.module", "torchrun"],
    ),
    "a frozen model": (
        lambda _: trainer(TwoTowers().requires_grad_(False)),
        ["The model is frozen, so only", "logit_scale", "requires_grad_(True)"],
    ),
    "held-out data that is the training data": (
        lambda _: (loader := [BATCH]) and trainer().attach(Evaluation(loader)).run(loader),
        ["Evaluation[val] reads the data that the run trains on", "held-out data"],
    ),
    "NaN in the images": (
        lambda _: see(image=IMAGES.where(IMAGES < 0.9, torch.nan)),
        ["image_features of the first batch hold NaN", "already, in 'image'", "LossGuard()"],
    ),
    "a batch of one pair": (
        lambda _: run({key: value[:1] for key, value in BATCH.items()}),
        ["first batch has one pair", "larger batch_size"],
    ),
    "no number of epochs": (
        lambda _: run(BATCH),
        ["The run does one epoch, since neither max_epochs nor max_iters was passed"],
    ),
}


@pytest.fixture(autouse=True)
def updates(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Count the updates, in `made`."""
    step = TrainStep.update

    def update(self: TrainStep) -> None:
        update.made += 1
        step(self)

    update.made = 0
    monkeypatch.setattr(TrainStep, "update", update)
    return update


def judge(message: str, words: list[str]) -> None:
    assert [word for word in words if word not in message] == []
    assert len(message) <= LONGEST, message
    assert message.count("\n") < 6, message
    assert " at 0x" not in message


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_short_error_with_the_way_out_before_the_first_update(
    mistake, tmp_path, updates
):
    make, words = MISTAKES[mistake]

    with pytest.raises(Exception) as caught:  # noqa: PT011 - the words are what is checked
        make(tmp_path)

    judge(str(caught.value), words)
    assert updates.made == 0


@pytest.mark.parametrize("name", FOREIGN)
def test_another_librarys_argument_is_an_error_that_names_ours(name):
    call, way_out = FOREIGN[name]

    with pytest.raises(TypeError) as caught:
        call(**{name: 1})

    judge(str(caught.value), ["must be among", f"got {name}. ", way_out])


@pytest.mark.parametrize("mistake", REPORTED)
def test_what_is_hardly_meant_is_reported_with_the_way_out(mistake, tmp_path, caplog):
    make, words = REPORTED[mistake]

    with warnings.catch_warnings(record=True) as warned, caplog.at_level(logging.INFO):
        warnings.simplefilter("always")
        make(tmp_path)

    messages = [*(str(one.message) for one in warned), *(r.getMessage() for r in caplog.records)]
    told = [message for message in messages if words[0] in message]
    assert len(told) == 1, messages
    judge(told[0], words)


def test_fp16_on_a_cpu_without_it_is_an_error_with_the_precisions_it_has(monkeypatch):
    def cannot(*_: object, **__: object) -> None:
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(torch, "autocast", cannot)

    with pytest.raises(ValueError, match="precision must be fp32 or bf16 on this cpu device"):
        trainer(precision="fp16")
