"""Promises on an accelerator: those of the CPU, and no waiting between two log points."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Events
from torch import nn

from diptych.engine import (
    CompositeOptimizer,
    MetricsEvents,
    SeededLoader,
    StepEvents,
    Trainer,
    tasks,
)
from diptych.handlers import (
    CheckpointManager,
    Evaluation,
    GradientClipping,
    GradientDiagnostics,
    InBatchAccuracy,
    LearningRate,
    LossGuard,
    ModalityBalancing,
    OnlineLinearProbe,
    RepresentationHealth,
    RetrievalRecall,
    default_handlers,
)
from diptych.losses import CLIPLoss

pytestmark = pytest.mark.gpu

PAIRS = [
    {
        "image": torch.randn(16, generator=torch.Generator().manual_seed(i)),
        "text": torch.ones(8) * i,
    }
    for i in range(96)
]


class TwoTowers(nn.Module):
    """Dropout draws from the device's generator; batch norm has buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Dropout(0.1))
        self.text = nn.Linear(8, 32)

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.image(image), self.text(text)


def run_without_waiting(trainer):
    """Run 16 iterations; after the first, whose batch is checked, to wait is an error."""
    waited: list[int] = []

    @trainer.on(Events.GET_BATCH_COMPLETED)
    def forbid():
        torch.cuda.set_sync_debug_mode("error" if trainer.state.iteration > 1 else "default")

    @trainer.on(Events.ITERATION_COMPLETED)
    def allow():
        torch.cuda.set_sync_debug_mode("default")
        waited.append(trainer.state.iteration)

    try:
        trainer.run(make_loader(), max_epochs=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waited) == 16


def make_trainer(**settings) -> Trainer:
    torch.manual_seed(0)
    model, loss = TwoTowers(), CLIPLoss()
    options = {"lr": 1e-3, "fused": settings.pop("fused", None)}
    rest = [*model.text.parameters(), *loss.parameters()]
    if settings.pop("members", False):
        optimizer = CompositeOptimizer(
            torch.optim.AdamW(model.image.parameters(), **options),
            torch.optim.AdamW(rest, **options),
        )
    else:
        optimizer = torch.optim.AdamW([*model.image.parameters(), *rest], **options)
    return Trainer(
        model, loss, optimizer, task=tasks.image_text, seed=0, **{"log_every": 8, **settings}
    )


def make_loader() -> SeededLoader:
    return SeededLoader(PAIRS, 12, seed=1)


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().cpu() for p in (*trainer.model.parameters(), *trainer.loss.parameters())]


def test_a_trainer_goes_to_the_accelerator_by_itself():
    assert make_trainer().device.type == "cuda"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("microbatch_size", [None, 5])
def test_nothing_waits_for_the_device_between_two_log_points(tmp_path, precision, microbatch_size):
    trainer = make_trainer(precision=precision, microbatch_size=microbatch_size, log_every=1000)
    trainer.attach(
        LearningRate(warmup=4, decay="cosine", total=64),
        GradientClipping(max_norm=1.0),
        *default_handlers(tmp_path, every="epoch"),
    )
    run_without_waiting(trainer)


def test_what_watches_the_features_waits_at_log_points_alone():
    trainer = make_trainer(log_every=1000)
    probe = OnlineLinearProbe(classes=2, labels=lambda batch: (batch["text"][:, 0] > 40).long())
    trainer.attach(RepresentationHealth(every=1), InBatchAccuracy(), probe)
    run_without_waiting(trainer)
    assert "health/auroc" in trainer.metrics.record.values


def first_gradient(**settings) -> torch.Tensor:
    """Return all gradients of the first update, without batch norm and dropout."""
    trainer = make_trainer(**settings)
    trainer.model.image[1] = trainer.model.image[2] = nn.Identity()
    taken: list[torch.Tensor] = []

    @trainer.on(StepEvents.GRADIENTS_READY)
    def take() -> None:
        parameters = (*trainer.model.parameters(), *trainer.loss.parameters())
        taken.extend(p.grad.detach().double().reshape(-1).cpu() for p in parameters)

    trainer.run(make_loader(), max_iters=1)
    return torch.cat(taken)


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-2), ("fp16", 3e-3)]
)
def test_pieces_give_the_gradient_of_the_whole_batch_within_the_precision(precision, tolerance):
    whole = first_gradient(precision=precision)
    pieces = first_gradient(precision=precision, microbatch_size=5)
    assert (whole - pieces).norm() <= tolerance * whole.norm()


def test_attached_handlers_change_no_number(tmp_path):
    bare, watched = make_trainer(), make_trainer()
    watched.attach(
        Evaluation(make_loader(), metrics=[RetrievalRecall(k=(1, 5))]), *default_handlers(tmp_path)
    )
    for trainer in (bare, watched):
        trainer.run(make_loader(), max_epochs=3)
    assert all(torch.equal(a, b) for a, b in zip(weights(bare), weights(watched), strict=True))


