"""Copies of buffers: what is restored, what is copied, and what is reported as lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diptych.engine.step.buffer_copies import BufferCopies

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class Holder(nn.Module):
    """Holds small buffers of several types, large ones, and none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("place", torch.tensor(4))
        self.register_buffer("scale", torch.ones(2, 2, dtype=torch.float16))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("nothing", None)
        self.register_buffer("queue", torch.zeros(70_000))
        self.register_buffer("table", torch.arange(70_000.0))


def change_in_place(holder: Holder) -> None:
    with torch.no_grad():
        for buffer in holder.buffers():
            if buffer is not holder.table:
                first = buffer.view(-1)[:1]
                first.copy_(~first if first.dtype is torch.bool else first + 1)


def run_batch_norm(holder: Holder) -> None:
    holder.norm(torch.randn(5, 3, device=holder.place.device))  # changes no version counter


def replace_all(holder: Holder) -> None:
    for name in ("place", "scale", "queue"):
        setattr(holder, name, getattr(holder, name) + 1)
    holder.nothing = torch.ones(2, device=holder.place.device)


def remove_one(holder: Holder) -> None:
    holder.scale = None


CHANGES: list[Callable[[Holder], None]] = [
    change_in_place,
    run_batch_norm,
    replace_all,
    remove_one,
]


def values(holder: Holder) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in holder.state_dict().items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("earlier", [0, 1, 4])
@pytest.mark.parametrize("change", CHANGES)
def test_buffers_are_restored_to_the_last_copy(change, earlier, device):
    holder = Holder().to(device)
    copies = BufferCopies([holder])
    for _ in range(earlier):  # steps that succeed
        copies.take()
        change_in_place(holder)
    copies.take()
    before, objects = values(holder), dict(holder.named_buffers())
    change(holder)
    assert values(holder).keys() != before.keys() or any(
        not value.equal(before[key]) for key, value in values(holder).items()
    )

    assert copies.restore() == []
    after = values(holder)
    assert after.keys() == before.keys()
    assert all(value.equal(before[key]) for key, value in after.items())
    assert dict(holder.named_buffers()) == objects  # the same tensors, which optimizers may share


def test_a_large_buffer_that_never_changes_is_not_kept_twice():
    holder = Holder()
    copies = BufferCopies([holder])
    for _ in range(3):
        copies.take()
        holder.queue[0] += 1
    kept = {place.name for place in copies._large if place.copy is not None}
    assert kept == {"queue"}


def test_a_large_buffer_that_changes_later_is_reported_once_and_then_kept():
    holder = Holder()
    copies = BufferCopies([holder])
    copies.take()
    copies.take()
    holder.table[0] = -1.0
    assert copies.restore() == ["table"]
    copies.take()
    holder.table[1] = -2.0
    copies.take()
    holder.table[2] = -3.0
    assert copies.restore() == []
    assert holder.table[:3].tolist() == [-1.0, -2.0, 2.0]


def test_a_shared_buffer_and_a_shared_module_are_restored_once():
    holder = Holder()
    both = nn.ModuleList([holder, holder])
    copies = BufferCopies([both, holder])
    copies.take()
    change_in_place(holder)
    assert copies.restore() == []
    assert holder.place.item() == 4


def test_a_buffer_whose_memory_was_exchanged_is_reported():
    holder = Holder()
    copies = BufferCopies([holder])
    copies.take()
    holder.scale.data = torch.zeros(2, 2, dtype=torch.float16)
    assert copies.restore() == ["scale"]
