"""The batch of all ranks: order, gradients, means, and disagreement."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from diptych.losses.base import gather
from diptych.losses.base.gather import GlobalBatch, global_batch, sum_over_ranks, world_size
from diptych.losses.contrastive.clip import CLIPLoss
from tests.losses.ranks import Ranks


def test_nothing_is_gathered_without_a_process_group() -> None:
    batch = global_batch(3)
    features = torch.randn(3, 2)
    assert world_size() == 1
    assert batch == GlobalBatch((3,), 0)
    assert batch.gather(features) is features
    assert sum_over_ranks(features) is features
    assert batch.mean(features[:, 0]) == features[:, 0].mean()


def test_an_empty_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one sample, got an empty batch"):
        global_batch(0)


def test_a_mean_without_valid_samples_is_zero_with_a_graph() -> None:
    batch = global_batch(3)
    values = torch.tensor([1.0, 0.0, 4.0], requires_grad=True)
    assert batch.mean(values, torch.tensor([True, False, True])) == 2.5
    nothing = batch.mean(values * 0, torch.zeros(3, dtype=torch.bool))
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert values.grad is not None


def gather_on_rank(sizes: tuple[int, ...]) -> dict[str, object]:
    """Gather values that encode rank and row; weight them by position for the gradient."""
    rank = dist.get_rank()
    batch = global_batch(sizes[rank], dimension=2)
    start = 10.0 * rank
    local = torch.arange(start, start + sizes[rank], dtype=torch.float64)[:, None].repeat(1, 2)
    local.requires_grad_()
    gathered = batch.gather(local)
    weights = torch.arange(1.0, batch.total + 1, dtype=torch.float64)[:, None] * (rank + 1)
    (gathered * weights).sum().backward()
    assert local.grad is not None
    ids = batch.gather(torch.arange(sizes[rank]) + 10 * rank)
    values = gathered.detach()[batch.positions(local.device), 0]
    valid = values % 2 == 0
    return {
        "sizes": batch.sizes,
        "column": gathered[:, 0].tolist(),
        "ids": ids.tolist(),
        "gradient": local.grad[:, 0].tolist(),
        "own": values.tolist(),
        "mean": float(batch.mean(values)),
        "mean of even": float(batch.mean(values.where(valid, 0.0), valid)),
        "groups": dist.get_world_size(),
    }


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3), (3, 0), (2, 1, 3), (0, 4, 1)])
def test_uneven_pieces_are_gathered_in_order_with_summed_gradients(
    sizes: tuple[int, ...], ranks: Ranks
) -> None:
    found = ranks.run(gather_on_rank, [(sizes,)] * len(sizes))
    rows = [10.0 * rank + row for rank, size in enumerate(sizes) for row in range(size)]
    world = len(sizes)
    for rank, answer in enumerate(found):
        start = sum(sizes[:rank])
        own = slice(start, start + sizes[rank])
        assert answer["sizes"] == sizes
        assert answer["column"] == rows
        assert answer["ids"] == rows
        assert answer["own"] == rows[own]
        # Every rank weighs position p by p + 1, times its rank + 1.
        factor = world * (world + 1) / 2
        assert answer["gradient"] == [factor * (p + 1) for p in range(len(rows))][own]
    even = [row for row in rows if row % 2 == 0]
    averages = {key: sum(a[key] for a in found) / world for key in ("mean", "mean of even")}
    assert math.isclose(averages["mean"], sum(rows) / len(rows), rel_tol=1e-12)
    assert math.isclose(averages["mean of even"], sum(even) / len(even), rel_tol=1e-12)


def gather_whole_tensors(sizes: tuple[int, ...]) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "_moves_whole_tensors", lambda device: True)
        answer = gather_on_rank(sizes)
        return answer["column"], answer["gradient"]


def test_backends_that_gather_into_one_tensor_give_the_same_gradients(
    ranks: Ranks,
) -> None:
    found = ranks.run(gather_whole_tensors, [((2, 2, 2),)] * 3)
    whole = [0.0, 1.0, 10.0, 11.0, 20.0, 21.0]
    assert found == [
        (whole, [6.0, 12.0]),
        (whole, [18.0, 24.0]),
        (whole, [30.0, 36.0]),
    ]


def sum_on_rank(value: float) -> tuple[float, float]:
    local = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    summed = sum_over_ranks(local)
    (summed * (dist.get_rank() + 1)).backward()
    assert local.grad is not None
    return float(summed.detach()), float(local.grad)


def test_a_sum_over_ranks_sums_its_gradient_too(ranks: Ranks) -> None:
    assert ranks.run(sum_on_rank, [(1.0,), (2.0,), (4.0,)]) == [(7.0, 6.0)] * 3


def disagree_on_rank(dimension: int) -> str:
    with pytest.raises(ValueError, match="must be equal on all ranks") as error:
        global_batch(2, feature_dimension=dimension)
    return str(error.value)


def test_ranks_that_disagree_all_raise_instead_of_hanging(ranks: Ranks) -> None:
    expected = "feature_dimension must be equal on all ranks, got [8, 4] by rank"
    assert ranks.run(disagree_on_rank, [(8,), (4,)]) == [expected] * 2


def empty_on_rank() -> str:
    with pytest.raises(ValueError, match="at least one sample") as error:
        global_batch(0)
    return str(error.value)


def test_a_batch_that_is_empty_on_every_rank_is_an_error_on_every_rank(ranks: Ranks) -> None:
    assert len(set(ranks.run(empty_on_rank, [(), ()]))) == 1


def penalize(sizes: tuple[int, ...]) -> Tensor:
    """Return the gradient, averaged over ranks, of a penalty on the gradient of the features."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    weight = torch.eye(4, dtype=torch.float64).requires_grad_()
    x = images.split(sizes)[rank].clone().requires_grad_()
    y = texts.split(sizes)[rank]
    loss = CLIPLoss(temperature=0.5, learn_temperature=False, tile=None)(x @ weight, y)
    # Values average over ranks, so the features get their sum divided by the number of ranks.
    (gradient,) = torch.autograd.grad(loss / len(sizes), x, create_graph=True)
    gradient.square().sum().backward()
    assert weight.grad is not None
    if dist.is_initialized():
        dist.all_reduce(weight.grad)
    return weight.grad


@pytest.mark.parametrize("sizes", [(3, 3), (1, 5), (2, 2, 2)])
def test_a_penalty_on_gradients_has_the_gradient_of_one_process(
    sizes: tuple[int, ...], ranks: Ranks
) -> None:
    alone = penalize((6,))
    for found in ranks.run(penalize, [(sizes,)] * len(sizes)):
        torch.testing.assert_close(found, alone, rtol=1e-10, atol=1e-12)