def test_a_run_that_is_cut_continues_on_the_device(tmp_path):
    whole = make_trainer()
    whole.run(make_loader(), max_epochs=3)
    cut = make_trainer()
    cut.attach(CheckpointManager(tmp_path, every=3, background=True))
    cut.add_event_handler(Events.ITERATION_COMPLETED(once=9), cut.terminate)
    cut.run(make_loader(), max_epochs=3)
    resumed = make_trainer()
    resumed.attach(CheckpointManager(tmp_path, every=3))
    resumed.run(make_loader(), max_epochs=3)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


def test_fp16_scales_and_counts_the_steps_that_it_skips():
    trainer = make_trainer(precision="fp16", log_every=4)
    records: list[dict[str, float]] = []
    trainer.add_event_handler(
        MetricsEvents.LOGGED, lambda: records.append(trainer.metrics.record.values)
    )
    trainer.add_event_handler(
        StepEvents.LOSS_COMPUTED(once=2), lambda: trainer.scaler.update(new_scale=2.0**40)
    )
    trainer.run(make_loader(), max_epochs=1)
    assert records[-1]["train/skipped_steps"] >= 1
    assert all(torch.isfinite(w).all() for w in weights(trainer))


def test_a_compiled_model_keeps_its_keys_and_learns_the_same():
    keys = list(TwoTowers().state_dict())
    losses = []
    for compiled in (False, True):
        trainer = make_trainer(compile=compiled, log_every=1)
        trainer.model.image[2].p = 0.0
        losses.append(trainer.train(make_loader(), num_epochs=2))
        assert list(trainer.model.state_dict()) == keys
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-3)


def broken_loader(at: int = 3) -> list[dict[str, torch.Tensor]]:
    """Return batches, one of which (counted from 1) holds a NaN."""
    loader = [{key: value.clone() for key, value in batch.items()} for batch in make_loader()]
    loader[at - 1]["image"][0, 0] = torch.nan
    return loader


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_nothing_waits_where_gradients_are_watched_balanced_and_guarded(precision):
    trainer = make_trainer(precision=precision, log_every=1000, fused=True)
    guard = LossGuard(window=3)
    trainer.attach(
        guard,
        GradientDiagnostics(every=1),
        ModalityBalancing(warmup=2),
        GradientClipping(max_norm=1.0),
    )
    trainer.add_event_handler(
        Events.GET_BATCH_COMPLETED(event_filter=lambda _, count: count > 1),
        lambda: torch.cuda.set_sync_debug_mode("error"),
    )
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: torch.cuda.set_sync_debug_mode("default")
    )
    loader = [{k: v.pin_memory() for k, v in batch.items()} for batch in broken_loader()]
    try:
        trainer.run(loader, max_epochs=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert guard.caught == 2
    assert all(torch.isfinite(w).all() for w in weights(trainer))


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_skipped_update_changes_nothing_on_the_device(precision, fused):
    trainer = make_trainer(precision=precision, fused=fused).attach(LossGuard())
    states: list[list[torch.Tensor]] = []

    def keep() -> None:
        moments = [t for state in trainer.optimizer.state.values() for t in state.values()]
        buffers = [*trainer.model.buffers(), *trainer.loss.buffers()]
        states.append([t.detach().cpu().clone() for t in (*weights(trainer), *buffers, *moments)])

    for event in (Events.ITERATION_STARTED, Events.ITERATION_COMPLETED):
        trainer.add_event_handler(event(once=3), keep)
    trainer.run(broken_loader(at=3), max_epochs=1)
    before, after = states
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_several_optimizers_make_the_updates_of_one(precision, fused):
    trainers = [
        make_trainer(precision=precision, fused=fused, members=members).attach(LossGuard())
        for members in (False, True)
    ]
    for trainer in trainers:
        trainer.run(broken_loader(at=3), max_epochs=1)
    for one, other in zip(*map(weights, trainers), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nothing_waits_for_several_fused_optimizers(precision):
    trainer = make_trainer(precision=precision, fused=True, members=True)
    run_without_waiting(trainer.attach(LearningRate(warmup=2), GradientClipping(max_norm=1.0)))


def test_the_scalers_search_is_no_fault():
    guard = LossGuard(budget=0)
    trainer = make_trainer(precision="fp16", log_every=4, fused=True).attach(guard)
    trainer.add_event_handler(
        StepEvents.LOSS_COMPUTED(once=2), lambda: trainer.scaler.update(new_scale=2.0**40)
    )
    trainer.run(make_loader(), max_epochs=1)
    assert guard.caught == 0
    assert float(trainer.skipped_steps) >= 1


def test_a_record_of_the_device_is_replayed_on_it(tmp_path):
    from diptych.handlers.loss_guard.replay import replay

    trainer = make_trainer().attach(LossGuard(tmp_path))
    trainer.run(broken_loader(), max_epochs=1)
    [path] = tmp_path.glob("*.pt")
    assert replay(path, make_trainer).differing() == []
