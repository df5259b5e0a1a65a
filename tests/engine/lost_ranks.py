"""Cases in which one of two processes waits for the other in vain, for the tests."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from ignite.engine import Events
from torch import Tensor, nn

from diptych.engine import Evaluator, MetricsCollector, Trainer, process_group, tasks
from diptych.engine import trainer as trainer_module
from diptych.engine.distributed import gradient_average, hang_report
from diptych.engine.distributed.agreement import LaggedMaximum, on_all_ranks, on_rank_zero
from diptych.engine.distributed.collectives import broadcast_buffers, broadcast_module
from diptych.engine.state.rank_agreement import check_ranks_agree
from diptych.engine.state.run_state import run_state
from diptych.handlers import CheckpointManager, Evaluation, RetrievalRecall
from diptych.losses import CLIPLoss
from tests.engine.models import CoupledLoss, TwoTower, paired, trainer_of

TIMEOUT, GRACE = 0.3, 0.1
"""Seconds that the ranks wait for one another, and then for what the others publish."""


class Meeting(nn.Module):
    """Waits for all ranks in its forward pass, as a synchronised batch norm does."""

    def forward(self, x: Tensor) -> Tensor:
        dist.all_reduce(torch.zeros(1))
        return x


class MeetingBackward(torch.autograd.Function):
    """Waits for all ranks in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        dist.all_reduce(torch.zeros(1))
        return gradient


