"""The towers of the emoji example: shapes, size, and no tie between the samples of a batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from diptych.engine import Trainer, tasks
from diptych.losses import CLIPLoss
from diptych.recipes.towers.small_towers import ScaledConv2d
from examples.emoji.model import TwoTowers


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TwoTowers(dim=64)


def batch(size):
    generator = torch.Generator().manual_seed(size)
    return {
        "image": torch.rand(size, 3, 32, 32, generator=generator),
        "text": torch.randint(1, 8000, (size, 20), generator=generator),
        "group": torch.arange(size),
    }


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_both_towers_give_features_of_one_dimension(model):
    data = batch(5)
    image, text = model(data["image"], data["text"])
    assert image.shape == text.shape == (5, 64)
    assert torch.equal(model.encode_image(data["image"]), image)


def test_the_image_tower_costs_25_megaflop_an_image(model):
    products = []

    def count(module, _, output):
        positions = output[0].numel() // output.shape[1]
        products.append(positions * module.weight.numel())

    for module in model.encode_image.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model.encode_image(torch.rand(1, 3, 32, 32))
    assert 2 * sum(products) == pytest.approx(25e6, rel=0.1)


def test_a_sample_gets_the_same_features_whatever_else_is_in_its_batch(model):
    data = batch(6)
    model.double().eval()
    images = data["image"].double()
    whole = model(images, data["text"])
    alone = model(images[2:3], data["text"][2:3])
    for together, single in zip(whole, alone, strict=True):
        torch.testing.assert_close(together[2:3], single)


def test_cutting_a_batch_into_micro_batches_gives_the_same_weights(model):
    model.double()
    data = batch(12)
    data["image"] = data["image"].double()
    trained = []
    for microbatch_size in (None, 5):
        own, loss = copy.deepcopy(model), CLIPLoss().double()
        optimizer = torch.optim.SGD([*own.parameters(), *loss.parameters()], lr=0.1)
        Trainer(own, loss, optimizer, task=tasks.image_text, microbatch_size=microbatch_size).run(
            [data], max_epochs=2
        )
        trained.append(weights(own))
    assert not torch.equal(trained[0], weights(model))
    torch.testing.assert_close(*trained, rtol=1e-10, atol=1e-10)


def test_padding_changes_no_caption(model):
    model.eval()
    text = torch.randint(1, 8000, (3, 9))
    padded = nn.functional.pad(text, (0, 4))
    torch.testing.assert_close(model.encode_text(text), model.encode_text(padded))


def test_features_in_bf16_are_those_of_float32_within_its_precision(model):
    data = batch(2)
    model.eval()
    expected = model(data["image"], data["text"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(data["image"], data["text"])
    for a, b in zip(rounded, expected, strict=True):
        assert torch.cosine_similarity(a.float(), b).min() > 0.999


def test_a_scaled_convolution_keeps_the_variance_of_white_noise():
    torch.manual_seed(0)
    convolution = ScaledConv2d(64, 256, 3)
    convolution.weight.data.mul_(17).add_(3)  # neither scale nor mean of the weights matters
    output = convolution(torch.randn(8, 64, 16, 16))[:, :, 1:-1, 1:-1]
    assert output.var().item() == pytest.approx(1, rel=0.05)


def test_every_parameter_gets_a_gradient(model):
    data = batch(8)
    loss = CLIPLoss()(*model(data["image"], data["text"]))
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
