"""A two-tower model that two ranks share out, trained as one process trains it whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from diptych.engine import MetricsEvents, SeededLoader, Trainer, tasks
from diptych.engine.distributed.dtensor import full_tensor, local_part
from diptych.losses import CLIPLoss
from diptych.losses.base.shared_scale import share_logit_scale

IMAGE, TEXT, WIDTH, FEATURES = 6, 5, 7, 3
"""Odd widths: the ranks' shares differ."""


class Block(nn.Module):
    """A residual block: what a unit is."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.ones(1))  # of which the second rank has nothing

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * torch.tanh(self.linear(self.norm(x)))


class Tower(nn.Module):
    """A stem, two blocks and a head."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TwoTowers(nn.Module):
    """Two towers, and a logit scale without a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = Tower(IMAGE), Tower(TEXT)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)


class Pairs(Dataset[dict[str, Tensor]]):
    """Twenty-one pairs: two batches of eight and one of five."""

    def __len__(self) -> int:
        return 21

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        draw = {"generator": generator, "dtype": torch.float64}
        return {"image": torch.randn(IMAGE, **draw), "text": torch.randn(TEXT, **draw)}


def loader() -> SeededLoader:
    """Return three batches an epoch, the last one smaller and odd."""
    return SeededLoader(Pairs(), 8, seed=1)


def all_pairs() -> dict[str, Tensor]:
    """Return all pairs as one batch."""
    pairs = [Pairs()[index] for index in range(len(Pairs()))]
    return {key: torch.stack([pair[key] for pair in pairs]) for key in ("image", "text")}


def make_trainer(
    shard: Any = True, *, fused: bool = False, foreach: bool | None = None, **settings: Any
) -> Trainer:
    """Return a trainer of the towers whose loss trains the model's own logit scale."""
    torch.manual_seed(0)
    model = TwoTowers().double()
    loss = share_logit_scale(CLIPLoss(), model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused, foreach=foreach)
    settings = {"task": tasks.image_text, "device": "cpu", "log_every": 2, "seed": 0, **settings}
    return Trainer(model, loss, optimizer, shard=shard, **settings)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's whole parameters and buffers, copied."""
    return {
        name: full_tensor(value).detach().clone() for name, value in module.state_dict().items()
    }


def train(
    shard: Any,
    settings: dict[str, Any],
    handlers: Callable[..., Sequence[Any]] | None = None,
    *arguments: Any,
    epochs: int = 2,
) -> dict[str, Any]:
    """Return the weights after some epochs, and what was logged on the way."""
    trainer = make_trainer(shard, **settings)
    if handlers is not None:
        trainer.attach(*handlers(*arguments))
    records: list[dict[str, float]] = []
    trainer.add_event_handler(
        MetricsEvents.LOGGED, lambda: records.append(dict(trainer.metrics.record.values))
    )
    trainer.run(loader(), max_epochs=epochs)
    return {"weights": weights_of(trainer.model), "records": records, "share": share_of(trainer)}


def share_of(trainer: Trainer) -> float:
    """Return which share of parameters and optimizer state this rank holds."""
    held = [*trainer.model.parameters()]
    held += [v for state in trainer.optimizer.state.values() for v in state.values()]
    return sum(local_part(v).numel() for v in held) / sum(v.numel() for v in held)


def assert_equal_runs(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Assert that two runs ended with one set of weights and logged the same values."""
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(
            found["weights"][name], value, rtol=1e-9, atol=1e-9, msg=lambda t, n=name: f"{n}: {t}"
        )
    for own, other in zip(found["records"], expected["records"], strict=True):
        assert own.keys() == other.keys()
        for name in other:
            if name.startswith("health/") and not name.endswith("/moving"):
                continue  # of this rank's samples
            torch.testing.assert_close(
                torch.tensor(own[name]),
                torch.tensor(other[name]),
                rtol=1e-5,
                atol=1e-6,
                equal_nan=True,
                msg=lambda t, n=name: f"{n}: {t}",
            )
