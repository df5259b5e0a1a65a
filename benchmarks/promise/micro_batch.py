"""Micro-batch: is the update of a batch the same in one piece and in pieces of 8?

    python -m benchmarks.promise.micro_batch --peers /path/to/peers/bin/python

One epoch of plain gradient descent in batches of 64. Each library then runs it again in pieces of
8, as its documentation says for batches that do not fit into memory: with gradient accumulation,
Diptych with `microbatch_size`. The table shows the loss over all samples after the epoch, and the
difference of the weights relative to the distance that they travelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.promise.comparison import Comparison, Outcome, Side, main, outcome
from benchmarks.promise.setting import (
    Classifier,
    Sample,
    Towers,
    UsualCLIPLoss,
    classify,
    contrast,
    samples,
    stacked,
    weights,
)

BATCH, PIECE, RATE = 64, 8, 0.1


class Case(NamedTuple):
    """A training: model, loss, the function that computes a batch's loss, and sample count."""

    name: str
    model: type[nn.Module]
    loss: type[nn.Module]
    step: Callable[[nn.Module, nn.Module, Sample], Tensor]
    count: int


CASES = (
    Case("CLIP's loss, 64 pairs", Towers, UsualCLIPLoss, contrast, 64),
    Case("cross entropy, 64 samples", Classifier, nn.CrossEntropyLoss, classify, 64),
    Case("cross entropy, 88 samples (64 + 24)", Classifier, nn.CrossEntropyLoss, classify, 88),
)

Train = Callable[[Case, nn.Module, nn.Module, int], None]
"""Trains model and loss for one epoch of a case, in pieces of a given number of samples."""


def both_ways(train: Train) -> Iterator[Outcome]:
    """Run each case in one piece and in pieces."""
    for case in CASES:
        ends = []
        for size in (BATCH, PIECE):
            torch.manual_seed(0)
            model, loss = case.model(), case.loss()
            start = weights(model, loss)
            train(case, model, loss, size)
            with torch.no_grad():
                value = case.step(model, loss, stacked(samples(case.count)))
            ends.append((float(value), weights(model, loss)))
        yield outcome(case.name, ends[0], ends[1], start)


def sgd(model: nn.Module, loss: nn.Module) -> torch.optim.Optimizer:
    """Return plain gradient descent, whose updates are proportional to the gradient."""
    return torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=RATE)


def lightning(case: Case, model: nn.Module, loss: nn.Module, size: int) -> None:
    """Train with Lightning's `accumulate_grad_batches`."""
    from benchmarks.promise.lightning_module import Module, fit

    module = Module((model, loss), case.step, sgd(model, loss))
    loader = DataLoader(samples(case.count), batch_size=size)
    fit(module, loader, accumulate_grad_batches=BATCH // size)


def accelerate(case: Case, model: nn.Module, loss: nn.Module, size: int) -> None:
    """Train with accelerate's `accumulate`, with the loop of its guide."""
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=BATCH // size, cpu=True)
    loader = DataLoader(samples(case.count), batch_size=size)
    parts = accelerator.prepare(model, loss, sgd(model, loss), loader)
    prepared_model, prepared_loss, optimizer, prepared_loader = parts
    for batch in prepared_loader:
        with accelerator.accumulate(prepared_model):
            accelerator.backward(case.step(prepared_model, prepared_loss, batch))
            optimizer.step()
            optimizer.zero_grad()


def ignite(case: Case, model: nn.Module, loss: nn.Module, size: int) -> None:
    """Train with Ignite's step factory and its `gradient_accumulation_steps`."""
    from ignite.engine import create_supervised_trainer

    trainer = create_supervised_trainer(
        model,
        sgd(model, loss),
        lambda value, _: value,
        prepare_batch=lambda batch, **_: (batch, None),
        model_fn=lambda model, batch: case.step(model, loss, batch),
        gradient_accumulation_steps=BATCH // size,
    )
    trainer.run(DataLoader(samples(case.count), batch_size=size), max_epochs=1)


def diptych(case: Case, model: nn.Module, loss: nn.Module, size: int) -> None:
    """Train with Diptych: the loader yields the whole batch, and `microbatch_size` cuts it."""
    from diptych.engine import Trainer, tasks

    task = tasks.image_text if isinstance(model, Towers) else tasks.classification
    trainer = Trainer(model, loss, sgd(model, loss), task=task, device="cpu", microbatch_size=size)
    trainer.run(DataLoader(samples(case.count), batch_size=BATCH), max_epochs=1)


COMPARISON = Comparison(
    "benchmarks.promise.micro_batch",
    ("in one piece", "in pieces of 8"),
    {
        "Lightning": Side(lambda: both_ways(lightning), ("lightning",)),
        "accelerate": Side(lambda: both_ways(accelerate), ("accelerate",)),
        "Ignite": Side(lambda: both_ways(ignite), ("pytorch-ignite",)),
        "Diptych": Side(lambda: both_ways(diptych), ("diptych",)),
    },
)

if __name__ == "__main__":
    main(__doc__, COMPARISON)
