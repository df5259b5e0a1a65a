"""SupervisedContrastiveLoss against plain loops, and against the losses that it contains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from diptych.losses import CLIPLoss, NTXentLoss, SupervisedContrastiveLoss
from diptych.losses.contract import Case, check_compiles, check_loss
from tests.losses.oracles import draw
from tests.losses.ranks import Ranks, assert_same_on_ranks

LABELS = torch.tensor([0, 1, 0, 2, 1, 0])
Place = tuple[int, int]
Match = Callable[[int, int], bool]
See = Callable[[Place, Place], bool]


def by_label(i: int, j: int) -> bool:
    return bool(LABELS[i] == LABELS[j])


def everything(anchor: Place, other: Place) -> bool:
    return True


def anchor_loop(logit: dict[Place, Tensor], matching: list[Place]) -> Tensor:
    """Return the mean over an anchor's positives of -log p, p over all that it sees."""
    bottom = torch.stack([x.exp() for x in logit.values()]).sum().log()
    return sum(bottom - logit[q] for q in matching) / len(matching)


def loops(
    views: Tensor,
    temperature: float,
    *,
    match: Match = by_label,
    see: See = everything,
    zero: bool = False,
) -> Tensor:
    """Return L_out of the paper, anchor after anchor, candidate after candidate."""
    unit = {
        (i, v): view / view.square().sum().sqrt()
        for i, sample in enumerate(views)
        for v, view in enumerate(sample)
    }
    values = []
    for p, anchor in unit.items():
        others = [q for q in unit if q != p and see(p, q)]
        logit = {q: (anchor * unit[q]).sum() / temperature for q in others}
        matching = [q for q in others if match(p[0], q[0])]
        if matching:
            values.append(anchor_loop(logit, matching))
        elif zero:
            values.append(torch.zeros((), dtype=views.dtype))
    return torch.stack(values).mean()


@pytest.mark.parametrize("unlabelled", [-100, -1])
def test_views_of_a_sample_without_a_label_match_only_one_another(unlabelled: int) -> None:
    views = draw(6, 2, 5, seed=3)
    labels = torch.where(LABELS == 1, unlabelled, LABELS)
    expected = loops(views, 0.1, match=lambda i, j: i == j or (LABELS[i] != 1 and by_label(i, j)))
    torch.testing.assert_close(SupervisedContrastiveLoss(temperature=0.1)(views, labels), expected)


def assert_same(
    loss: SupervisedContrastiveLoss, features: Tensor, labels: Tensor, expected: Tensor
) -> None:
    """Assert equal values and gradients; `features` are leaves of `expected`."""
    (wanted,) = torch.autograd.grad(expected, features)
    value = loss(features, labels)
    (found,) = torch.autograd.grad(value, features)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("shape", [(6, 5), (6, 1, 5), (6, 3, 5)])
def test_value_and_gradient_are_those_of_the_papers_sum(
    shape: tuple[int, ...], temperature: float
) -> None:
    features = draw(*shape).requires_grad_()
    expected = loops(features.view(6, -1, 5), temperature)

    assert_same(SupervisedContrastiveLoss(temperature=temperature), features, LABELS, expected)


@pytest.mark.parametrize(
    ("candidates", "see"),
    [
        ("all", everything),
        ("cross", lambda anchor, other: anchor[1] != other[1]),
        ("intra", lambda anchor, other: anchor[1] == other[1]),
    ],
)
@pytest.mark.parametrize("zero", [False, True])
def test_candidates_are_all_views_other_views_or_the_own_view(
    candidates: str, see: See, zero: bool
) -> None:
    features = draw(6, 3, 5).requires_grad_()
    loss = SupervisedContrastiveLoss(
        temperature=0.2, candidates=candidates, without_positive="zero" if zero else "ignore"
    )

    assert_same(loss, features, LABELS, loops(features, 0.2, see=see, zero=zero))


