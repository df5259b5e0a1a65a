"""CrossModalLoss against plain loops for each of its parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diptych.losses import CrossModalLoss, NTXentLoss, SigLIPLoss
from diptych.losses.contract import Case, check_loss
from tests.losses.oracles import cosine, draw, lse, mean
from tests.losses.ranks import Ranks, assert_same_on_ranks

GROUPS = torch.tensor([0, 1, 0, 2, 1, 0])


def supervised_loop(rows: Tensor, ids: Tensor, temperature: float) -> float:
    """Return the mean over rows with a match of their mean -log p(match), all others seen."""
    vectors, numbers = rows.tolist(), ids.tolist()
    places = range(len(vectors))
    values = []
    for i in places:
        logit = {j: cosine(vectors[i], vectors[j]) / temperature for j in places if j != i}
        matching = [j for j in logit if numbers[j] == numbers[i]]
        if matching:
            values.append(mean(lse(logit.values()) - logit[j] for j in matching))
    return mean(values) if values else 0.0


def across_loop(first: Tensor, second: Tensor, ids: Tensor) -> float:
    """Return the mean over both directions of the mean -log p(match) in the other modality."""
    values = []
    for own, other in ((first.tolist(), second.tolist()), (second.tolist(), first.tolist())):
        for i, anchor in enumerate(own):
            logit = [cosine(anchor, candidate) / 0.07 for candidate in other]
            matching = [j for j in range(len(other)) if ids[j] == ids[i]]
            values.append(mean(lse(logit) - logit[j] for j in matching))
    return mean(values)


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("views", [1, 2])
def test_terms_are_the_weighted_parts(groups: Tensor | None, views: int) -> None:
    first, second = draw(6, views, 5), draw(6, 2, 5, seed=1)
    ids = torch.arange(6) if groups is None else groups

    terms = CrossModalLoss().terms(first[:, 0] if views == 1 else first, second, groups)

    everything = torch.cat([first, second], dim=1).flatten(0, 1)
    within = [
        supervised_loop(side.flatten(0, 1), ids.repeat_interleave(side.shape[1]), 0.5)
        for side in (first, second)
    ]
    expected = {
        "cross_modal": 0.4 * across_loop(first[:, 0], second[:, 0], ids),
        "intra_modal": 0.3 * mean(within),
        "supervised": 0.3 * supervised_loop(everything, ids.repeat_interleave(views + 2), 0.07),
    }
    assert {name: float(term.detach()) for name, term in terms.items()} == pytest.approx(
        expected, rel=1e-12
    )


def test_within_a_modality_two_views_are_simclrs() -> None:
    first, second = draw(6, 2, 5), draw(6, 2, 5, seed=1)
    simclr = NTXentLoss(temperature=0.5)

    term = CrossModalLoss(intra_modal_weight=1).terms(first, second)["intra_modal"]

    expected = (simclr(first[:, 0], first[:, 1]) + simclr(second[:, 0], second[:, 1])) / 2
    torch.testing.assert_close(term, expected, rtol=1e-12, atol=0)


def test_without_views_and_groups_nothing_matches_within_a_modality() -> None:
    terms = CrossModalLoss().terms(draw(6, 5), draw(6, 5, seed=1))

    assert terms["intra_modal"] == 0
    assert terms["cross_modal"] > 0
    assert terms["supervised"] > 0


def test_labels_affect_only_the_supervised_term() -> None:
    sides = draw(6, 5), draw(6, 5, seed=1)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])

    both = CrossModalLoss().terms(*sides, GROUPS, labels)

    groups_only, labels_only = (CrossModalLoss().terms(*sides, ids) for ids in (GROUPS, labels))
    assert torch.equal(both["cross_modal"], groups_only["cross_modal"])
    assert torch.equal(both["intra_modal"], groups_only["intra_modal"])
    assert torch.equal(both["supervised"], labels_only["supervised"])


def test_parts_can_be_replaced_and_their_terms_keep_the_names() -> None:
    loss = CrossModalLoss(cross_modal=SigLIPLoss(), cross_modal_weight=1)
    sides = draw(6, 5), draw(6, 5, seed=1)

    assert torch.equal(loss.terms(*sides)["cross_modal"], SigLIPLoss()(*sides))
    assert "cross_modal/bias" in loss.scalars()


def draw_everything(batch: int, *, generator: torch.Generator) -> tuple[Tensor, ...]:
    sides = (torch.randn(batch, 2, 8, generator=generator) for _ in range(2))
    return (*sides, torch.arange(batch) // 2, torch.arange(batch) % 2)


def test_with_views_groups_and_labels_it_keeps_the_contract() -> None:
    check_loss(CrossModalLoss, draw_everything)


def test_with_views_groups_and_labels_it_is_the_same_on_ranks(ranks: Ranks) -> None:
    assert_same_on_ranks(ranks, CrossModalLoss, Case(CrossModalLoss, draw_everything).inputs())


def test_wrong_sides_are_refused() -> None:
    with pytest.raises(ValueError, match="first and second must agree in batch and features"):
        CrossModalLoss()(draw(6, 5), draw(6, 2, 4))
    with pytest.raises(ValueError, match=r"second must be \[batch, features\]"):
        CrossModalLoss()(draw(6, 5), draw(6, 2, 2, 5))


@pytest.mark.parametrize("part", ["cross_modal", "intra_modal", "supervised"])
def test_a_negative_weight_is_refused(part: str) -> None:
    with pytest.raises(ValueError, match=f"{part}_weight must be >= 0, got -0.1"):
        CrossModalLoss(**{f"{part}_weight": -0.1})
