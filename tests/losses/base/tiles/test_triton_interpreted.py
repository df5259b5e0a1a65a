"""The Triton kernels in Triton's interpreter, where Triton is installed and there is no GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diptych.losses import (
    CLIPLoss,
    DecoupledContrastiveLoss,
    NTXentLoss,
    SigLIPLoss,
    SupervisedContrastiveLoss,
)

PAIRS, DIM, TILE, CHUNK = 70, 24, 16, 32
LOSSES = {
    "clip": CLIPLoss,
    "clip inside": partial(CLIPLoss, positives="inside"),
    "far logits": partial(CLIPLoss, normalize=False, temperature=1.0, learn_temperature=False),
    "siglip": SigLIPLoss,
    "simclr": partial(NTXentLoss, learn_temperature=True),
    "decoupled": partial(DecoupledContrastiveLoss, learn_temperature=True),
    "supervised": partial(SupervisedContrastiveLoss, learn_temperature=True),
}


def patched() -> None:
    """Let the kernels run on the CPU, on tiles so small that 70 pairs have several chunks."""
    from diptych.losses.base.tiles import operators, tiled_objectives, triton_blocks

    def take(features: Tensor, dtype: torch.dtype | None) -> bool:
        return dtype == torch.float16 and features.shape[1] % 8 == 0

    def add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool = False) -> None:
        product = left.float() @ right.float()
        total.copy_(product if first else total + product)

    for module in (operators, tiled_objectives):
        module.kernels_take = take
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment,misc]
    triton_blocks._add_product = add_product
    triton_blocks._TILE.update(ROWS=TILE, COLUMNS=TILE, STEP=TILE)
    triton_blocks._SIDE, triton_blocks._CHUNK_ROWS = TILE, CHUNK
    triton_blocks._FORWARD_COLUMNS, triton_blocks._FORWARD_LOGITS = 2 * CHUNK, 1


def value_and_gradients(loss: nn.Module, *inputs: Tensor) -> list[Tensor]:
    sides = [side.detach().clone().requires_grad_() for side in inputs[:2]]
    value = loss(*sides, *inputs[2:])
    value.backward()
    return [
        x.double() for x in (value.detach(), *(one.grad for one in (*sides, *loss.parameters())))
    ]


def check() -> None:
    """Compare every loss on float16 features with its whole matrix in float64."""
    patched()
    generator = torch.Generator().manual_seed(0)
    first, noise = torch.randn(2, PAIRS, DIM, generator=generator)
    sides = (3 * first).half(), (first + 2 * noise).half()
    for name, build in LOSSES.items():
        groups = [torch.arange(PAIRS) // 3 % 17]
        for given in [groups] if name == "supervised" else [[], groups]:
            whole = [side.double() for side in sides]
            exact = value_and_gradients(build(tile=None), *whole, *given)
            found = value_and_gradients(build(tile=TILE), *sides, *given)
            for one, other in zip(found, exact, strict=True):
                assert (one - other).norm() <= 1e-2 * other.norm(), name
            assert (found[0] - exact[0]).abs() <= 1e-3 * exact[0].abs(), name


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_triton_blocks runs")
def test_interpreted_kernels_agree_with_float64() -> None:
    root = Path(__file__).parents[4]
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"from {__name__} import check; check()"],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
        timeout=300,
    )
