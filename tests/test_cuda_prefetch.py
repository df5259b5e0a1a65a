"""Batches on their way to a real device, and what is done to them there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import Tensor, nn

from diptych.engine import OnKeys, SeededLoader, StepEvents, Trainer, tasks
from diptych.engine.data.prefetch import Prefetcher
from diptych.handlers import CheckpointManager, Throughput
from diptych.losses import CLIPLoss

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
CYCLES = 1_700_000
"""About a millisecond on any of today's devices."""

PAIRS = [
    {
        "image": torch.randn(16, generator=torch.Generator().manual_seed(i)),
        "text": torch.ones(8) * i,
    }
    for i in range(96)
]


class TwoTowers(nn.Module):
    """Dropout draws from the device's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.1))
        self.text = nn.Linear(8, 32)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)


def make_trainer(**settings: Any) -> Trainer:
    torch.manual_seed(0)
    model, loss = TwoTowers(), CLIPLoss()
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=1e-3)
    return Trainer(
        model, loss, optimizer, task=tasks.image_text, seed=0, **{"log_every": 8, **settings}
    )


def make_loader(size: int = 14) -> SeededLoader:
    """Return a loader of pinned batches, the last of which is smaller."""
    return SeededLoader(PAIRS, size, seed=1)


def pageable() -> list[dict[str, Tensor]]:
    return [{key: value.clone() for key, value in batch.items()} for batch in make_loader()]


def same(first: Trainer, second: Trainer) -> bool:
    weights = [[*t.model.parameters(), *t.loss.parameters()] for t in (first, second)]
    return all(map(torch.equal, *weights))


@pytest.mark.parametrize("microbatch_size", [None, 5])
@pytest.mark.parametrize("data", [make_loader, pageable])
def test_prefetching_changes_no_weight(data, microbatch_size):
    trainers = [
        make_trainer(prefetch=prefetch, microbatch_size=microbatch_size)
        for prefetch in (True, False)
    ]
    for trainer in trainers:
        trainer.run(data(), max_epochs=4)
    assert isinstance(trainers[0]._process_function.to_device, Prefetcher)
    assert same(*trainers)


def test_a_run_that_is_cut_continues_with_the_batch_that_comes_next(tmp_path):
    whole, cut, resumed = make_trainer(), make_trainer(), make_trainer()
    whole.run(make_loader(), max_epochs=3)
    cut.attach(CheckpointManager(tmp_path, every=2))
    cut.add_event_handler(Events.ITERATION_COMPLETED(once=10), cut.terminate)
    cut.run(make_loader(), max_epochs=3)
    resumed.attach(CheckpointManager(tmp_path, every=2))
    resumed.run(make_loader(), max_epochs=3)
    assert same(whole, resumed)


def test_nothing_waits_for_the_device_from_one_log_point_to_the_next_fetches_included():
    trainer = make_trainer(log_every=1000).attach(Throughput())
    modes = {3: "error", 15: "default"}
    for iteration, mode in modes.items():
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED(once=iteration), torch.cuda.set_sync_debug_mode, mode
        )
    try:
        trainer.run(make_loader(12), max_epochs=2, epoch_length=16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.iteration == 32


def batches_of(*sizes: int) -> list[dict[str, Tensor]]:
    """Return pinned batches of so many MiB, each full of its number.

    Made before the device has work: to pin memory may wait for it.
    """
    return [
        {"image": torch.full((size * 2**18,), float(number)).pin_memory()}
        for number, size in enumerate(sizes)
    ]


def test_a_batch_is_copied_while_the_device_computes():
    bring, batches = Prefetcher(CUDA), batches_of(*[8] * 5)
    for batch in batches[:4]:  # what to take from the device's memory is in the pool now
        bring(batch)
    torch.cuda.synchronize()
    torch.cuda._sleep(1000 * CYCLES)
    update = torch.cuda.current_stream().record_event()
    arrived = bring(batches[4])
    bring._side.synchronize()
    assert not update.query(), "the copy came after the update"
    assert bool((arrived["image"] == 4).all())


def test_batches_that_are_kept_hold_what_they_held_however_far_the_host_is_ahead():
    bring, kept = Prefetcher(CUDA), {}
    for number, batch in enumerate(batches_of(*[2 if n % 5 == 4 else 1 for n in range(24)])):
        arrived = bring(batch)["image"]
        torch.cuda._sleep(5 * CYCLES)
        kept[number] = (arrived, arrived * 2)
        if number % 3 == 0:
            kept.pop(number // 2, None)  # its memory is free for what comes later
    assert len(kept) > 3
    for number, (arrived, doubled) in kept.items():
        assert bool((arrived == number).all())
        assert bool((doubled == 2 * number).all())


def test_however_far_the_host_is_ahead_one_batch_more_is_in_memory():
    bring, batches = Prefetcher(CUDA), batches_of(8, 8)
    bring(batches[0])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for number in range(20):
        arrived = bring(batches[number % 2])
        torch.cuda._sleep(2 * CYCLES)
        del arrived
    assert torch.cuda.max_memory_allocated() - before <= 8 * 2**20
    torch.cuda.synchronize()


class Slow:
    """Gives a resident batch after some milliseconds."""

    def __init__(self, milliseconds: float, batches: int = 30) -> None:
        self.seconds, self.batches = milliseconds / 1e3, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[None]:
        for _ in range(self.batches):
            time.sleep(self.seconds)
            yield None


def waited(load: float, update: float) -> tuple[float, float]:
    """Return `time/data` and `time/step`, in milliseconds, of a run whose parts take so many."""

    def step(trainer: Trainer, _: object) -> SimpleNamespace:
        torch.cuda._sleep(int(update * CYCLES))
        trainer.metrics.update({"train/loss": 0.0})
        return SimpleNamespace(batch_size=1)

    trainer = make_trainer(step=step, log_every=10).attach(Throughput())
    trainer.run(Slow(load), max_epochs=1)
    values = trainer.metrics.record.values
    return values["time/data"] * 1e3, values["time/step"] * 1e3


def test_a_loader_that_the_device_does_not_wait_for_costs_nothing():
    data, whole = waited(load=5.0, update=50.0)
    # The first of ten batches after a log point is fetched in the open.
    assert data < 1.5
    assert whole > 30.0


def test_a_device_that_waits_for_its_data_is_seen():
    data, whole = waited(load=20.0, update=2.0)
    assert 12.0 < data < whole


class Noise(nn.Module):
    """Draws on the device and on the host."""

    def forward(self, image: Tensor) -> Tensor:
        return image * (1 + 0.1 * torch.randn_like(image)) + torch.rand(1).to(image.device)


def noisy(**settings: Any) -> Trainer:
    return make_trainer(transform=OnKeys(Noise(), "image"), **settings)


def test_a_transform_draws_alike_after_an_interruption(tmp_path):
    whole, cut, resumed = noisy(), noisy(), noisy()
    whole.run(make_loader(), max_epochs=2)
    cut.attach(CheckpointManager(tmp_path, every=3))
    cut.add_event_handler(Events.ITERATION_COMPLETED(once=8), cut.terminate)
    cut.run(make_loader(), max_epochs=2)
    resumed.attach(CheckpointManager(tmp_path, every=3))
    resumed.run(make_loader(), max_epochs=2)
    assert same(whole, resumed)


def first_gradient(trainer: Trainer) -> Tensor:
    taken: list[Tensor] = []

    @trainer.on(StepEvents.GRADIENTS_READY)
    def take() -> None:
        parameters = (*trainer.model.parameters(), *trainer.loss.parameters())
        taken.extend(p.grad.detach().double().reshape(-1).cpu() for p in parameters)

    trainer.model.image[1] = nn.Identity()  # dropout draws anew for each shape
    trainer.run(make_loader(), max_iters=1)
    return torch.cat(taken)


def test_a_transform_draws_alike_in_pieces():
    whole, pieces = (first_gradient(noisy(microbatch_size=size)) for size in (None, 5))
    assert (whole - pieces).norm() <= 1e-5 * whole.norm()


def test_a_transform_takes_nothing_from_what_dropout_draws():
    def drawing(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        torch.rand(5, device=batch["image"].device)
        torch.rand(5)
        return batch

    plain, transformed = make_trainer(), make_trainer(transform=drawing)
    for trainer in (plain, transformed):
        trainer.run(make_loader(), max_epochs=2)
    assert same(plain, transformed)


def test_a_transform_of_kornias_runs_without_waiting_between_iterations():
    pytest.importorskip("kornia", reason="needs the extra kornia")
    from kornia.augmentation import RandomHorizontalFlip

    seen: list[Tensor] = []
    flip = OnKeys(lambda rows: RandomHorizontalFlip()(rows[:, None, None]).flatten(1), "image")
    trainer = make_trainer(transform=flip)
    trainer.add_event_handler(
        StepEvents.FORWARD_COMPLETED, lambda: seen.append(trainer.outputs["image_features"])
    )
    trainer.run(make_loader(), max_epochs=1)
    assert all(features.is_cuda for features in seen)
