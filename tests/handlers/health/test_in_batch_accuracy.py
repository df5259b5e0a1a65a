"""In-batch accuracy: what it counts, and the outputs it needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diptych.engine import BatchError, Trainer, tasks
from diptych.engine.distributed.collectives import rank
from diptych.handlers.health.in_batch_accuracy import InBatchAccuracy
from tests.losses.ranks import Ranks


class Same(nn.Module):
    """Returns its inputs, times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return image * self.weight, text * self.weight


class Product(nn.Module):
    def forward(self, first: Tensor, second: Tensor, groups: Tensor | None = None) -> Tensor:
        return (first * second).mean()


def accuracy_of(batches, **settings) -> list[float]:
    model = Same()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = Trainer(model, Product(), optimizer, task=tasks.image_text, device="cpu", log_every=1)
    trainer.attach(InBatchAccuracy(**settings))
    found = []
    trainer.add_event_handler(
        "LOGGED", lambda: found.append(trainer.metrics.record.values.get("train/in_batch_accuracy"))
    )
    trainer.run(batches, max_epochs=1)
    return found


def test_it_counts_pairs_that_are_more_similar_than_every_negative_in_both_directions():
    image = torch.eye(4)
    text = torch.eye(4)
    text[3] = torch.tensor([2.0, 0.0, 0.0, 1.0])  # nearer to the first image than to its own
    # Image 3 finds its text, text 3 does not find its image; text 3 ranks below text 0.
    assert accuracy_of([{"image": image, "text": text}]) == [pytest.approx(7 / 8)]


def test_samples_of_one_group_are_no_negatives_and_a_tie_counts_as_wrong():
    same = {"image": torch.ones(4, 2), "text": torch.ones(4, 2)}
    assert accuracy_of([same]) == [0.0]
    assert accuracy_of([{**same, "group": torch.zeros(4).long()}]) == [1.0]


def on_ranks() -> list[float]:
    """Return the accuracy of two samples on rank 0, all wrong, and four on rank 1, all right."""
    size = 2 if rank() == 0 else 4
    image = torch.eye(4)[:size]
    uneven = {"image": image, "text": image.flip(0) if rank() == 0 else image}
    last = {"image": image[: 2 * rank()], "text": image[: 2 * rank()]}  # none on rank 0
    return accuracy_of([uneven, last])


def test_it_is_the_mean_over_the_samples_of_all_ranks(ranks: Ranks) -> None:
    for found in ranks.run(on_ranks, [()] * 2):
        assert found == [pytest.approx(4 / 6), 1.0]  # not 1 / 2, the mean of the ranks


def test_it_is_published_every_n_iterations():
    batch = {"image": torch.eye(3), "text": torch.eye(3)}
    assert accuracy_of([batch] * 4, every=2) == [None, 1.0, None, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be a whole number of iterations >= 1, got 0"),
        (
            {"features": "image_features"},
            "features must be 2 names in a list, got 'image_features'",
        ),
        ({"features": ("image_features",)}, "features must be 2 names"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        InBatchAccuracy(**arguments)


def test_outputs_without_two_sides_are_refused():
    batch = {"image": torch.eye(3), "text": torch.eye(3)}
    with pytest.raises(BatchError, match="must have image_features and pixels of shape"):
        accuracy_of([batch], features=("image_features", "pixels"))
