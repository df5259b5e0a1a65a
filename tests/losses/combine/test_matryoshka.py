"""MatryoshkaLoss against its loss on each prefix."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from diptych.losses import (
    CLIPLoss,
    ConsistencyLoss,
    MatryoshkaLoss,
    MoCoLoss,
    SupervisedContrastiveLoss,
    VICRegLoss,
)
from diptych.losses.contract import Case, check_loss
from tests.losses.oracles import cosine, draw, lse, mean
from tests.losses.ranks import Ranks, assert_same_on_ranks

SIDES = draw(6, 8), draw(6, 8, seed=1)


def clip_loop(first: list[list[float]], second: list[list[float]]) -> float:
    rows = [[cosine(a, b) / 0.07 for b in second] for a in first]
    directions = (rows, [list(column) for column in zip(*rows, strict=True)])
    return mean(lse(row) - row[i] for matrix in directions for i, row in enumerate(matrix))


def test_each_prefix_is_normalised_again_and_weighted() -> None:
    loss = MatryoshkaLoss(loss=CLIPLoss(), dims=(2, 5, 8), weights=(1.0, 0.5, 2.0))

    terms = loss.terms(*SIDES)

    expected = {
        f"dim_{m}": w * clip_loop(*([row[:m] for row in side.tolist()] for side in SIDES))
        for m, w in ((2, 1.0), (5, 0.5), (8, 2.0))
    }
    assert {name: float(t.detach()) for name, t in terms.items()} == pytest.approx(
        expected, rel=1e-12
    )


def test_weights_are_one_by_default_and_a_temperature_is_shared() -> None:
    loss = MatryoshkaLoss(loss=CLIPLoss(), dims=(4, 8))

    assert loss.weights == {4: 1.0, 8: 1.0}
    assert len(list(loss.parameters())) == 1
    assert set(loss.scalars()) == {"temperature", "logit_scale"}


def test_features_after_the_longest_prefix_get_no_gradient() -> None:
    first, second = (side.clone().requires_grad_() for side in SIDES)

    MatryoshkaLoss(loss=CLIPLoss(), dims=(2, 5))(first, second).backward()

    assert bool((first.grad[:, :5] != 0).all())
    assert not bool(first.grad[:, 5:].any())


def test_terms_of_a_loss_with_several_are_named_by_prefix() -> None:
    terms = MatryoshkaLoss(loss=VICRegLoss(), dims=(4, 8)).terms(*SIDES)

    assert list(terms)[:3] == ["dim_4/invariance", "dim_4/variance", "dim_4/covariance"]
    torch.testing.assert_close(sum(list(terms.values())[3:]), VICRegLoss()(*SIDES))


def test_labels_and_groups_stay_whole() -> None:
    ids = torch.tensor([4, 1, 4, 2, 1, 4])
    nested = MatryoshkaLoss(loss=SupervisedContrastiveLoss(), dims=(8,))

    torch.testing.assert_close(nested(*SIDES, ids), SupervisedContrastiveLoss()(*SIDES, ids))


def of_a_mean() -> MatryoshkaLoss:
    return MatryoshkaLoss(loss=ConsistencyLoss(distance="l1"), dims=(3, 8), weights=(0.5, 2.0))


def of_views() -> MatryoshkaLoss:
    loss = SupervisedContrastiveLoss(learn_temperature=True)
    return MatryoshkaLoss(loss=loss, dims=(3, 8), weights=(0.5, 2.0))


def of_one_prefix() -> MatryoshkaLoss:
    return MatryoshkaLoss(loss=ConsistencyLoss(distance="l1"), dims=(3,), weights=(0.5,))


def test_one_prefix_of_a_mean_over_samples_is_a_mean_over_samples(ranks: Ranks) -> None:
    loss = of_one_prefix()

    total, weight = loss.total_and_weight(*SIDES)

    assert not loss.couples_samples
    assert weight == 6
    torch.testing.assert_close(total / weight, loss(*SIDES))
    assert_same_on_ranks(ranks, of_one_prefix, SIDES)


def test_several_prefixes_couple_samples_since_each_has_its_own_term(ranks: Ranks) -> None:
    loss = of_a_mean()

    assert loss.couples_samples
    assert list(loss.terms(*SIDES)) == ["dim_3", "dim_8"]
    with pytest.raises(TypeError, match=r"single prefix of a mean over samples, got dims \(3, 8\)"):
        loss.total_and_weight(*SIDES)
    assert_same_on_ranks(ranks, of_a_mean, SIDES)


def test_of_views_with_labels_it_keeps_the_contract(ranks: Ranks) -> None:
    check_loss(of_views)
    assert_same_on_ranks(ranks, of_views, Case(of_views).inputs())


def test_with_groups_it_is_the_same_on_ranks(ranks: Ranks) -> None:
    groups = torch.tensor([4, 1, 4, 2, 1, 4])

    assert_same_on_ranks(ranks, MatryoshkaLoss.example, (*SIDES, groups))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"dims": ()}, r"dims must increase from at least 1, got \(\)"),
        ({"dims": (0, 4)}, r"dims must increase from at least 1, got \(0, 4\)"),
        ({"dims": (8, 4)}, r"dims must increase from at least 1, got \(8, 4\)"),
        ({"dims": (4, 4)}, r"dims must increase from at least 1, got \(4, 4\)"),
        ({"dims": (4, 8), "weights": (1,)}, "weights must be as many as dims, 2, got 1"),
        ({"dims": (4,), "weights": (-1,)}, "the weight of dim 4 must be >= 0, got -1"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: Mapping[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MatryoshkaLoss(loss=CLIPLoss(), **arguments)


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(TypeError, match=r"loss must be an nn\.Module, got str"):
        MatryoshkaLoss(loss="clip", dims=(4,))
    with pytest.raises(ValueError, match=r"dims must be at most the number of features, 8, got"):
        MatryoshkaLoss(loss=CLIPLoss(), dims=(4, 9))(*SIDES)
    with pytest.raises(ValueError, match="first and second must have equal shapes"):
        MatryoshkaLoss(loss=CLIPLoss(), dims=(4,))(SIDES[0], SIDES[1][:5])


def test_a_loss_with_a_queue_is_refused() -> None:
    loss = MatryoshkaLoss(loss=MoCoLoss(dim=8, queue_size=9), dims=(4, 8))

    with pytest.raises(ValueError, match="8"):
        loss(*SIDES)
