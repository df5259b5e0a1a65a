"""The Triton kernels agree with float64 within half precision and never wait for the device."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from diptych.losses import CLIPLoss, DecoupledContrastiveLoss, NTXentLoss, SigLIPLoss
from diptych.losses.base.tiles import replay

pytestmark = pytest.mark.gpu

LOSSES = {
    "clip": CLIPLoss,
    "clip at scale 100": partial(CLIPLoss, temperature=0.01),
    "clip inside": partial(CLIPLoss, positives="inside"),
    "clip mask": partial(CLIPLoss, positives="mask"),
    "clip smoothed": partial(CLIPLoss, label_smoothing=0.1),
    "siglip": SigLIPLoss,
    "simclr": partial(NTXentLoss, learn_temperature=True),
    "decoupled": partial(DecoupledContrastiveLoss, learn_temperature=True),
    "not normalised": partial(CLIPLoss, normalize=False, temperature=1.0, learn_temperature=False),
}


def drawn(pairs: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return related features on the device, of norms far from 1."""
    generator = torch.Generator("cuda").manual_seed(0)
    first, noise = torch.randn(2, pairs, dim, device="cuda", generator=generator)
    return (3 * first).to(dtype), (first + 2 * noise).to(dtype)


def value_and_gradients(loss: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Return value and gradients in float64, including those of the loss's own parameters."""
    sides = [side.detach().clone().requires_grad_() for side in inputs[:2]]
    value = loss.cuda()(*sides, *inputs[2:])
    value.backward()
    every = [value.detach(), *(one.grad for one in (*sides, *loss.parameters()))]
    return [one.double() for one in every]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("tile", [None, 64])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_within_its_rounding_of_float64(
    name: str, tile: int | None, grouped: bool, dtype: torch.dtype
) -> None:
    first, second = drawn(500, 72, dtype)
    groups = [torch.arange(500, device="cuda") // 3] if grouped else []
    exact = value_and_gradients(LOSSES[name](tile=None), first.double(), second.double(), *groups)
    found = value_and_gradients(LOSSES[name](tile=tile), first, second, *groups)
    for one, other in zip(found, exact, strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm()
    assert (found[0] - exact[0]).abs() <= 1e-3 * exact[0]


@pytest.mark.parametrize("tile", [None, 2])
def test_a_feature_without_direction_gets_no_gradient_and_a_nan_shows(tile: int | None) -> None:
    first, second = drawn(16, 16, torch.bfloat16)
    first[3] = 0
    value, gradient, *_ = value_and_gradients(CLIPLoss(tile=tile), first, second)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[3].any()
    first[3, 3] = torch.nan
    assert value_and_gradients(CLIPLoss(tile=tile), first, second)[0].isnan()


@pytest.mark.parametrize("tile", [None, 64])
def test_nothing_waits_for_the_device(tile: int | None) -> None:
    loss = CLIPLoss(tile=tile).cuda()
    first, second = (side.requires_grad_() for side in drawn(256, 64, torch.bfloat16))
    for _ in range(3):  # the third records the kernels, which waits
        loss(first, second).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(first, second).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_replayed_kernels_give_the_bits_of_launched_ones(
    monkeypatch: pytest.MonkeyPatch, name: str, grouped: bool
) -> None:
    groups = [torch.arange(500, device="cuda") // 3] if grouped else []
    batches = [[side + step for side in drawn(500, 72, torch.bfloat16)] for step in range(5)]
    loss = LOSSES[name](tile=512)

    def all_batches() -> list[Tensor]:
        found = []
        for batch in batches:
            loss.zero_grad()
            found += value_and_gradients(loss, *batch, *groups)
        return found

    monkeypatch.setattr(replay, "_may_record", lambda: False)
    launched = all_batches()
    monkeypatch.setattr(replay, "_may_record", lambda: True)
    monkeypatch.setattr(replay, "_recordings", replay.Recordings())
    for one, other in zip(all_batches(), launched, strict=True):
        assert one.equal(other)


def test_replayed_losses_may_be_differentiated_in_any_order() -> None:
    loss = CLIPLoss(tile=512).cuda()
    batches = [
        [(side + step).requires_grad_() for side in drawn(256, 64, torch.bfloat16)]
        for step in range(6)
    ]
    expected = [torch.autograd.grad(loss(*batch), batch) for batch in batches]
    values = [loss(*batch) for batch in batches]
    for place in (3, 0, 5, 1, 4, 2):
        found = torch.autograd.grad(values[place], batches[place], retain_graph=True)
        again = torch.autograd.grad(values[place], batches[place])
        for one, two, other in zip(found, again, expected[place], strict=True):
            assert one.equal(other)
            assert two.equal(other)


def test_what_is_recorded_in_inference_mode_is_replayed_in_training() -> None:
    loss = CLIPLoss(tile=512).cuda()
    sides = [side.requires_grad_() for side in drawn(248, 64, torch.bfloat16)]
    with torch.inference_mode():
        values = [loss(*(side.clone() for side in sides)) for _ in range(4)]
    for _ in range(4):
        value = loss(*sides)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, sides))
        assert all(value.equal(other) for other in values)


def test_a_recording_keeps_no_model_alive() -> None:
    loss, (first, second) = CLIPLoss(tile=512).cuda(), drawn(264, 64, torch.bfloat16)
    encoder = nn.Linear(64, 64, device="cuda", dtype=torch.bfloat16)
    weight = weakref.ref(encoder.weight)
    for _ in range(4):
        loss(encoder(first), second)
    del encoder
    assert weight() is None


def test_the_loss_is_part_of_a_graph_that_the_user_records() -> None:
    loss = CLIPLoss(tile=512).cuda()
    sides = [side.requires_grad_() for side in drawn(256, 64, torch.bfloat16)]
    for _ in range(4):
        expected = torch.autograd.grad(loss(*sides), sides)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(loss(*sides), sides)
    graph.replay()
    for one, other in zip(found, expected, strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("tile", [None, 64])
def test_the_loss_compiles_whole(tile: int | None) -> None:
    loss = CLIPLoss(tile=tile).cuda()
    sides = drawn(256, 64, torch.bfloat16)
    whole = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(
        value_and_gradients(whole, *sides)[:3],
        value_and_gradients(loss, *sides)[:3],
        rtol=2e-2,
        atol=1e-4,
    )


def test_memory_beside_the_gradients_is_a_block_and_one_side() -> None:
    sides = [side.requires_grad_() for side in drawn(16384, 512, torch.bfloat16)]
    loss = CLIPLoss().cuda()
    loss(*sides).backward()
    for side in sides:
        side.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss(*sides).backward()
    peak = torch.cuda.max_memory_allocated() - before
    features = 2 * sides[0].numel()  # bytes
    block = 2 * 3 * 2**24
    assert peak <= 4 * features + block + 2**25
