"""The emoji example on several ranks gives what it gives on one."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.examples import ranks

STEPS = 12
"""Past the uneven batch that ends the first epoch."""


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def spread(folder: Path, count: int) -> list[dict[str, Any]]:
    """Return the weights that each of several ranks ends with."""
    arguments = (str(folder), free_port(), count, STEPS)
    try:
        torch.multiprocessing.spawn(ranks.work, args=arguments, nprocs=count)
    except Exception as error:
        told = [path.read_text() for path in sorted(folder.glob("*.txt"))]
        raise AssertionError("\n".join(told)) from error
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def largest_difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Return the largest difference of a tensor, as a share of its norm.

    Adam divides by the size of a gradient: where one is all but zero, an entry's rounding grows.
    """
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - value).norm() / value.norm().clamp(min=1e-3))
        for name, value in expected.items()
        if value.is_floating_point()
    )


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_ranks_end_with_the_weights_of_one(tmp_path, emoji, count: int):
    alone = ranks.updated(emoji[:: ranks.SAMPLES], STEPS)
    together = spread(tmp_path, count)
    assert all(largest_difference(weights, alone) < 1e-9 for weights in together)
    for weights in together[1:]:
        assert all(weights[name].equal(value) for name, value in together[0].items())
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    tags = {tag for line in records for tag in json.loads(line)}
    assert "train/loss" in tags


def test_micro_batches_end_with_the_weights_of_whole_batches(emoji):
    few = emoji[:: ranks.SAMPLES]
    whole, pieces = ranks.updated(few, STEPS), ranks.updated(few, STEPS, microbatch_size=8)
    assert largest_difference(pieces, whole) < 1e-9
