"""Comparison of values over ranks: one small exchange if they are equal, a sentence if not."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from diptych.engine.distributed.agreement import wait_for_all_ranks
from diptych.engine.distributed.collectives import exchange_device, world_size
from diptych.engine.distributed.gathering import gather_values
from diptych.engine.distributed.hang_report import waits_at
from diptych.engine.name_patterns import SHOWN, listed

ABSENT = "absent"


def check_equal_over_ranks(
    what: str, values: Mapping[str, Any], way_out: str, *, unless_others: str = ""
) -> None:
    """Check that all ranks hold equal values. All ranks must call it.

    Cost: an all-reduce of two integers. If they differ, the ranks gather the values too.

    Args:
        what: the subject of the message, as in "the model must be the same on all ranks".
        values: nested dictionaries of plain values, by name.
        way_out: what to do, the end of the message.
        unless_others: the name of a value that differs whenever others do: it is named only if it
            is the only one.

    Raises:
        RuntimeError: on all ranks, if the values differ; it names each difference.
    """
    if world_size() == 1 or _digest_is_shared(values):
        return
    found = list(_differences(gather_values(dict(values)), ""))
    others = [text for text in found if not text.startswith(f"{unless_others} ")]
    found = others or found
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    raise RuntimeError(
        f"{what} must be the same on all ranks, got {'; '.join(found[:SHOWN])}{more}. {way_out}"
    )


@waits_at("comparing the modules of a new trainer")
def check_same_tensors(**modules: nn.Module) -> None:
    """Check that modules have the same parameters and buffers on all ranks, their values apart.

    Raises:
        RuntimeError: on all ranks, if they differ; it names each difference.
    """
    if world_size() == 1:
        return
    wait_for_all_ranks("comparing the modules of a new trainer")
    tensors = {
        name: {
            path: f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            for path, tensor in (*module.named_parameters(), *module.named_buffers())
        }
        for name, module in modules.items()
    }
    check_equal_over_ranks(
        "the parameters and buffers", tensors, "Build model and loss alike on every rank"
    )


def _digest_is_shared(values: Any) -> bool:
    """Say whether all ranks hold equal values, by a digest."""
    content = json.dumps(values, sort_keys=True, default=str).encode()
    number = int.from_bytes(hashlib.blake2b(content, digest_size=7).digest(), "big")
    extremes = torch.tensor([number, -number], dtype=torch.int64, device=exchange_device())
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    highest, lowest = extremes.tolist()
    return bool(highest == -lowest)


def _differences(values: Sequence[Any], name: str) -> Iterator[str]:
    """Yield "NAME is VALUE on rank 0 and VALUE on rank 1" for each value that differs."""
    if all(isinstance(value, Mapping) for value in values):
        for key in dict.fromkeys(itertools.chain.from_iterable(values)):
            parts = [value.get(key, ABSENT) for value in values]
            yield from _differences(parts, f"{name}.{key}" if name else str(key))
        return
    shown = ["present" if isinstance(value, Mapping) else str(value) for value in values]
    if len({*shown}) > 1:
        yield f"{name} {_by_rank(shown)}".lstrip()


def _by_rank(shown: Sequence[str]) -> str:
    """Return "0.1 on ranks 0, 2 and 0.2 on rank 1" for the values of the ranks."""
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(shown):
        holders.setdefault(value, []).append(rank)
    return " and ".join(f"{value} on {_ranks(held)}" for value, held in holders.items())


def _ranks(held: Iterable[int]) -> str:
    names = [str(rank) for rank in held]
    return f"rank{'s' if len(names) > 1 else ''} {listed(names)}"
