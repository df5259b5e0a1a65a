"""Models compiled to CUDA graphs, whose results lie in the same memory each time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.engine import SeededLoader, Trainer, tasks
from diptych.handlers import Evaluation, RetrievalRecall
from diptych.losses import CLIPLoss, CrossEntropyLoss

pytestmark = pytest.mark.gpu

PAIRS = [
    {
        "image": torch.randn(16, generator=torch.Generator().manual_seed(i)),
        "text": torch.randn(8, generator=torch.Generator().manual_seed(1000 + i)),
        "label": torch.tensor(i % 4),
    }
    for i in range(96)
]


class Towers(nn.Module):
    """Two towers; the first has buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.GELU())
        self.text = nn.Linear(8, 32)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)


def make_loader() -> SeededLoader:
    return SeededLoader(PAIRS, 12, seed=1)


def contrastive(**settings: Any) -> Trainer:
    """A loss that couples the samples: gradients are cached over pieces."""
    torch.manual_seed(0)
    model, loss = Towers(), CLIPLoss()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.05)
    return Trainer(model, loss, optimizer, task=tasks.image_text, log_every=1, **settings)


def supervised(**settings: Any) -> Trainer:
    """A mean over samples: gradients add up over pieces."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(
        model, CrossEntropyLoss(), optimizer, task=tasks.classification, log_every=1, **settings
    )


@pytest.mark.parametrize("microbatch_size", [None, 4])
@pytest.mark.parametrize("build", [contrastive, supervised])
def test_cuda_graphs_learn_what_the_eager_model_learns(build, microbatch_size):
    trainers = [
        build(microbatch_size=microbatch_size, compile=how) for how in (False, "reduce-overhead")
    ]
    histories = [trainer.train(make_loader(), num_epochs=3) for trainer in trainers]
    torch.testing.assert_close(*map(torch.tensor, histories), rtol=1e-4, atol=1e-4)
    states = [trainer.model.state_dict() for trainer in trainers]
    assert list(states[0]) == list(states[1])
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=1e-3, atol=1e-4)


def test_an_evaluation_keeps_the_features_of_all_its_batches():
    values = []
    for how in (False, "reduce-overhead"):
        trainer = contrastive(compile=how)
        trainer.attach(Evaluation(make_loader(), metrics=[RetrievalRecall(k=(1, 5))]))
        trainer.run(make_loader(), max_epochs=3)
        values.append([v for tag, v in trainer.state.metrics.items() if tag.startswith("val/")])
    assert len(values[0]) >= 2
    assert values[0] == pytest.approx(values[1], abs=0.03)


def test_what_a_handler_keeps_stays_as_it_was():
    trainer, kept = contrastive(compile="reduce-overhead"), []

    @trainer.on("ITERATION_COMPLETED")
    def keep() -> None:
        features = trainer.outputs["image_features"]
        kept.append((features, features.clone()))

    trainer.run(make_loader(), max_epochs=2)
    assert all(torch.equal(features, copy) for features, copy in kept)
