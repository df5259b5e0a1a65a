"""SIGReg against plain complex arithmetic, and its directions against what makes them random."""

import cmath
import itertools
import math
from functools import partial

import pytest
import torch

from diptych.engine import Trainer
from diptych.losses import SIGRegLoss
from diptych.losses.self_supervised.sigreg import unit_directions
from tests.losses.oracles import dot, draw, mean
from tests.losses.ranks import Ranks, assert_same_on_ranks


def statistic(values: list[float]) -> float:
    """Return the Epps-Pulley statistic by the trapezoidal rule on 17 points of [-5, 5]."""
    points = [-5 + 10 * i / 16 for i in range(17)]
    heights = []
    for t in points:
        phi = sum(cmath.exp(1j * t * x) for x in values) / len(values)
        normal = math.exp(-(t**2) / 2)
        heights.append(abs(phi - normal) ** 2 * normal)
    area = sum((a + b) / 2 * 10 / 16 for a, b in itertools.pairwise(heights))
    return len(values) * area


@pytest.mark.parametrize("global_views", [None, 2])
def test_terms_are_those_of_the_loop_in_every_call(global_views: int | None) -> None:
    loss = SIGRegLoss(weight=0.3, directions=5, global_views=global_views, seed=7)
    views = draw(6, 3, 4)
    for call in range(3):
        columns = unit_directions(7, torch.tensor(call), 5, 4).double().T.tolist()
        seen = [[row[view] for row in views.tolist()] for view in range(3)]
        values = [statistic([dot(x, a) for x in view]) for view in seen for a in columns]
        targets = views[:, :global_views].mean(1, keepdim=True).expand_as(views)
        pairs = zip(views.flatten().tolist(), targets.flatten().tolist(), strict=True)
        terms = loss.terms(views[:, :2], views[:, 2])
        assert math.isclose(float(terms["sigreg"]), 0.3 * mean(values), rel_tol=1e-10)
        expected = 0.7 * mean((a - b) ** 2 for a, b in pairs)
        assert math.isclose(float(terms["prediction"]), expected, rel_tol=1e-11)


def test_normal_features_have_the_expectation_of_the_statistic() -> None:
    # E of B |phi - normal|^2 is 1 - exp(-t^2), whose weighted integral is known.
    expected = math.sqrt(2 * math.pi) - math.sqrt(2 * math.pi / 3)
    value = SIGRegLoss(weight=1, directions=32)(draw(200, 60, 8))
    assert math.isclose(float(value), expected, rel_tol=0.1)
    for wrong in (1.3 * draw(200, 60, 8), draw(200, 60, 8) + 0.1):
        assert float(SIGRegLoss(weight=1, directions=32)(wrong)) > 2 * expected


def test_directions_are_uniform_on_the_sphere_and_new_in_each_step() -> None:
    steps = [
        unit_directions(seed, torch.tensor(s), 4096, 6) for seed, s in ((0, 0), (0, 1), (1, 0))
    ]
    for directions in steps:
        torch.testing.assert_close(directions.norm(dim=0), torch.ones(4096))
        torch.testing.assert_close(
            directions @ directions.T / 4096, torch.eye(6) / 6, atol=0.01, rtol=0
        )
        assert directions.mean(1).abs().max() < 0.03
        kurtosis = directions.pow(4).mean() * 6 * 8 / 3  # 3 / (D (D + 2)) on a sphere
        assert abs(float(kurtosis) - 1) < 0.05
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(float((steps[a] * steps[b]).sum(0).mean())) < 0.03


def test_no_random_number_is_drawn_and_evaluation_counts_no_step() -> None:
    state = torch.get_rng_state()
    loss = SIGRegLoss()
    loss(torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0)))
    loss.eval()(draw(4, 2, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert int(loss.step) == 1


@pytest.mark.parametrize("microbatch_size", [None, 1])
def test_micro_batches_count_one_step_an_update(microbatch_size: int | None) -> None:
    model, loss = torch.nn.Linear(4, 4), SIGRegLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model,
        loss,
        optimizer,
        task=lambda model, batch: {"features": model(batch)},
        microbatch_size=microbatch_size,
        device="cpu",
    )
    trainer.run([torch.randn(3, 2, 4)] * 2, max_epochs=1)
    assert int(loss.step) == 2


def test_many_views_are_the_same_on_ranks_in_every_call(ranks: Ranks) -> None:
    build = partial(SIGRegLoss, global_views=2, directions=16)
    views = draw(6, 4, 8)
    assert_same_on_ranks(ranks, build, (views,), splits=[(5, 1), (0, 4, 2)], calls=3)


def test_too_few_global_views_are_refused() -> None:
    with pytest.raises(ValueError, match="the 3 global views, got 2 views"):
        SIGRegLoss(global_views=3)(torch.randn(4, 2, 8))


@pytest.mark.parametrize("arguments", [{"weight": 1.5}, {"directions": 0}, {"global_views": 0}])
def test_wrong_arguments_are_refused(arguments: dict[str, float]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} must"):
        SIGRegLoss(**arguments)
