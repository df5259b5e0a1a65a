"""OneOf: only the active part is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diptych.losses import (
    CLIPLoss,
    CrossEntropyLoss,
    MatryoshkaLoss,
    OneOf,
    SupervisedContrastiveLoss,
    VICRegLoss,
    WeightedSum,
)
from tests.losses.oracles import draw

SIDES = draw(6, 8), draw(6, 8, seed=1)


def test_the_value_is_that_of_the_active_part_and_changes_with_it() -> None:
    loss = OneOf(losses={"contrast": CLIPLoss(), "spread": VICRegLoss()})

    assert loss.active == "contrast"
    torch.testing.assert_close(loss(*SIDES), CLIPLoss()(*SIDES))
    loss.active = "spread"
    torch.testing.assert_close(loss(*SIDES), VICRegLoss()(*SIDES))
    assert list(loss.terms(*SIDES)) == [
        "spread/invariance",
        "spread/variance",
        "spread/covariance",
    ]


def test_a_part_that_is_not_active_gets_no_gradient() -> None:
    loss = OneOf(losses={"a": CLIPLoss(), "b": CLIPLoss()}, active="b")

    loss(*SIDES).backward()

    gradients = {name: p.grad is not None for name, p in loss.named_parameters()}
    assert gradients == {name: name.startswith("losses.b.") for name in gradients}
    assert set(gradients.values()) == {False, True}


def test_the_active_part_determines_whether_samples_are_coupled() -> None:
    loss = OneOf(
        losses={"classes": CrossEntropyLoss(), "contrast": SupervisedContrastiveLoss()},
        inputs={"classes": (0, 1), "contrast": (2, 1)},
    )
    logits, labels = draw(6, 5), torch.tensor([0, 1, 0, 1, 4, 4])

    assert not loss.couples_samples
    total, weight = loss.total_and_weight(logits, labels, draw(6, 8))
    torch.testing.assert_close(total / weight, CrossEntropyLoss()(logits, labels))
    loss.active = "contrast"
    assert loss.couples_samples
    with pytest.raises(TypeError, match="single part that is a mean over samples, got contrast"):
        loss.total_and_weight(logits, labels, draw(6, 8))


class PlainMean(nn.Module):
    """A mean over samples without `total_and_weight`."""

    couples_samples = False

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return (first - second).square().mean()


@pytest.mark.parametrize(
    "composite",
    [
        OneOf(losses={"plain": PlainMean()}),
        WeightedSum(losses={"plain": PlainMean()}),
        MatryoshkaLoss(loss=PlainMean(), dims=(4,)),
    ],
    ids=lambda composite: type(composite).__name__,
)
def test_a_part_without_total_and_weight_couples_samples(composite: nn.Module) -> None:
    assert composite.couples_samples


def test_an_unknown_active_name_is_refused() -> None:
    loss = OneOf(losses={"a": CLIPLoss(), "b": CLIPLoss()})

    with pytest.raises(ValueError, match="active must be one of a, b, got 'c'"):
        loss.active = "c"
    with pytest.raises(ValueError, match="got 'hard'"):
        OneOf(losses=(CLIPLoss(),), active="hard")
