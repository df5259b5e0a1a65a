"""MoCo against a plain list of past keys."""

import math

import pytest
import torch

from diptych.losses import MoCoLoss
from tests.losses.oracles import cosine, draw, lse, mean
from tests.losses.ranks import Ranks, assert_same_on_ranks

DIM = 4


def calls(sizes: list[int]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    return [
        (
            draw(size, DIM, seed=10 * i),
            draw(size, DIM, seed=10 * i + 1),
            torch.arange(i, i + size) % 5,
        )
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("queue_size", "sizes"), [(8, [3, 3, 3, 3, 3]), (5, [2, 7, 1, 6, 5])])
def test_every_call_equals_that_with_a_list_of_the_last_keys(
    queue_size: int, sizes: list[int], grouped: bool
) -> None:
    loss = MoCoLoss(dim=DIM, queue_size=queue_size, temperature=0.2).double()
    past: list[tuple[list[float], int]] = []
    for query, key, ids in calls(sizes):
        groups = ids.tolist() if grouped else [-1] * len(ids)
        expected = []
        for q, k, group in zip(query.tolist(), key.tolist(), groups, strict=True):
            own = cosine(q, k) / 0.2
            others = [cosine(q, old) / 0.2 for old, i in past if not grouped or i != group]
            expected.append(lse([own, *others]) - own)
        found = loss(query, key, ids if grouped else None)
        assert math.isclose(float(found), mean(expected), rel_tol=1e-12, abs_tol=1e-15)
        past = [*past, *zip(key.tolist(), groups, strict=True)][-queue_size:]


def test_queued_samples_without_a_group_are_negatives_of_one_another() -> None:
    losses = [MoCoLoss(dim=DIM, queue_size=8) for _ in range(2)]
    ungrouped, distinct = torch.tensor([-100, 1, -1]), torch.tensor([20, 1, 21])
    for step, (query, key, _) in enumerate(calls([3, 3])):
        apart = torch.where(distinct > 1, distinct + 10 * step, distinct)
        found, expected = losses[0](query, key, ungrouped), losses[1](query, key, apart)
        assert float(found) == float(expected)


def test_a_queue_of_double_precision_keys_is_the_same_after_a_resume() -> None:
    loss, other = MoCoLoss(dim=DIM, queue_size=8), MoCoLoss(dim=DIM, queue_size=8)
    batches = calls([3, 3, 3])
    for query, key, ids in batches[:2]:
        assert query.dtype == torch.float64
        loss(query, key, ids)
    other.load_state_dict(loss.state_dict())
    query, key, ids = batches[2]
    assert float(loss(query, key, ids)) == float(other(query, key, ids))


def test_the_first_call_has_no_negatives_and_the_key_gets_no_gradient() -> None:
    query, key, _ = calls([3])[0]
    query.requires_grad_()
    key.requires_grad_()
    loss = MoCoLoss(dim=DIM, queue_size=8)
    first = loss(query, key)
    first.backward()
    assert float(first.detach()) == 0
    assert key.grad is None
    loss(query, key).backward()
    assert key.grad is None
    assert query.grad is not None
    assert bool(query.grad.any())


def test_keys_are_enqueued_once_per_call_only_in_training() -> None:
    loss = MoCoLoss(dim=DIM, queue_size=8)
    query, key, _ = calls([3])[0]
    loss.eval()(query, key)
    assert int(loss.queue.fill) == 0
    loss.train().terms(query, key)
    assert int(loss.queue.fill) == 3
    stored = loss.queue.keys[:3]
    torch.testing.assert_close(stored, torch.nn.functional.normalize(key).float())


def test_backward_after_the_queue_has_moved_on_is_possible() -> None:
    loss = MoCoLoss(dim=DIM, queue_size=4)
    (query, key, _), (other, other_key, _) = calls([4, 4])
    loss(query, key)
    value = loss(query.requires_grad_(), key)
    loss(other, other_key)
    value.backward()
    assert query.grad is not None


@pytest.mark.parametrize("queue_size", [4, 7, 64])
def test_queue_and_loss_are_the_same_on_ranks_over_several_calls(
    queue_size: int, ranks: Ranks
) -> None:
    query, key, ids = calls([6])[0]
    build = Small(queue_size)
    for inputs in ((query, key), (query, key, ids)):
        assert_same_on_ranks(ranks, build, inputs, calls=4)


class Small:
    """Builds a loss with a small queue."""

    def __init__(self, queue_size: int) -> None:
        self.queue_size = queue_size

    def __call__(self) -> MoCoLoss:
        return MoCoLoss(dim=DIM, queue_size=self.queue_size)


def test_features_of_another_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match=r"key must be \[batch, 4\], got shape \(3, 6\)"):
        MoCoLoss(dim=DIM, queue_size=8)(draw(3, 6), draw(3, 6))


def test_inputs_can_be_passed_by_name() -> None:
    query, key, ids = calls([3])[0]
    loss = MoCoLoss(dim=DIM, queue_size=8)
    assert float(loss(query=query, key=key, groups=ids)) == 0
