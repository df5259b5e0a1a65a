"""The fusion example trains, and its figures are what they are called."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from examples.fusion import main, results_of


def test_it_trains_and_tells_its_results(emoji, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = main(emoji[::12], epochs=2)
    assert len(results) == 6
    assert all(0 <= value <= 1 for value in results.values())


class Known(nn.Module):
    """Stands for a trained model: features that say which emoji an image or text is of."""

    def __init__(self, groups: Tensor, texts: int) -> None:
        super().__init__()
        self.rows = {"image": torch.eye(texts)[groups], "text": torch.eye(texts)}

    def take(self, side: str, count: int) -> Tensor:
        first, self.rows[side] = self.rows[side].tensor_split([count])
        return first

    def encode_image(self, image: Tensor) -> Tensor:
        return self.take("image", len(image))

    def encode_text(self, text: Tensor) -> Tensor:
        return self.take("text", len(text))


class Perfect(nn.Module):
    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        same = (image * text).sum(dim=1)
        return torch.stack([0.5 - same, same - 0.5], dim=1)


def test_who_knows_every_emoji_gets_everything_right(emoji):
    few = emoji[::40]
    groups = torch.tensor([i for i, one in enumerate(few) if one.split == "unseen_drawing"])
    loss = SimpleNamespace(losses={"fusion": SimpleNamespace(fusion=Perfect())})
    trainer = SimpleNamespace(model=Known(groups, len(few)), loss=loss)
    assert set(results_of(trainer, few).values()) == {1.0}