@pytest.mark.parametrize("zero", [False, True])
def test_an_anchor_without_a_positive_is_left_out_or_counts_as_zero(zero: bool) -> None:
    features = draw(6, 5).requires_grad_()
    loss = SupervisedContrastiveLoss(without_positive="zero" if zero else "ignore")

    # Label 2 occurs once: its sample has no positive.
    assert_same(loss, features, LABELS, loops(features[:, None], 0.07, zero=zero))


def test_labels_that_are_all_different_give_zero_with_a_graph() -> None:
    features = draw(6, 5).requires_grad_()

    value = SupervisedContrastiveLoss()(features, torch.arange(6))
    value.backward()

    assert value == 0
    assert torch.equal(features.grad, torch.zeros_like(features))


def test_two_modalities_are_two_views() -> None:
    first, second = draw(6, 5), draw(6, 5, seed=1)
    loss = SupervisedContrastiveLoss()

    apart = loss(first, second, LABELS)

    torch.testing.assert_close(apart, loss(torch.stack([first, second], 1), LABELS), rtol=0, atol=0)
    torch.testing.assert_close(apart, loss(first, second, labels=LABELS), rtol=0, atol=0)


def test_labels_may_be_given_by_name() -> None:
    features, loss = draw(6, 5), SupervisedContrastiveLoss()

    assert torch.equal(loss(features, labels=LABELS), loss(features, LABELS))


def test_one_class_per_sample_is_simclr() -> None:
    views = draw(6, 2, 5)

    value = SupervisedContrastiveLoss(temperature=0.5)(views, torch.arange(6))

    simclr = NTXentLoss(temperature=0.5)(views[:, 0], views[:, 1])
    torch.testing.assert_close(value, simclr, rtol=1e-12, atol=0)


def test_across_modalities_it_is_clip_with_groups() -> None:
    first, second = draw(6, 5), draw(6, 5, seed=1)

    value = SupervisedContrastiveLoss(temperature=0.1, candidates="cross")(first, second, LABELS)

    clip = CLIPLoss(temperature=0.1)(first, second, LABELS)
    torch.testing.assert_close(value, clip, rtol=1e-12, atol=0)


def test_equal_features_give_the_log_of_the_number_of_candidates() -> None:
    features = torch.ones(6, 5, dtype=torch.float64)

    value = SupervisedContrastiveLoss()(features, LABELS)

    torch.testing.assert_close(value, torch.tensor(5.0, dtype=torch.float64).log())


def test_multi_hot_labels_with_one_entry_each_are_plain_labels() -> None:
    features, loss = draw(6, 2, 5), SupervisedContrastiveLoss()

    value = loss(features, torch.nn.functional.one_hot(LABELS))

    torch.testing.assert_close(value, loss(features, LABELS), rtol=1e-12, atol=0)


@pytest.mark.parametrize("overlap", [0.0, 0.4, 0.5])
def test_multi_hot_labels_match_by_the_share_of_common_labels(overlap: float) -> None:
    sets = [{0, 1}, {1}, {0, 1, 2}, {3}, {2, 3}, set[int]()]
    features = draw(6, 2, 5).requires_grad_()
    labels = torch.tensor([[int(c in members) for c in range(4)] for members in sets])

    def match(i: int, j: int) -> bool:
        union = sets[i] | sets[j]
        return bool(union) and len(sets[i] & sets[j]) / len(union) > overlap

    expected = loops(features, 0.07, match=match)

    assert_same(SupervisedContrastiveLoss(overlap=overlap), features, labels, expected)


def test_unknown_entries_of_multi_hot_labels_match_nothing() -> None:
    features, loss = draw(4, 5), SupervisedContrastiveLoss()
    labels = torch.tensor([[1, 0, -1], [1, -1, 0], [-100, 1, -1], [0, 1, -100]])

    value = loss(features, labels)

    torch.testing.assert_close(value, loss(features, torch.tensor([0, 0, 1, 1])))
    with pytest.raises(ValueError, match=r"got \[4, 1\]. Pass labels.squeeze\(1\)"):
        loss(features, labels[:, :1])


