"""The custom operators: their flat arguments, and their behaviour under torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diptych.losses import CLIPLoss, NTXentLoss, SigLIPLoss
from diptych.losses.base.gather import GlobalBatch
from diptych.losses.base.tiles import operators, tiled_objectives
from diptych.losses.base.tiles.operators import TiledLossArguments
from diptych.losses.base.tiles.tiled_objectives import resolve_tile
from diptych.losses.base.tiles.torch_blocks import Entries, LossBlocks, TileSettings
from tests.losses.oracles import draw


def tiled(bias: torch.Tensor | None = None) -> TiledLossArguments:
    """Return the arguments for four pairs."""
    blocks = LossBlocks(
        draw(4, 8), draw(4, 8, seed=1), torch.tensor(2.0, dtype=torch.float64), bias
    )
    partner = torch.arange(4)
    entries = Entries(partner, valid=torch.ones(4, dtype=torch.bool))
    settings = TileSettings(rows=2, symmetric=True)
    return TiledLossArguments(blocks, entries, settings, GlobalBatch((4,), 0))


def test_the_flat_arguments_are_those_of_the_schema_and_are_restored() -> None:
    arguments = tiled()

    names = [argument.name for argument in torch.ops.diptych.contrast.default._schema.arguments]
    fields = [
        field for part in (LossBlocks, Entries, TileSettings, GlobalBatch) for field in part._fields
    ]

    assert names == fields
    assert TiledLossArguments.restored(arguments.flat()) == arguments


@pytest.mark.parametrize("operator", ["contrast", "sigmoid_contrast"])
def test_torchs_own_checks_pass(operator: str) -> None:
    bias = torch.tensor(-1.0, dtype=torch.float64) if operator == "sigmoid_contrast" else None
    flat = [
        x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in tiled(bias).flat()
    ]

    torch.library.opcheck(getattr(torch.ops.diptych, operator).default, tuple(flat))


@pytest.mark.parametrize("loss", [CLIPLoss(tile=2), SigLIPLoss(tile=2), NTXentLoss(tile=2)])
def test_a_second_derivative_of_a_loss_in_tiles_raises(loss: nn.Module) -> None:
    sides = [draw(6, 8).requires_grad_(), draw(6, 8, seed=1).requires_grad_()]
    (first,) = torch.autograd.grad(loss(*sides), sides[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        first.square().sum().backward()


@pytest.mark.parametrize("loss", [CLIPLoss(tile=2), SigLIPLoss(tile=2), NTXentLoss(tile=2)])
def test_a_loss_in_tiles_may_be_checkpointed(loss: nn.Module) -> None:
    sides = [draw(6, 8).requires_grad_(), draw(6, 8, seed=1).requires_grad_()]
    expected = torch.autograd.grad(loss(*sides), sides)
    found = torch.autograd.grad(checkpoint(loss, *sides, use_reentrant=False), sides)
    torch.testing.assert_close(found, expected)


def test_siglip_has_the_same_value_where_no_gradient_is_needed() -> None:
    loss, sides = SigLIPLoss(tile=2), [draw(6, 8), draw(6, 8, seed=1)]
    with torch.no_grad():
        value = loss(*sides)
    torch.testing.assert_close(value, loss(*sides).detach())


@pytest.mark.parametrize(("pairs", "tiled"), [(512, False), (514, True), (4096, True)])
def test_the_number_of_ranks_does_not_choose_the_kernels(
    monkeypatch: pytest.MonkeyPatch, pairs: int, tiled: bool
) -> None:
    monkeypatch.setattr(tiled_objectives, "kernels_take", lambda *_: True)
    for sizes in [(pairs,), (pairs // 2,) * 2, (pairs // 2 + 1, pairs // 2 - 2, 1), (1, pairs - 1)]:
        side = torch.empty(sizes[0], 8, dtype=torch.bfloat16)
        batch = GlobalBatch(sizes, 0)
        rows = resolve_tile("auto", side, side, batch=batch, dtype=side.dtype)
        assert (rows is not None) == tiled


def test_the_compiler_takes_the_choice_of_kernels_as_a_constant() -> None:
    def marked(device: torch.device) -> bool:
        return device.type == "cuda"

    torch.compiler.assume_constant_result(marked)  # type: ignore[no-untyped-call]

    assert vars(operators.triton_runs_on).items() >= vars(marked).items()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # by torch's own compiler
@pytest.mark.parametrize("loss", [CLIPLoss(tile=2), SigLIPLoss(tile=2), NTXentLoss(tile=2)])
def test_a_loss_in_tiles_compiles_whole_with_its_gradient(loss: nn.Module) -> None:
    found = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        sides = [side.float().requires_grad_() for side in (draw(6, 8), draw(6, 8, seed=1))]
        loss.zero_grad()
        call(*sides).backward()
        found.append([x.grad for x in (*sides, *loss.parameters())])

    torch.testing.assert_close(found[1], found[0])
