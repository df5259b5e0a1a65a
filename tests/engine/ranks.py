"""Work of two processes in one process group, and losses that gather, for the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diptych.engine import MetricsCollector, MetricsEvents, tasks
from tests.engine.models import (
    CoupledLoss,
    RunningScale,
    SquareLoss,
    TokenLoss,
    Tokens,
    TwoTower,
    copied_gradients,
    gradients_of,
    paired,
    sgd,
    trainer_of,
)

RANKS = 2
SAMPLES = (5, 3)
"""Samples of each rank: unequal, and on both sides of a micro-batch of 4."""


class Gather(torch.autograd.Function):
    """Concatenate the rows of all ranks; backward, add up what every rank says of one's own."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        sizes: list[Any] = [None] * RANKS
        dist.all_gather_object(sizes, len(rows))
        padded = F.pad(rows, (0, 0, 0, max(sizes) - len(rows)))
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        ctx.start = sum(sizes[: dist.get_rank()])
        ctx.rows = len(rows)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.start + ctx.rows]


class GatheringLoss(CoupledLoss):
    """`CoupledLoss` of the samples of all ranks: the ranks' values average to the global one."""

    def terms(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        images, texts = Gather.apply(image), Gather.apply(text)
        start = sum(SAMPLES[: dist.get_rank()])
        own = torch.arange(start, start + len(image))
        scale, share = self.log_scale.exp(), RANKS * len(image) / len(images)
        rows = scale * F.normalize(image) @ F.normalize(texts).T
        columns = scale * F.normalize(text) @ F.normalize(images).T
        contrast = (F.cross_entropy(rows, own) + F.cross_entropy(columns, own)) / 2
        return {"contrast": contrast * share, "spread": self.spread * images.var(0).mean()}


class GlobalTokenLoss(TokenLoss):
    """`TokenLoss` over the tokens of all ranks."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        total, weight = self.total_and_weight(logits, labels)
        dist.all_reduce(weight)
        return total * RANKS / weight


class GlobalSquareLoss(SquareLoss):
    """`SquareLoss` over the samples of all ranks."""

    def total_and_weight(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses = (self.gain * logits.sum(-1) - labels) ** 2
        return losses.sum(), torch.tensor(len(losses))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        total, weight = self.total_and_weight(logits, labels)
        dist.all_reduce(weight)
        return total * RANKS / weight


def shares(batch: Any) -> list[Any]:
    """Return each rank's part of a batch."""
    first = {key: value[: SAMPLES[0]] for key, value in batch.items()}
    return [first, {key: value[SAMPLES[0] :] for key, value in batch.items()}]


def pairs() -> dict[str, Tensor]:
    """Return the global batch of image-text pairs."""
    torch.manual_seed(2)
    return paired(sum(SAMPLES))


def padded_tokens() -> dict[str, Tensor]:
    """Return the global batch of token sequences; few of the second rank's tokens count."""
    torch.manual_seed(3)
    tokens = torch.randint(1, 7, (sum(SAMPLES), 6))
    for row in range(1, len(tokens)):
        tokens[row, 1 + row % 6 :] = 0
    return {"tokens": tokens}


def labelled() -> dict[str, Tensor]:
    """Return the global batch of features with a number to predict."""
    torch.manual_seed(4)
    samples = sum(SAMPLES)
    image = torch.randn(samples, 6, dtype=torch.float64)
    return {"image": image, "label": torch.randn(samples, dtype=torch.float64)}


def made(model: Callable[[], nn.Module]) -> nn.Module:
    """Return the model with the same weights in every process."""
    torch.manual_seed(1)
    return model().double()


def frozen_image_tower() -> nn.Module:
    model = TwoTower()
    model.image.requires_grad_(False)
    return model


def running_scale() -> nn.Module:
    return TwoTower(RunningScale)


def second_update(size: int | None) -> dict[str, Any]:
    """Return the gradients of a second update, without a first step, of a model with buffers."""
    model, loss = made(running_scale), made(GatheringLoss)
    trainer = trainer_of(model, loss, optimizer=sgd(model, loss, lr=0.0), microbatch_size=size)
    return {"gradients": gradients_of(trainer, *[shares(pairs())[dist.get_rank()]] * 2)}


def updates(
    model: Callable[[], nn.Module],
    loss: type[nn.Module],
    task: Any,
    batch: Callable[[], Any],
    size: int | None,
) -> dict[str, Any]:
    """Return the gradients of a first update, and the weights after three."""
    share = shares(batch())[dist.get_rank()]
    trainer = trainer_of(made(model), made(loss), task=task, microbatch_size=size)
    gradients = dict(gradients_of(trainer, share))  # the later updates come into the same one
    trainer.run([share], max_epochs=3)
    modules = (trainer.model, trainer.loss)
    return {
        "gradients": gradients,
        "weights": [p.detach() for module in modules for p in module.parameters()],
    }


def logged(_: Any = None) -> dict[str, Any]:
    """Return the records and the local losses of a run."""
    records: list[Any] = []
    losses: list[float] = []
    trainer = trainer_of(made(TwoTower), made(GatheringLoss), log_every=2)
    trainer.add_event_handler(
        MetricsEvents.LOGGED, lambda: records.append(trainer.metrics.record.values)
    )
    trainer.add_event_handler("ITERATION_COMPLETED", lambda e: losses.append(e.state.output.loss))
    trainer.run([shares(pairs())[dist.get_rank()]] * 3, max_epochs=1)
    return {"records": records, "losses": [float(loss) for loss in losses]}


def started_apart() -> dict[str, Any]:
    """Return the parameters of a model and a loss that began with other values on each rank."""
    torch.manual_seed(dist.get_rank())
    model, loss = TwoTower().double(), GatheringLoss().double()
    with torch.no_grad():
        loss.log_scale += dist.get_rank()
    trainer_of(model, loss)
    return {"weights": [p.detach() for m in (model, loss) for p in m.parameters()]}


def multi_crop() -> dict[str, Any]:
    """Return the gradients where the model runs twice in an update, with a batch norm."""

    class Crops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x[:, None]).mean(-1)

    model, loss = made(Crops), made(GatheringLoss)
    torch.manual_seed(5 + dist.get_rank())
    views = {
        "first": torch.randn(SAMPLES[dist.get_rank()], 8, dtype=torch.float64),
        "second": torch.randn(SAMPLES[dist.get_rank()], 6, dtype=torch.float64),
    }
    trainer = trainer_of(model, loss, task=tasks.two_views, optimizer=sgd(model, loss))
    trainer.run([views] * 2, max_epochs=1)
    return {"gradients": copied_gradients(model, loss)}


