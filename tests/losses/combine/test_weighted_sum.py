"""WeightedSum: its parts, their weights, names and inputs."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from diptych.losses import (
    CLIPDistillationLoss,
    CLIPLoss,
    ConsistencyLoss,
    CrossEntropyLoss,
    MoCoLoss,
    SigLIPLoss,
    VICRegLoss,
    WeightedSum,
    get_loss,
)
from diptych.losses.contract import Case, check_loss
from tests.losses.oracles import draw
from tests.losses.ranks import Ranks, assert_same_on_ranks

SIDES = draw(6, 8), draw(6, 8, seed=1)
GROUPS = torch.tensor([4, 1, 4, 2, 1, 4])


def test_terms_are_the_parts_terms_weighted_and_named_after_them() -> None:
    loss = WeightedSum(
        losses={"clip": CLIPLoss(), "spread": VICRegLoss()}, weights={"spread": 0.1, "clip": 2}
    )

    terms = loss.terms(*SIDES)

    vicreg = VICRegLoss().terms(*SIDES)
    expected = {"clip": 2 * CLIPLoss()(*SIDES)}
    expected |= {f"spread/{name}": 0.1 * term for name, term in vicreg.items()}
    assert list(terms) == list(expected)
    torch.testing.assert_close(terms, expected)
    torch.testing.assert_close(loss(*SIDES), sum(expected.values()))


def test_parts_of_a_sequence_have_their_registered_names() -> None:
    loss = WeightedSum(losses=[CLIPLoss(), nn.MSELoss()], weights=[1.0, 0.5])

    assert loss.weights == {"clip": 1.0, "MSELoss": 0.5}
    torch.testing.assert_close(
        loss.terms(*SIDES)["MSELoss"], 0.5 * (SIDES[0] - SIDES[1]).square().mean()
    )


def test_weights_are_one_by_default_and_may_change_while_training() -> None:
    loss = WeightedSum(losses=[CLIPLoss(), SigLIPLoss()])
    before = loss.terms(*SIDES)

    loss.weights["siglip"] = 0.25

    torch.testing.assert_close(loss.terms(*SIDES)["siglip"], before["siglip"] / 4)
    assert torch.equal(loss.terms(*SIDES)["clip"], before["clip"])


def test_each_part_may_take_other_inputs() -> None:
    logits, labels = draw(6, 4, seed=2), torch.tensor([0, 1, 2, 3, 0, 1])
    loss = WeightedSum(
        losses={"match": CLIPLoss(), "classes": CrossEntropyLoss()},
        inputs={"match": (0, 1), "classes": (2, 3)},
    )

    value = loss(*SIDES, logits, labels)

    expected = CLIPLoss()(*SIDES) + nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(value, expected)


def by_inputs() -> WeightedSum:
    return WeightedSum(
        losses={"match": CLIPLoss(), "tokens": CrossEntropyLoss()},
        weights={"match": 1.0, "tokens": 0.3},
        inputs={"match": (0, 1), "tokens": (2, 3)},
    )


def draw_by_inputs(batch: int, *, generator: torch.Generator) -> tuple[Tensor, ...]:
    sides = (torch.randn(batch, 8, generator=generator) for _ in range(2))
    labels = torch.randint(8, (batch, 3), generator=generator)
    labels[1::2, 1:] = -100  # every other sample weighs a third
    return (*sides, torch.randn(batch, 3, 8, generator=generator), labels)


def test_parts_with_different_weights_keep_the_contract_on_ranks(ranks: Ranks) -> None:
    check_loss(by_inputs, draw_by_inputs)
    assert_same_on_ranks(ranks, by_inputs, Case(by_inputs, draw_by_inputs).inputs())


def with_queue() -> WeightedSum:
    return WeightedSum(
        losses={"moco": MoCoLoss(dim=8, queue_size=9), "clip": CLIPLoss()}, weights=(0.5, 1.0)
    )


def test_groups_and_a_queue_are_the_same_on_ranks(ranks: Ranks) -> None:
    assert_same_on_ranks(ranks, with_queue, (*SIDES, GROUPS))


def test_state_parameters_and_bounds_are_those_of_the_parts() -> None:
    loss = with_queue()
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.fill_(9.0)

    for module in loss.modules():
        getattr(module, "constrain", lambda: None)()

    assert "losses.moco.queue.keys" in loss.state_dict()
    assert [float(p.detach().exp()) for p in loss.parameters()] == pytest.approx([100.0])
    assert set(loss.scalars()) >= {"clip/temperature", "clip/logit_scale"}


def test_a_sum_of_several_couples_samples_and_needs_their_largest_minimum() -> None:
    means = {"a": ConsistencyLoss(), "b": ConsistencyLoss(distance="l1")}

    assert not WeightedSum(losses={"a": ConsistencyLoss()}).couples_samples
    assert WeightedSum(losses={"clip": CLIPLoss()}).couples_samples
    assert WeightedSum(losses=means).couples_samples
    assert WeightedSum(losses=[CLIPLoss(), VICRegLoss()]).minimum_batch == 2
    with pytest.raises(TypeError, match="single part that is a mean over samples, got a, b"):
        WeightedSum(losses=means).total_and_weight(*SIDES)


def single() -> WeightedSum:
    return WeightedSum(losses={"classes": CrossEntropyLoss()}, weights={"classes": 0.5})


def test_a_single_mean_over_samples_stays_one(ranks: Ranks) -> None:
    check_loss(single)
    assert_same_on_ranks(ranks, single, Case(single).inputs())


def test_sums_may_hold_sums() -> None:
    inner = WeightedSum(losses=[CLIPLoss(), SigLIPLoss()], weights=[1.0, 2.0])
    outer = get_loss("weighted_sum", losses={"inner": inner}, weights={"inner": 0.5})

    assert list(outer.terms(*SIDES)) == ["inner/clip", "inner/siglip"]
    torch.testing.assert_close(outer(*SIDES), inner(*SIDES) / 2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"losses": {}}, "losses must hold at least one loss, got none"),
        ({"losses": [CLIPLoss(), CLIPLoss()]}, "losses must be of different classes"),
        (
            {"losses": [CLIPLoss()], "weights": [1, 2]},
            "weights must be as many as losses, 1, got 2",
        ),
        ({"losses": [CLIPLoss()], "weights": {"clp": 1}}, "must name the losses .'clip'., got"),
        ({"losses": [CLIPLoss()], "weights": [-1]}, r"weights\['clip'\] must be >= 0, got -1"),
        ({"losses": [CLIPLoss()], "inputs": {"clp": (0,)}}, "inputs must name the losses"),
    ],
)
def test_wrong_arguments_are_refused(arguments: Mapping[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        WeightedSum(**arguments)


def test_outputs_that_a_part_cannot_take_are_told_with_the_way_out() -> None:
    loss = WeightedSum(losses={"clip": CLIPLoss(), "near": CLIPDistillationLoss()})
    with pytest.raises(TypeError, match=r"of CLIPLoss: first, second .*, got 4\. Pass inputs="):
        loss(*SIDES, *SIDES)
    with pytest.raises(TypeError, match=r"of CLIPLoss: .*, got 1\. Return the missing ones"):
        loss(SIDES[0])
    with pytest.raises(TypeError, match="second must be floating point"):
        loss(SIDES[0], GROUPS)


def test_a_part_that_is_not_a_module_and_a_missing_input_are_refused() -> None:
    with pytest.raises(TypeError, match=r"losses\['clip'\] must be a loss, an nn.Module, got type"):
        WeightedSum(losses={"clip": CLIPLoss})
    with pytest.raises(ValueError, match=r"inputs\['tokens'\] must be positions .* 0 to 1, got"):
        by_inputs()(*SIDES)
    with pytest.raises(ValueError, match="first and second must have equal shapes"):
        WeightedSum(losses=[CLIPLoss()])(SIDES[0], SIDES[1][:5])
