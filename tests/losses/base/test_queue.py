"""A queue keeps the last K keys for any batch sizes, and reports which slots are filled."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diptych.losses import Queue
from diptych.losses.base.gather import GlobalBatch
from diptych.losses.base.positives import NO_GROUP, with_own_groups


@given(
    size=st.integers(1, 9),
    batches=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    with_ids=st.booleans(),
)
def test_a_queue_holds_the_last_keys_of_any_batches(
    size: int, batches: list[int], with_ids: bool
) -> None:
    queue, history, count = Queue(size=size, dim=2), [], 0
    for batch in batches:
        ids = torch.arange(count, count + batch)
        queue.enqueue(ids[:, None].expand(-1, 2).float(), ids if with_ids else None)
        history += ids.tolist()
        count += batch
    keys, ids, filled = queue.read()
    kept = history[-size:] if history else []
    assert sorted(keys[filled, 0].tolist()) == sorted(kept)
    expected = keys[filled, 0].long() if with_ids else torch.full((len(kept),), NO_GROUP)
    assert torch.equal(ids[filled], expected)
    assert int(queue.fill) == min(size, count)
    assert int(queue.pointer) == count % size


def test_keys_that_were_read_do_not_change_when_more_are_enqueued() -> None:
    queue = Queue(size=4, dim=3)
    queue.enqueue(torch.ones(4, 3))
    keys, _, _ = queue.read()
    queue.enqueue(torch.zeros(4, 3))
    assert bool((keys == 1).all())


def test_a_state_dict_restores_a_partly_overwritten_queue() -> None:
    queue, other = Queue(size=5, dim=2), Queue(size=5, dim=2)
    queue.enqueue(torch.rand(8, 2), torch.arange(8))
    other.load_state_dict(queue.state_dict())
    more = torch.rand(3, 2)
    for each in (queue, other):
        each.enqueue(more)
    for mine, theirs in zip(queue.read(), other.read(), strict=True):
        assert torch.equal(mine, theirs)


def test_keys_carry_no_gradient_and_take_the_dtype_of_the_queue() -> None:
    queue = Queue(size=2, dim=1)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        keys = torch.full((1, 1), 0.1, dtype=torch.float64, requires_grad=True)
        queue.to(dtype).enqueue(keys)
        assert queue.keys.dtype == dtype
        assert not queue.keys.requires_grad
        assert bool((queue.keys == torch.tensor(0.1, dtype=dtype)).any())


def test_queued_keys_of_samples_without_a_group_match_no_id() -> None:
    batch = GlobalBatch((2, 3), 1)
    groups = with_own_groups(torch.tensor([-100, 7, -1]), batch)
    queue = Queue(size=4, dim=1)
    queue.enqueue(torch.ones(3, 1), groups)
    assert queue.ids.tolist() == [NO_GROUP, 7, NO_GROUP, NO_GROUP]
    assert (groups[:, None] == queue.ids).tolist() == [
        [False] * 4,
        [False, True] + [False] * 2,
        [False] * 4,
    ]


def test_keys_of_another_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match=r"keys must be \[n, 3\], got shape \(2, 4\)"):
        Queue(size=4, dim=3).enqueue(torch.ones(2, 4))


@pytest.mark.parametrize(("size", "dim"), [(0, 4), (4, 0)])
def test_an_empty_queue_is_refused(size: int, dim: int) -> None:
    with pytest.raises(ValueError, match="must be >= 1, got 0"):
        Queue(size=size, dim=dim)
