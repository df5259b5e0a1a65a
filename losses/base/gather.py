"""The batch of all ranks: features gathered with gradient, and averages that are exact over ranks.

The convention of every loss of this package: the values that the ranks return *average*, with equal
weights, to the loss of the global batch; the backward of a gather is a sum over ranks. Averaging
parameter gradients over ranks, as data-parallel training does, then gives the exact gradient of the
global batch, for encoders and for the loss's own parameters.

Gathering is collective: all ranks must call a loss equally often, in evaluation too. Without a
process group, or with one rank, nothing is communicated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_c10d: Any = dist
# torch 2.13 has other names for the collectives on one tensor.
_ALL_GATHER: Any = getattr(_c10d, "all_gather_single", _c10d.all_gather_into_tensor)
_REDUCE_SCATTER: Any = getattr(_c10d, "reduce_scatter_single", _c10d.reduce_scatter_tensor)


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(local: Tensor) -> Tensor:
    """Sum a tensor of equal shape over ranks, with gradient; the backward sums over ranks too."""
    if world_size() == 1:
        return local
    summed: Tensor = _Sum.apply(local)  # type: ignore[no-untyped-call]
    return summed


def max_over_ranks(local: Tensor) -> Tensor:
    """Return the elementwise maximum over ranks of a tensor of equal shape, without gradient."""
    if world_size() == 1:
        return local.detach()
    largest = local.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def stack_over_ranks(local: Tensor) -> Tensor:
    """Return the tensors of all ranks, of equal shapes, as one [ranks, ...], without gradient."""
    stacked = local.new_empty(world_size(), *local.shape)
    if _moves_whole_tensors(local.device):
        _ALL_GATHER(stacked.flatten(0, 1), local.contiguous())
    else:
        dist.all_gather(list(stacked), local.contiguous())
    return stacked


class GlobalBatch(NamedTuple):
    """The sizes of all ranks' batches; the global batch concatenates them in the order of ranks.

    Attributes:
        sizes: The number of samples on each rank.
        rank: This rank.
    """

    sizes: tuple[int, ...]
    rank: int

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.sizes)

    @property
    def size(self) -> int:
        """Number of samples on this rank, b."""
        return self.sizes[self.rank]

    @property
    def total(self) -> int:
        """Number of samples on all ranks, B."""
        return sum(self.sizes)

    @property
    def even(self) -> bool:
        """Whether all ranks have equally many samples."""
        return len(set(self.sizes)) == 1

    @property
    def offset(self) -> int:
        """Index of this rank's first sample in the global batch."""
        return sum(self.sizes[: self.rank])

    @property
    def own(self) -> slice:
        """The place of this rank's samples in the global batch."""
        return slice(self.offset, self.offset + self.size)

    def of_views(self, count: int) -> GlobalBatch:
        """Return the batch in which every sample has several rows, those of a rank together."""
        return GlobalBatch(tuple(count * size for size in self.sizes), self.rank)

    def positions(self, device: torch.device) -> Tensor:
        """Return the global indices of this rank's samples, int64 [b]."""
        return torch.arange(self.offset, self.offset + self.size, device=device)

    def gather(self, local: Tensor) -> Tensor:
        """Gather [b, ...] from every rank into [B, ...]; the backward sums over ranks.

        Tensors that need no gradient, such as integers, are gathered without one.
        """
        if self.world_size == 1:
            return local
        if not _differentiated(local):
            return _gathered(local, self)
        gathered: Tensor = _Gather.apply(local, self)  # type: ignore[no-untyped-call]
        return gathered

    def scatter(self, whole: Tensor) -> Tensor:
        """Return this rank's piece [b, ...] of the sum over ranks of [B, ...], with gradient."""
        if self.world_size == 1:
            return whole
        if not _differentiated(whole):
            return _scattered(whole, self)
        piece: Tensor = _Scatter.apply(whole, self)  # type: ignore[no-untyped-call]
        return piece

    def mean(self, values: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return this rank's share of the mean over all samples of all ranks.

        Args:
            values: One value for each sample of this rank, [b], or their sum.
            valid: Bool [b], the samples that count. The values of the others must be 0.

        Returns:
            A scalar that averages over ranks to the mean over the global batch; 0, with a graph, if
            no sample counts.
        """
        if valid is None:
            total = values.sum() if values.dim() else values
            return total / (self.total / self.world_size)
        return values.sum() * self.world_size / sum_over_ranks(valid.sum()).clamp_min(1)


def global_batch(size: int, **agreed: int) -> GlobalBatch:
    """Return the batch sizes of all ranks, which a loss needs before it gathers.

    They are those that a trainer has announced (`AnnouncedSizes`). Otherwise the ranks exchange
    them through host memory, without waiting for a device.

    Args:
        size: The number of samples on this rank; may be 0 unless it is 0 on all ranks.
        **agreed: Numbers that must be equal on all ranks, such as the feature dimension, by name.
            Different numbers would hang the collective calls that follow.

    Raises:
        ValueError: If no rank has a sample, or an agreed number differs (raised on every rank).
    """
    if world_size() == 1:
        batch = GlobalBatch((size,), 0)
    else:
        batch = GlobalBatch(_sizes(size, agreed), dist.get_rank())
    if batch.total == 0:
        raise ValueError("a loss needs at least one sample, got an empty batch")
    return batch


def _sizes(size: int, agreed: dict[str, int]) -> tuple[int, ...]:
    if _announced:
        return _announced[-1].sizes(size, agreed)
    return _agreed_sizes(size, agreed)


def _agreed_sizes(size: int, agreed: dict[str, int]) -> tuple[int, ...]:
    """Exchange the sizes, and check the agreed numbers."""
    rows = _exchange([size, *agreed.values()])
    for position, name in enumerate(agreed, start=1):
        received = [row[position] for row in rows]
        if len(set(received)) > 1:
            raise ValueError(f"{name} must be equal on all ranks, got {received} by rank")
    return tuple(row[0] for row in rows)


class AnnouncedSizes:
    """A context with the sizes of all ranks' batches, exchanged while ranks compute features.

    The exchange has started when the object exists; the first loss that needs the sizes waits for
    it. Ranks also exchange the kind of their batches, any number that is equal for batches of equal
    structure. A loss's first call for given kinds compares the announced sizes with its own, and
    its agreed numbers, by an exchange; later calls do not. All ranks know all kinds, so they decide
    alike.

    Args:
        size: The number of samples on this rank.
        kind: The kind of this rank's batch, a 64-bit integer.
        checked: What is known of the calls so far: whether a call, by the kinds of the batches and
            its position among the calls of one batch, gets the announced sizes. Pass the same
            mapping each time.
    """

    def __init__(self, size: int, kind: int, checked: dict[Any, bool]) -> None:
        local = torch.tensor([size, kind], dtype=torch.int64)
        self._received = [torch.empty_like(local) for _ in range(world_size())]
        self._work = dist.all_gather(self._received, local, group=_host_group(), async_op=True)
        self._known: list[list[int]] = []
        self._checked = checked
        self._calls = 0

    def __enter__(self) -> None:
        """Make the losses called inside use these sizes instead of exchanging them."""
        _announced.append(self)

    def __exit__(self, *_: object) -> None:
        """Let losses exchange sizes again."""
        _announced.pop()

    @property
    def total(self) -> int:
        """Number of samples on all ranks; it waits for the exchange."""
        return sum(size for size, _ in self._rows())

    def _rows(self) -> list[list[int]]:
        """Return the size and the kind of each rank's batch."""
        if self._work is not None:
            self._work.wait()
            self._work = None
            self._known = [row.tolist() for row in self._received]
        return self._known

    def sizes(self, size: int, agreed: dict[str, int]) -> tuple[int, ...]:
        """Return the sizes for the next call of a loss; arguments as for `global_batch`."""
        announced, kinds = zip(*self._rows(), strict=True)
        call = (kinds, self._calls, *agreed)
        self._calls += 1
        if not self._checked.get(call, False):
            found = _agreed_sizes(size, agreed)
            # A loss of other rows than the batch's, such as several captions a sample, exchanges
            # in each call.
            self._checked[call] = self._checked.get(call, True) and found == announced
            return found
        if size != announced[dist.get_rank()]:
            raise ValueError(
                f"a loss must get one row for each of the {announced[dist.get_rank()]} samples of"
                f" the batch, as before, got {size}. Return as many rows from the task each time."
            )
        return announced


_announced: list[AnnouncedSizes] = []

_host_groups: dict[str, Any] = {}


def _host_group() -> Any:
    """Return a group that can exchange host tensors: the default group, or an extra gloo group."""
    world = dist.group.WORLD
    if "cpu:gloo" in dist.get_backend_config(world):
        return world
    if _host_groups.get("world") is not world:
        # new_group is collective: all ranks reach it in the same call of the same loss.
        _host_groups.update(world=world, group=dist.new_group(backend="gloo", timeout=_timeout()))
    return _host_groups["group"]


def _timeout() -> Any:
    """Return the timeout of the default group, None if its backend is not NCCL.

    Without it, torch gives a new group 30 minutes, even if the default group has less.
    """
    device = torch.device("cuda")
    if not _moves_whole_tensors(device):
        return None
    world: Any = dist.group.WORLD
    return world._get_backend(device).options._timeout  # noqa: SLF001 - torch has no public name


def _exchange(numbers: list[int]) -> list[list[int]]:
    """Return the numbers of all ranks, in the order of ranks."""
    local = torch.tensor(numbers, dtype=torch.int64)
    gathered = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(gathered, local, group=_host_group())
    return [row.tolist() for row in gathered]


def _moves_whole_tensors(device: torch.device) -> bool:
    """Return whether a device's backend gathers into one tensor, and sums and scatters from one."""
    return f"{device.type}:nccl" in dist.get_backend_config(dist.group.WORLD)


def _differentiated(tensor: Tensor) -> bool:
    """Return whether autograd has to know of an operation; the way through it takes time."""
    return tensor.requires_grad and torch.is_grad_enabled()


def _gathered(local: Tensor, batch: GlobalBatch) -> Tensor:
    """Return the pieces of all ranks, of uneven lengths, as one."""
    largest = max(batch.sizes)
    padded = local
    if local.shape[0] < largest:
        padded = local.new_zeros(largest, *local.shape[1:])
        padded[: local.shape[0]] = local
    pieces = stack_over_ranks(padded)
    if batch.even:
        return pieces.flatten(0, 1)
    return torch.cat([piece[:size] for piece, size in zip(pieces, batch.sizes, strict=True)])


def _scattered(whole: Tensor, batch: GlobalBatch) -> Tensor:
    """Return this rank's piece of the sum over ranks."""
    whole = whole.contiguous()
    if batch.even and _moves_whole_tensors(whole.device):
        own = torch.empty_like(whole[: batch.size])
        _REDUCE_SCATTER(own, whole)
        return own
    # Some backends have no reduce-scatter, and none takes uneven pieces: sum, then slice.
    summed = whole.clone()
    dist.all_reduce(summed)
    return summed[batch.own].contiguous()


class _Gather(torch.autograd.Function):
    """All-gather of uneven pieces. Its backward is `_Scatter`, which is differentiable again."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, batch: GlobalBatch) -> Tensor:
        ctx.batch = batch
        return _gathered(local, batch)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Scatter.apply(gradients[0], ctx.batch), None  # type: ignore[no-untyped-call]


class _Scatter(torch.autograd.Function):
    """This rank's piece of the sum over ranks. Its backward is `_Gather`."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, batch: GlobalBatch) -> Tensor:
        ctx.batch = batch
        return _scattered(whole, batch)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(gradients[0], ctx.batch), None  # type: ignore[no-untyped-call]


class _Sum(torch.autograd.Function):
    """All-reduce by sum, in the forward and in every backward."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:  # noqa: ARG004 - autograd's signature
        summed = local.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004 - autograd's signature
        return sum_over_ranks(gradients[0])