class WithStrays(TwoTower):
    """Two towers beside a parameter that no loss reaches, and one that the first rank's does."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Parameter(torch.ones(3))
        self.sometimes = nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor, text: Tensor) -> Any:
        first, second = super().forward(image, text)
        return (first * self.sometimes if dist.get_rank() == 0 else first), second


def strays() -> dict[str, Any]:
    """Return the gradients of an update that does not reach all parameters on all ranks."""
    model, loss = made(WithStrays), made(GatheringLoss)
    found = gradients_of(trainer_of(model, loss), shares(pairs())[dist.get_rank()])
    return {"gradients": found, "never": model.never.grad, "sometimes": model.sometimes.grad}


def thawed() -> dict[str, Any]:
    """Return the gradients of a second update, whose model was frozen in part for the first."""
    model, loss = made(frozen_image_tower), made(GatheringLoss)
    trainer = trainer_of(model, loss, optimizer=sgd(model, loss, lr=0.0))
    share = shares(pairs())[dist.get_rank()]
    trainer.run([share], max_epochs=1)
    model.image.requires_grad_(True)
    trainer.run([share], max_epochs=2)
    return {"gradients": copied_gradients(model, loss)}


def recomputed() -> dict[str, Any]:
    """Return the gradients of a layer that reentrant checkpointing sends back twice."""

    class Twice(Linear):
        def forward(self, x: Tensor) -> Tensor:
            again = checkpoint(super().forward, x.requires_grad_(), use_reentrant=True)
            return again + super().forward(x)

    model, loss = made(Twice), made(GlobalSquareLoss)
    share = shares(labelled())[dist.get_rank()]
    return {"gradients": gradients_of(trainer_of(model, loss, task=tasks.classification), share)}


def other_tags() -> dict[str, str]:
    """Return what a log point says to ranks that have published different tags."""
    metrics = MetricsCollector()
    metrics.update({f"train/{dist.get_rank()}": 1.0})
    try:
        metrics.log(1)
    except RuntimeError as error:
        return {"error": str(error)}
    return {}


def other_lengths() -> dict[str, str]:
    """Return what a run says where the loaders of two ranks differ in length."""
    trainer = trainer_of(made(TwoTower), made(GatheringLoss))
    try:
        trainer.run([shares(pairs())[dist.get_rank()]] * (2 + dist.get_rank()), max_epochs=1)
    except RuntimeError as error:
        return {"error": str(error)}
    return {}


class Linear(nn.Linear):
    """A linear layer of two outputs."""

    def __init__(self) -> None:
        super().__init__(6, 2)


CASES: dict[str, tuple[Any, Any, Any, Any]] = {
    "pairs": (TwoTower, GatheringLoss, tasks.image_text, pairs),
    "tokens": (Tokens, GlobalTokenLoss, tasks.next_token, padded_tokens),
    "squares": (Linear, GlobalSquareLoss, tasks.classification, labelled),
}
FROZEN = (frozen_image_tower, GatheringLoss, tasks.image_text, pairs)
SIZES = (None, 2, 4)
"""Micro-batches: none, some on both ranks, and one that the second rank's samples do not fill."""


def results() -> dict[str, Any]:
    """Return what every case gives on this rank, by name."""
    found: dict[str, Any] = {"frozen 2": updates(*FROZEN, 2)}
    for size in SIZES:
        for name, case in CASES.items():
            found[f"{name} {size}"] = updates(*case, size)
        found[f"buffers {size}"] = second_update(size)
    return {
        **found,
        "logged": logged(),
        "apart": started_apart(),
        "crops": multi_crop(),
        "strays": strays(),
        "thawed": thawed(),
        "recomputed": recomputed(),
        "other tags": other_tags(),
        "other lengths": other_lengths(),
    }