class LocalLoss(CoupledLoss):
    """A loss that waits for other ranks in its backward pass only."""

    def terms(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        return super().terms(MeetingBackward.apply(image), text)


def alone(**parts: Any) -> Trainer:
    """Return a trainer that was built without waiting for the others."""
    world, dist.get_world_size = dist.get_world_size, lambda *_: 1
    try:
        return trainer_of(**parts)
    finally:
        dist.get_world_size = world


def update(trainer: Trainer) -> None:
    trainer.run([paired(4)], max_epochs=1)


def start() -> None:
    with patch.object(trainer_module, "check_ranks_agree", check_ranks_agree):
        update(alone())


def with_handler(event: Any, function: Callable[[], object]) -> None:
    trainer = alone(step=lambda *_: None)
    trainer.add_event_handler(event, function)
    update(trainer)


def every_iteration(function: Callable[[], object]) -> None:
    trainer = alone(step=lambda *_: None)
    trainer.every(1, lambda _: function())
    update(trainer)


def meet() -> None:
    dist.all_reduce(torch.zeros(1))


def log() -> None:
    metrics = MetricsCollector()
    metrics.update({"train/loss": 1.0})
    metrics.log(1)


def evaluate(loader: Any, *metrics: Any) -> None:
    Evaluator(TwoTower(), task=tasks.image_text, metrics=metrics, device="cpu").evaluate(loader)


def validation_loss() -> None:
    trainer = alone(loss=CLIPLoss())
    handler = Evaluation([paired(4)], metrics=[], loss=True)
    handler.attach(trainer)
    handler.evaluate(trainer)


def agree_when_to_stop() -> None:
    agreement = LaggedMaximum()
    agreement.open()


Case = tuple[int, Callable[[Path], object], str]
CASES: dict[str, Case] = {
    "weights": (1, lambda _: broadcast_module(nn.Linear(1, 1)), "broadcasting the first"),
    "buffers": (
        1,
        lambda _: broadcast_buffers(nn.BatchNorm1d(2).buffers()),
        "broadcasting the model's buffers",
    ),
    "start": (0, lambda _: start(), "the start of a run"),
    "forward": (0, lambda _: update(alone(model=TwoTower(Meeting).double())), "the forward pass"),
    "loss": (0, lambda _: update(alone(loss=CLIPLoss())), "the loss, which gathers features"),
    "backward": (0, lambda _: update(alone(loss=LocalLoss())), "the backward pass"),
    "gradients": (0, lambda _: update(alone()), "averaging gradients"),
    "log point": (0, lambda _: log(), "a log point"),
    "handler": (0, lambda _: with_handler(Events.EPOCH_STARTED, meet), "meet"),
    "filtered": (0, lambda _: with_handler(Events.ITERATION_COMPLETED(every=1), meet), "meet"),
    "periodic": (0, lambda _: every_iteration(meet), "<lambda>"),
    "step": (0, lambda _: update(alone(step=lambda *_: meet())), "an iteration"),
    "metric": (
        0,
        lambda _: evaluate([paired(4, torch.float32)], RetrievalRecall(k=(1,))),
        "an evaluation",
    ),
    "evaluation": (0, lambda _: validation_loss(), "an evaluation"),
    "state": (0, lambda _: run_state(alone()), "taking the state of the run"),
    "reading": (0, lambda _: on_all_ranks(lambda: None), "agreeing on a checkpoint"),
    "writing": (1, lambda _: on_rank_zero(lambda: None), "agreeing on a checkpoint"),
    "stopping": (0, lambda _: agree_when_to_stop(), "opening the group"),
    "manager": (
        1,
        lambda folder: alone().attach(CheckpointManager(folder)).run([paired(4)]),
        "opening the group",
    ),
}
"""Name: the rank that comes, the function in which it waits, and the place in its error."""


def error_of(case: Callable[[Path], object], folder: Path) -> dict[str, Any]:
    """Return the error of a rank that waits in vain."""
    start = time.monotonic()
    try:
        case(folder)
    except RuntimeError as error:
        lines = traceback.format_exception(error)
        return {"text": str(error), "seconds": time.monotonic() - start, "trace": "".join(lines)}
    return {"text": "no error"}


def both_wait(rank: int, folder: Path) -> dict[str, Any]:
    """Let the ranks wait in different places."""
    beside = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    if rank == 0:
        return error_of(lambda _: log(), folder)
    elsewhere = hang_report.waits_at("a place beside")(dist.all_reduce)
    return error_of(lambda _: elsewhere(torch.zeros(1), group=beside), folder)


def one_fails(rank: int, folder: Path) -> dict[str, Any]:
    """Let one rank fail while the other waits."""
    if rank == 0:
        return error_of(lambda _: log(), folder)
    with contextlib.suppress(ValueError), process_group():  # does nothing: there is a group already
        raise ValueError("planted")
    return {}


def work(rank: int, folder: str) -> None:
    """Run every case as one of the two ranks, each in a group of its own; save the errors."""
    torch.set_num_threads(1)
    hang_report.GRACE = GRACE
    with (  # so that a run gets further
        patch.object(trainer_module, "check_ranks_agree"),
        patch.object(trainer_module, "check_equal_over_ranks"),
    ):
        torch.save(results(rank, Path(folder)), Path(folder) / f"{rank}.pt")


def results(rank: int, place: Path) -> dict[str, Any]:
    """Return the errors of this rank in every case."""
    found: dict[str, Any] = {}
    with patch.object(gradient_average.GradientAverage, "_agree"):  # so that an update gets further
        for name, (comes, case, _) in CASES.items():
            found[name] = in_a_group(
                name, rank, place, lambda c=comes, f=case: error_of(f, place) if rank == c else None
            )
    with patch.object(hang_report, "GRACE", 20.0):  # seconds; on a busy machine both need longer
        found["both"] = in_a_group("both", rank, place, lambda: both_wait(rank, place))
        found["fails"] = in_a_group("fails", rank, place, lambda: one_fails(rank, place))
    return found


@cache
def shared_store(rank: int, folder: Path) -> dist.Store:
    """Return the store of both ranks; one of files would wait for whole seconds."""
    port = dist.FileStore(str(folder / "port"), 2)
    if rank:
        return dist.TCPStore("127.0.0.1", int(port.get("port")), 2)
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    port.set("port", str(store.port))
    return store


def in_a_group(
    name: str, rank: int, folder: Path, act: Callable[[], Any], seconds: float = TIMEOUT
) -> Any:
    """Return the result of a function on this rank; wait until all ranks have called theirs."""
    store = dist.PrefixStore(name, shared_store(rank, folder))
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=1)
    )
    dist.barrier()
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    backend._set_default_timeout(timedelta(seconds=seconds))
    result = act()
    (folder / f"{name}-{rank}").touch()
    while not all((folder / f"{name}-{index}").exists() for index in range(2)):
        time.sleep(0.01)
    dist.destroy_process_group()
    return result
