"""What must hold on an accelerator: the same promises, and no waiting between two log points."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Events
from torch import nn

from diptych.engine import MetricsEvents, SeededLoader, StepEvents, Trainer, tasks
from diptych.handlers import (
    CheckpointManager,
    Evaluation,
    GradientClipping,
    LearningRate,
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


def make_trainer(**settings) -> Trainer:
    torch.manual_seed(0)
    model, loss = TwoTowers(), CLIPLoss()
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=1e-3)
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
    waited: list[int] = []

    @trainer.on(Events.GET_BATCH_COMPLETED)
    def forbid():
        torch.cuda.set_sync_debug_mode("error")

    @trainer.on(Events.ITERATION_COMPLETED)
    def allow():
        torch.cuda.set_sync_debug_mode("default")
        waited.append(trainer.state.iteration)

    try:
        trainer.run(make_loader(), max_epochs=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waited) == 16


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
