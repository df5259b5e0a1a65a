"""Handlers of gradients with an embedding whose gradients are sparse, against a dense one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diptych.engine import CompositeOptimizer, MetricsEvents, Trainer, certify, tasks
from diptych.handlers import (
    GradientClipping,
    GradientDiagnostics,
    Histograms,
    LossGuard,
    ModalityBalancing,
    TensorBoard,
)
from diptych.losses import CLIPLoss


class Pair(nn.Module):
    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.image = nn.Linear(4, 3)
        self.text = nn.Embedding(7, 3, sparse=sparse)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(images), self.text(tokens).mean(1)


def make_batches() -> list[tuple[Tensor, Tensor]]:
    """Return batches whose captions repeat tokens, and leave out the tokens 5 and 6."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(8, 4, generator=generator),
            torch.randint(0, 5, (8, 6), generator=generator),
        )
        for _ in range(3)
    ]


def make_trainer(*handlers: object, sparse: bool) -> Trainer:
    torch.manual_seed(0)
    model, loss = Pair(sparse=sparse), CLIPLoss()
    rest = [*model.image.parameters(), *loss.parameters()]
    optimizer = CompositeOptimizer(
        torch.optim.SGD(model.text.parameters(), lr=0.1), torch.optim.AdamW(rest, lr=0.01)
    )
    trainer = Trainer(model, loss, optimizer, task=tasks.image_text, log_every=1)
    return trainer.attach(*handlers)


def run(*handlers: object, sparse: bool) -> tuple[Tensor, list[dict[str, float]]]:
    """Return the embedding after a run, and the statistics of each update's gradients."""
    trainer = make_trainer(*handlers, sparse=sparse)
    records = []

    def note(trainer: Trainer) -> None:
        values = trainer.metrics.record.values
        records.append({k: v for k, v in values.items() if not k.startswith("time")})

    trainer.add_event_handler(MetricsEvents.LOGGED, note)
    trainer.run(make_batches(), max_epochs=1)
    return trainer.model.text.weight.detach(), records


MAKERS: dict[str, Callable[[Path], list[object]]] = {
    "clipping by norm": lambda _: [GradientClipping(max_norm=0.1)],
    "clipping by value": lambda _: [GradientClipping(max_value=0.01)],
    "diagnostics": lambda _: [GradientDiagnostics(every=1)],
    "balancing": lambda _: [ModalityBalancing(components=("image", "text"), ratio=0.1, warmup=0)],
    "guard": lambda path: [LossGuard(path)],
    "histograms": lambda path: [TensorBoard(path), Histograms(every=1)],
}


@pytest.mark.parametrize("name", MAKERS)
def test_sparse_gradients_are_handled_as_dense_ones(name: str, tmp_path: Path):
    weight, records = run(*MAKERS[name](tmp_path / "sparse"), sparse=True)
    dense, expected = run(*MAKERS[name](tmp_path / "dense"), sparse=False)
    torch.testing.assert_close(weight, dense, rtol=1e-5, atol=1e-6)
    assert len(records) == 3
    for record, other in zip(records, expected, strict=True):
        assert record == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_measuring_sparse_gradients_changes_no_bit_of_them():
    bare, _ = run(sparse=True)
    assert torch.equal(run(GradientDiagnostics(every=1), sparse=True)[0], bare)


def test_the_certificate_compares_sparse_gradients():
    trainer = make_trainer(GradientClipping(max_norm=0.1), sparse=True)
    found = certify(trainer, make_batches()[0], ranks=False)
    assert all(check.passed for check in found.checks), found
