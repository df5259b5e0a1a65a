"""The members of every loss on pairs: validation, precision, normalisation, terms."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.losses import BaseContrastiveLoss, CLIPLoss, Pairs, VICRegLoss
from tests.losses.oracles import draw


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_similarity_under_autocast_is_computed_in_float32(dtype: torch.dtype) -> None:
    loss = BaseContrastiveLoss(temperature=0.01)
    first, second = draw(6, 16).to(dtype), draw(6, 16, seed=1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss.compute_similarity(first, second)
    expected = F.normalize(first.double()) @ F.normalize(second.double()).T / 0.01
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_normalisation_can_be_turned_off() -> None:
    features = draw(3, 4)
    assert torch.equal(BaseContrastiveLoss(normalize=False).normalize_features(features), features)
    loss = BaseContrastiveLoss(normalize=False, temperature=0.5)
    torch.testing.assert_close(
        loss.compute_similarity(features, features), 2 * features @ features.T
    )


class Named(BaseContrastiveLoss):
    """A loss of two terms."""

    def objective(self, pairs: Pairs) -> dict[str, Tensor]:
        return {"one": pairs.first.sum(), "two": 2 * pairs.second.sum()}


def test_forward_is_the_sum_of_the_terms() -> None:
    first, second = draw(3, 4), draw(3, 4, seed=1)
    terms = Named().terms(first, second)
    assert list(terms) == ["one", "two"]
    assert Named()(first, second) == terms["one"] + terms["two"]


class Short(BaseContrastiveLoss):
    """A loss that defines only forward."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.compute_similarity(first, second).sum()


def test_a_loss_that_defines_only_forward_has_terms_too() -> None:
    first, second = draw(3, 4), draw(3, 4, seed=1)
    assert Short().terms(first, second) == {"contrastive": Short()(first, second)}


def test_a_loss_that_defines_neither_objective_nor_forward_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match=r"Base.* must define objective or forward"):
        BaseContrastiveLoss()(draw(3, 4), draw(3, 4))


GOOD = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("first", "second", "groups", "error", "message"),
    [
        (GOOD[0], GOOD, None, ValueError, r"first must be \[batch, features\], got shape \(4,\)"),
        (GOOD, GOOD[None], None, ValueError, r"second must be .* Pool or flatten"),
        (GOOD, GOOD[:2], None, ValueError, r"equal shapes, .* got \(3, 4\) and \(2, 4\)"),
        (GOOD, GOOD[:, :2], None, ValueError, r"first and second must have equal shapes"),
        (GOOD.long(), GOOD, None, TypeError, "first must be floating point, got torch.int64"),
        (GOOD, None, None, TypeError, "second must be a tensor, got NoneType"),
        (GOOD, GOOD, GOOD[:, 0], TypeError, "groups must be integers, got torch.float32"),
        (GOOD, GOOD, [1, 2, 3], TypeError, "groups must be a tensor of integers, got list"),
        (GOOD, GOOD, torch.ones(2).long(), ValueError, r"batch = 3, got shape \(2,\)"),
        (GOOD[:, :0], GOOD[:, :0], None, ValueError, r"got shape \(3, 0\)"),
        (GOOD[:0], GOOD[:0], None, ValueError, "at least one sample"),
    ],
)
def test_wrong_inputs_are_refused_with_a_way_out(
    first: Tensor, second: Tensor, groups: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CLIPLoss()(first, second, groups)


def test_a_batch_too_small_for_the_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="VICRegLoss needs a global batch of at least 2, got 1"):
        VICRegLoss()(GOOD[:1], GOOD[:1])


def test_mixed_precisions_are_computed_in_the_wider_one() -> None:
    assert CLIPLoss()(GOOD.double(), GOOD).dtype == torch.float64
    assert CLIPLoss()(GOOD.half(), GOOD.bfloat16()).dtype == torch.float32
