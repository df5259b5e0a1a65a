"""DINO against plain loops, with the centre of past calls."""

import math
from functools import partial

import pytest
import torch

from diptych.engine import Trainer, tasks
from diptych.losses import DINOLoss
from diptych.losses.contract import check_loss
from tests.losses.oracles import draw, lse, mean
from tests.losses.ranks import Ranks, assert_same_on_ranks

DIM = 4
Assigned = list[list[list[float]]]


def cross_entropy(student: torch.Tensor, assigned: Assigned, temperature: float) -> float:
    """Return the mean over samples and pairs of different views."""
    values = []
    for views, targets in zip(student.tolist(), assigned, strict=True):
        for u, logits in enumerate(views):
            scaled = [x / temperature for x in logits]
            for v, target in enumerate(targets):
                if u != v:
                    values.append(
                        sum(p * (lse(scaled) - x) for p, x in zip(target, scaled, strict=True))
                    )
    return mean(values)


def softmax(logits: list[float]) -> list[float]:
    return [math.exp(x - lse(logits)) for x in logits]


def test_every_call_uses_the_centre_of_the_calls_before() -> None:
    loss = DINOLoss(dim=DIM, student_temperature=0.3, teacher_temperature=0.2, center_momentum=0.7)
    loss.double()
    centre = [0.0] * DIM
    for call, size in enumerate((3, 1, 4)):
        student, teacher = draw(size, 5, DIM, seed=call), draw(size, 2, DIM, seed=call + 9)
        assigned = [
            [softmax([(x - c) / 0.2 for x, c in zip(view, centre, strict=True)]) for view in views]
            for views in teacher.tolist()
        ]
        expected = cross_entropy(student, assigned, 0.3)
        assert math.isclose(float(loss(student, teacher)), expected, rel_tol=1e-11)
        rows = teacher.flatten(0, 1).tolist()
        centre = [0.7 * c + 0.3 * mean(r[k] for r in rows) for k, c in enumerate(centre)]
    torch.testing.assert_close(loss.center, torch.tensor(centre, dtype=torch.float64))
    loss.eval()(student, teacher)
    torch.testing.assert_close(loss.center, torch.tensor(centre, dtype=torch.float64))


def test_sinkhorn_alternates_between_prototypes_and_samples() -> None:
    student, teacher = draw(5, 3, DIM), draw(5, 2, DIM, seed=1)
    table = (teacher.flatten(0, 1) / 0.3).exp()
    for _ in range(3):
        table = table / table.sum(0)
        table = table / table.sum(1)[:, None]
    assigned = table.view(5, 2, DIM).tolist()
    loss = DINOLoss(dim=DIM, centering="sinkhorn", teacher_temperature=0.3)
    assert math.isclose(
        float(loss(student, teacher)), cross_entropy(student, assigned, 0.1), rel_tol=1e-11
    )
    assert not loss.center.any()


def test_sinkhorn_keeps_the_contract_and_spans_all_ranks(ranks: Ranks) -> None:
    build = partial(DINOLoss, dim=8, centering="sinkhorn")
    check_loss(build)
    inputs = draw(6, 3, 8), draw(6, 2, 8, seed=1)
    assert_same_on_ranks(ranks, build, inputs, splits=[(5, 1), (0, 4, 2)])


def test_large_logits_do_not_overflow() -> None:
    for centering in ("mean", "sinkhorn"):
        loss = DINOLoss(dim=DIM, centering=centering)
        value = loss(1e3 * torch.randn(3, 2, DIM), 1e3 * torch.randn(3, 2, DIM))
        assert value.isfinite()


def test_a_uniform_student_has_the_logarithm_of_the_number_of_prototypes() -> None:
    loss = DINOLoss(dim=DIM)(torch.zeros(3, 2, DIM), torch.randn(3, 2, DIM))
    assert math.isclose(float(loss), math.log(DIM), rel_tol=1e-6)


@pytest.mark.parametrize("microbatch_size", [None, 1, 3])
def test_the_centre_moves_once_an_update_in_micro_batches(microbatch_size: int | None) -> None:
    model = torch.nn.Linear(DIM, DIM, bias=False).double()
    torch.nn.init.eye_(model.weight)
    model.target = torch.nn.Identity()
    loss = DINOLoss(dim=DIM, center_momentum=0.5).double()
    batches = [{"large": draw(4, 2, DIM, seed=s), "small": draw(4, 1, DIM)} for s in (0, 1)]
    trainer = Trainer(
        model,
        loss,
        torch.optim.SGD(model.parameters(), lr=0.1),
        task=tasks.multi_crop,
        microbatch_size=microbatch_size,
        device="cpu",
    )
    trainer.run(batches, max_epochs=1)
    first, second = (batch["large"].mean((0, 1)) for batch in batches)
    torch.testing.assert_close(loss.center, 0.25 * first + 0.5 * second)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((3, 2, 5), (3, 2, 4), r"student must be \[batch, views, 4\], got shape \(3, 2, 5\)"),
        ((3, 4), (3, 2, 4), r"student must be \[batch, views, 4\]"),
        ((3, 2, 4), (2, 2, 4), "equal batches, got 3 and 2"),
        ((3, 1, 4), (3, 1, 4), "at least two views"),
        ((3, 2, 4), (3, 3, 4), "got 2 views for 3 of the teacher"),
    ],
)
def test_views_that_do_not_fit_are_refused(
    student: tuple[int, ...], teacher: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DINOLoss(dim=4)(torch.randn(student), torch.randn(teacher))


@pytest.mark.parametrize(
    "arguments",
    [
        {"dim": 0},
        {"centering": "none"},
        {"student_temperature": 0.0},
        {"teacher_temperature": -1.0},
        {"center_momentum": 1.0},
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} must"):
        DINOLoss(**{"dim": 4, **arguments})
