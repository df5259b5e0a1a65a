"""Promises on two GPUs over NCCL: those of two processes over gloo."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Events
from torch import Tensor, nn

from diptych.handlers import LossGuard
from diptych.losses import (
    CLIPLoss,
    DecoupledContrastiveLoss,
    NTXentLoss,
    SigLIPLoss,
    SupervisedContrastiveLoss,
)
from tests.engine import sharded
from tests.engine.distributed.test_hang_report import job
from tests.interruption.processes import codes, finish, kill, start, wait_for_a_save
from tests.losses.ranks import Ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.xdist_group("cuda_ranks"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

LOSSES = {
    "clip": CLIPLoss,
    "clip inside": partial(CLIPLoss, positives="inside"),
    "clip smoothed": partial(CLIPLoss, label_smoothing=0.1),
    "siglip": SigLIPLoss,
    "simclr": partial(NTXentLoss, learn_temperature=True),
    "decoupled": partial(DecoupledContrastiveLoss, learn_temperature=True),
    "supervised": partial(SupervisedContrastiveLoss, learn_temperature=True),
}
PAIRS = 512
SPLITS = ((256, 256), (300, 212), (PAIRS, 0))


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Processes that act as ranks of an NCCL group, each with a GPU of its own."""
    started = Ranks(tmp_path_factory.mktemp("gpus"), backend="nccl")
    yield started
    started.close()


def drawn(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return related features of norms far from 1, and groups."""
    first, noise = torch.randn(2, PAIRS, 72, generator=torch.Generator().manual_seed(0))
    return (3 * first).to(dtype), (first + 2 * noise).to(dtype), torch.arange(PAIRS) // 3


def results(loss: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Return value and gradients of features and parameters, float64."""
    sides = [side.clone().requires_grad_() for side in inputs[:2]]
    value = loss(*sides, *inputs[2:])
    value.backward()
    found = [value.detach(), *(x.grad for x in (*sides, *loss.parameters()))]
    return [x.double() for x in found]


def on_a_rank(
    build: Callable[[], nn.Module], sizes: tuple[int, ...], dtype: torch.dtype, grouped: bool
) -> list[Tensor]:
    """Return results as a data-parallel trainer gets them, features' gradients of all ranks."""
    inputs = [x.to(DEVICE) for x in drawn(dtype)][: 2 + grouped]
    offset = sum(sizes[: dist.get_rank()])
    own = slice(offset, offset + sizes[dist.get_rank()])
    loss = build().to(DEVICE)
    for _ in range(4):  # the fourth time kernels are replayed
        loss.zero_grad()
        value, *gradients = results(loss, *(x[own] for x in inputs))
    found = [value]
    for gradient in gradients:
        whole = gradient
        if len(found) <= 2:
            whole = gradient.new_zeros(PAIRS, gradient.shape[1])
            whole[own] = gradient
        found.append(whole)
    for x in found:
        dist.all_reduce(x)
    return [x.cpu() / len(sizes) for x in found]


@pytest.mark.parametrize(
    ("dtype", "tile"), [(torch.float32, "auto"), (torch.bfloat16, None), (torch.bfloat16, 64)]
)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_on_two_gpus_are_those_of_the_global_batch(gpus, name, dtype, tile):
    grouped = name in {"clip inside", "supervised"}
    inputs = [x.double() if x.is_floating_point() else x for x in drawn(dtype)]
    expected = results(LOSSES[name](tile=None).double(), *inputs[: 2 + grouped])
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    build = partial(LOSSES[name], tile=tile)
    for sizes in SPLITS:
        for found in gpus.run(on_a_rank, [(build, sizes, dtype, grouped)] * 2):
            for one, other in zip(found, expected, strict=True):
                assert (one - other).norm() <= tolerance * other.norm(), (sizes, one, other)
            assert (found[0] - expected[0]).abs() <= 0.1 * tolerance * expected[0].abs()


def trained(shard: bool, device: str = DEVICE) -> dict[str, Tensor]:
    """Return the weights after two epochs."""
    trainer = sharded.make_trainer(shard, device=device, microbatch_size=3)
    trainer.run(sharded.loader(), max_epochs=2)
    return {name: value.cpu() for name, value in sharded.weights_of(trainer.model).items()}


@pytest.mark.parametrize("shard", [False, True])
def test_two_gpus_end_with_the_weights_of_one_process(gpus, shard):
    expected = trained(False, "cpu")
    for found in gpus.run(trained, [(shard,)] * 2):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9)


