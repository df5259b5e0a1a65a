"""CLIP against plain loops, for every kind of positives."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from diptych.losses import CLIPLoss
from diptych.losses.contract import check_loss
from tests.losses.oracles import draw, logits, lse, mean
from tests.losses.ranks import Ranks, assert_same_on_ranks

FIRST, SECOND = draw(6, 5), draw(6, 5, seed=1)
GROUPS = torch.tensor([3, 1, 3, 0, 1, 3])


def direction(rows: list[list[float]], ids: list[int], kind: str, smoothing: float) -> float:
    losses = []
    for i, row in enumerate(rows):
        group = [j for j in range(len(row)) if ids[j] == ids[i]]
        kept = range(len(row))
        if kind == "mask":
            kept, group = [j for j in kept if j == i or j not in group], [i]
        target = (lse if kind == "inside" else mean)([row[j] for j in group])
        spread = mean(row[j] for j in kept)
        losses.append(lse(row[j] for j in kept) - (1 - smoothing) * target - smoothing * spread)
    return mean(losses)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["outside", "inside", "mask"])
@pytest.mark.parametrize("grouped", [False, True])
def test_value_is_that_of_the_loop(grouped: bool, kind: str, smoothing: float) -> None:
    loss = CLIPLoss(positives=kind, label_smoothing=smoothing)
    ids = GROUPS.tolist() if grouped else list(range(6))
    rows = logits(FIRST, SECOND, 0.07)
    columns = [list(column) for column in zip(*rows, strict=True)]
    expected = 0.5 * sum(direction(side, ids, kind, smoothing) for side in (rows, columns))
    found = loss(FIRST, SECOND, GROUPS if grouped else None).detach()
    assert math.isclose(float(found), expected, rel_tol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradient_are_those_of_two_cross_entropies(smoothing: float) -> None:
    leaves = [x.clone().requires_grad_() for x in (FIRST, SECOND)]
    scale = torch.tensor(1 / 0.07, dtype=torch.float64, requires_grad=True)
    matrix = scale * F.normalize(leaves[0]) @ F.normalize(leaves[1]).T
    labels = torch.arange(6)
    expected = sum(
        F.cross_entropy(side, labels, label_smoothing=smoothing) for side in (matrix, matrix.T)
    )
    expected = 0.5 * torch.as_tensor(expected)
    loss = CLIPLoss(label_smoothing=smoothing)
    found = loss(*leaves)
    wanted = torch.autograd.grad(expected, [*leaves, scale])
    ours = torch.autograd.grad(found, [*leaves, *loss.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours[:2], wanted[:2], rtol=1e-10, atol=1e-14)
    # The parameter is ln s: its gradient is that of s times s, held in float32.
    torch.testing.assert_close(ours[2].double(), wanted[2] / 0.07, rtol=1e-6, atol=0)


def test_groups_of_one_are_no_groups() -> None:
    for kind in ("outside", "inside", "mask"):
        loss = CLIPLoss(positives=kind)
        torch.testing.assert_close(
            loss(FIRST, SECOND, torch.arange(6) * 7), loss(FIRST, SECOND), rtol=1e-12, atol=0
        )


def test_a_single_pair_gives_zero_and_no_gradient() -> None:
    first = FIRST[:1].clone().requires_grad_()
    loss = CLIPLoss()(first, SECOND[:1])
    loss.backward()
    assert float(loss.detach()) == 0
    assert first.grad is not None
    assert not first.grad.any()


def test_perfect_pairs_at_a_low_temperature_cost_nothing_and_chance_costs_ln_b() -> None:
    basis = torch.eye(5)
    assert float(CLIPLoss(temperature=0.01)(basis, basis).detach()) < 1e-30
    same = torch.ones(5, 3)
    torch.testing.assert_close(CLIPLoss()(same, same).detach(), torch.tensor(5.0).log())


def test_scaling_features_changes_nothing_unless_they_are_taken_as_they_are() -> None:
    torch.testing.assert_close(CLIPLoss()(3 * FIRST, SECOND), CLIPLoss()(FIRST, SECOND))
    loss = CLIPLoss(normalize=False, temperature=1.0)
    matrix = FIRST @ SECOND.T
    expected = 0.5 * (matrix.logsumexp(0) + matrix.logsumexp(1) - 2 * matrix.diagonal()).mean()
    torch.testing.assert_close(loss(FIRST, SECOND), expected)


def test_the_temperature_is_learned_within_bounds() -> None:
    loss = CLIPLoss(temperature=0.07, max_logit_scale=50.0)
    assert [name for name, _ in loss.named_parameters()] == ["temperature.logit_scale"]
    loss.temperature.value = 0.001
    loss.temperature.constrain()
    assert math.isclose(loss.temperature.value, 1 / 50, rel_tol=1e-6)
    assert set(loss.scalars()) == {"temperature", "logit_scale"}
    fixed = CLIPLoss(learn_temperature=False)
    assert list(fixed.parameters()) == []
    assert fixed.scalars() == {}


@pytest.mark.parametrize("kind", ["inside", "mask"])
def test_other_positives_keep_the_contract_on_ranks_too(kind: str, ranks: Ranks) -> None:
    build = partial(CLIPLoss, positives=kind, label_smoothing=0.1)
    check_loss(build)
    assert_same_on_ranks(ranks, build, (FIRST, SECOND, GROUPS), splits=[(2, 4), (1, 3, 2)])


def test_a_rank_without_samples_takes_part(ranks: Ranks) -> None:
    splits = [(6, 0), (0, 4, 2)]
    assert_same_on_ranks(ranks, CLIPLoss, (FIRST, SECOND, GROUPS), splits=splits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature must be > 0, got -1.0"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\), got 1.0"),
        ({"positives": "both"}, "positives must be one of 'outside', 'inside', 'mask'"),
        ({"tile": 0}, "tile must be"),
        ({"max_logit_scale": 0.5}, "0 < min < max"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CLIPLoss(**arguments)  # type: ignore[arg-type]