@pytest.mark.parametrize("tile", [1, 2, 5, None])
@pytest.mark.parametrize("candidates", ["all", "cross", "intra"])
def test_tiles_do_not_change_the_result(candidates: str, tile: int | None) -> None:
    features = draw(6, 2, 5).requires_grad_()
    whole = SupervisedContrastiveLoss(candidates=candidates, tile=None)(features, LABELS)

    assert_same(
        SupervisedContrastiveLoss(candidates=candidates, tile=tile), features, LABELS, whole
    )


def draw_one_view(batch: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 8, generator=generator), torch.arange(batch) // 2


def draw_modalities(batch: int, *, generator: torch.Generator) -> tuple[Tensor, ...]:
    sides = (torch.randn(batch, 8, generator=generator) for _ in range(2))
    return (*sides, torch.arange(batch) // 2)


def draw_multi_hot(batch: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.randint(2, (batch, 4), generator=generator)
    return torch.randn(batch, 2, 8, generator=generator), labels


@pytest.mark.parametrize("drawn", [draw_one_view, draw_modalities, draw_multi_hot])
def test_every_form_of_the_call_keeps_the_contract(
    drawn: Callable[..., tuple[Tensor, ...]],
) -> None:
    check_loss(lambda: SupervisedContrastiveLoss(learn_temperature=True), drawn)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # by torch's own compiler
def test_modalities_and_multi_hot_labels_compile_into_one_graph() -> None:
    for drawn in (draw_modalities, draw_multi_hot):
        check_compiles(Case(SupervisedContrastiveLoss, drawn))


@pytest.mark.parametrize("candidates", ["all", "cross", "intra"])
@pytest.mark.parametrize("without_positive", ["ignore", "zero"])
def test_every_form_is_the_same_on_ranks(
    candidates: str, without_positive: str, ranks: Ranks
) -> None:
    build = partial(
        SupervisedContrastiveLoss,
        candidates=candidates,
        without_positive=without_positive,
        learn_temperature=True,
    )
    labels = torch.tensor([0, 1, 2, 1, 0, 3])  # positives on other ranks, and labels that are alone

    assert_same_on_ranks(ranks, build, (draw(6, 2, 8), labels))


def test_multi_hot_labels_are_the_same_on_ranks(ranks: Ranks) -> None:
    labels = torch.randint(2, (6, 4))

    assert_same_on_ranks(ranks, SupervisedContrastiveLoss, (draw(6, 8), draw(6, 8, seed=1), labels))


def test_a_learned_temperature_is_published() -> None:
    assert SupervisedContrastiveLoss().scalars() == {}
    scalars = SupervisedContrastiveLoss(temperature=0.1, learn_temperature=True).scalars()
    assert float(scalars["temperature"]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"temperature": 0.0}, "temperature must be > 0, got 0"),
        ({"candidates": "both"}, "candidates must be one of 'all', 'cross', 'intra', got 'both'"),
        ({"without_positive": "skip"}, "without_positive must be one of 'ignore', 'zero'"),
        ({"overlap": 1.0}, r"overlap must lie in \[0, 1\), got 1.0"),
        ({"tile": 0}, "tile must be 'auto', None or a number of rows >= 1, got 0"),
    ],
)
def test_a_constructor_argument_out_of_range_is_refused(
    arguments: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        SupervisedContrastiveLoss(**arguments)


def test_cross_candidates_need_two_views() -> None:
    with pytest.raises(ValueError, match="'cross' needs two views or modalities"):
        SupervisedContrastiveLoss(candidates="cross")(draw(6, 5), LABELS)


def test_a_call_without_labels_is_refused() -> None:
    with pytest.raises(TypeError, match="labels must be a tensor of integers, got NoneType"):
        SupervisedContrastiveLoss()(draw(6, 5))
    with pytest.raises(TypeError, match="labels must be integers"):
        SupervisedContrastiveLoss()(draw(6, 5), draw(6, 5))