def around_a_broken_batch() -> list[dict[str, Tensor]]:
    """Return the weights before and after an update whose batch has a NaN on the second rank."""

    def spoil(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image = batch["image"]
        if trainer.state.iteration == 2 and dist.get_rank() == 1:
            image = image.masked_fill(torch.ones_like(image, dtype=torch.bool), torch.nan)
        return {**batch, "image": image}

    trainer = sharded.make_trainer(False, device=DEVICE, transform=spoil).attach(LossGuard())
    states: list[dict[str, Tensor]] = []
    for event in (Events.ITERATION_STARTED, Events.ITERATION_COMPLETED):
        trainer.add_event_handler(
            event(once=2), lambda: states.append(sharded.weights_of(trainer.model))
        )
    trainer.run(sharded.loader(), max_epochs=1)
    states.append(sharded.weights_of(trainer.model))
    return [{name: value.cpu() for name, value in state.items()} for state in states]


def test_a_nan_on_one_gpu_leaves_out_the_update_on_both(gpus):
    first, second = gpus.run(around_a_broken_batch, [()] * 2)
    before, after, end = first
    for name, value in before.items():
        assert after[name].equal(value)
        assert end[name].isfinite().all()
        assert end[name].equal(second[-1][name])
    assert not all(end[name].equal(value) for name, value in before.items())


def test_a_failing_rank_ends_the_job_with_its_own_traceback(tmp_path):
    (waiting_code, waited), (failing_code, failed) = job(tmp_path, "raises", "10")
    assert failing_code == 1
    assert failed.rstrip().endswith("ValueError: planted")
    assert failed.count("Traceback") == 1
    assert waiting_code != 0
    assert "ValueError" not in waited or "Rank 1 failed with ValueError: planted" in waited


def test_a_rank_that_hangs_is_waited_for_at_a_place_with_a_name(tmp_path):
    (code, text), _ = job(tmp_path, "hangs", "10")
    assert code != 0
    assert re.search(
        r"Rank 0 has been at one place for \S+ s: (averaging gradients|a log point)", text
    )


def test_a_signal_to_one_of_two_gpus_ends_both_with_a_checkpoint(tmp_path):
    folder = tmp_path / "asked"
    processes = start(folder, 2, seconds=0.2, GPU="1", EQUAL="1")
    wait_for_a_save(folder, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert 0 not in codes(processes)  # torch may abort a process whose peer has gone
    finish(folder, 2, GPU="1", EQUAL="1")
    assert_same_weights(folder, whole_run(tmp_path))


@pytest.mark.parametrize("ranks", [2, 1])
def test_a_sharded_run_that_is_killed_resumes_on_two_gpus_and_on_one(tmp_path, ranks):
    folder = tmp_path / "killed"
    processes = start(folder, 2, GPU="1", EQUAL="1", SHARD="1")
    wait_for_a_save(folder, processes)
    kill(processes)
    finish(folder, ranks, GPU="1", EQUAL="1", SHARD="1")
    assert_same_weights(folder, whole_run(tmp_path, SHARD="1"))


def whole_run(folder: Path, **environment: str) -> Path:
    """Return the folder of an uninterrupted run of one process on the CPU."""
    finish(folder / "whole", 1, EQUAL="1", **environment)
    return folder / "whole"


def assert_same_weights(folder: Path, other: Path) -> None:
    """Assert that the weights at the end of two runs agree, within float64 on two devices."""
    assert (folder / "order.json").read_text() == (other / "order.json").read_text()
    found, expected = (torch.load(run / "weights.pt") for run in (folder, other))
    assert len(found) == len(expected) > 6
    for one, value in zip(found, expected, strict=True):
        assert (one.double() - value.double()).norm() <= 1e-6 * value.double().norm()
