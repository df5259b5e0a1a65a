"""A loss that shares the logit scale of a model: only the model's scale is used and trained."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.losses import CLIPLoss, NegativeCosineLoss, SigLIPLoss, share_logit_scale


class Scaled(nn.Module):
    """A model with a logit scale and a logit bias, in the shapes that models use."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.image = nn.Linear(4, 3)
        self.logit_scale = nn.Parameter(torch.full(shape, 2.0))
        self.logit_bias = nn.Parameter(torch.full(shape, -3.0))


def sides() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 3, generator=generator), torch.randn(5, 3, generator=generator)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("tile", [None, 2])
def test_clip_scales_by_the_models_parameter_and_trains_it(shape, tile):
    model = Scaled(shape)
    loss = share_logit_scale(CLIPLoss(tile=tile), model)
    image, text = sides()
    value = loss(image, text)
    value.backward()
    found = model.logit_scale.grad.clone()
    model.logit_scale.grad = None
    logits = model.logit_scale.exp() * F.normalize(image) @ F.normalize(text).T
    own = torch.arange(5)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(found, model.logit_scale.grad)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("tile", [None, 2])
def test_siglip_shares_the_bias_too(shape, tile):
    model = Scaled(shape)
    loss = share_logit_scale(SigLIPLoss(tile=tile), model)
    image, text = sides()
    value = loss(image, text)
    value.backward()
    found = [p.grad.clone() for p in (model.logit_scale, model.logit_bias)]
    model.zero_grad()
    logits = model.logit_scale.exp() * F.normalize(image) @ F.normalize(text).T + model.logit_bias
    signs = 2 * torch.eye(5) - 1
    expected = -F.logsigmoid(signs * logits).sum() / 5
    expected.backward()
    torch.testing.assert_close(value, expected)
    for one, parameter in zip(found, (model.logit_scale, model.logit_bias), strict=True):
        torch.testing.assert_close(one, parameter.grad)
    assert {v.shape for v in loss.scalars().values()} == {torch.Size([])}


def test_siglip_keeps_its_bias_for_a_model_without_one():
    model = Scaled()
    loss = share_logit_scale(SigLIPLoss(bias=-4.0), model, bias=None)
    assert loss.temperature.logit_scale is model.logit_scale
    assert dict(loss.named_parameters())["bias"].item() == -4


def test_there_is_one_scale_even_after_a_change_of_dtype():
    model, loss = Scaled(), CLIPLoss()
    share_logit_scale(loss, model)
    assert {id(p) for p in loss.parameters()} == {id(model.logit_scale)}
    model.double()
    loss.double()
    assert loss.temperature.logit_scale is model.logit_scale
    state = loss.state_dict()
    with torch.no_grad():
        model.logit_scale.fill_(1.0)
    assert float(loss.state_dict()["temperature.logit_scale"]) == 1.0
    assert state.keys() == CLIPLoss().state_dict().keys()


def test_the_bounds_of_the_loss_apply_to_the_models_scale():
    model = Scaled()
    with pytest.warns(UserWarning, match=r"a scale in \[1, 5\], got 2: the first update"):
        loss = share_logit_scale(CLIPLoss(temperature=0.5, max_logit_scale=5.0), model)
    loss.temperature.constrain()
    assert model.logit_scale.item() == pytest.approx(math.log(5.0))
    assert loss.temperature.value == pytest.approx(0.2)
    loss.temperature.value = 0.5
    assert model.logit_scale.item() == pytest.approx(math.log(2.0))
    assert "the model's logit_scale" in repr(loss)


def test_the_scale_that_is_trained_is_shared_not_that_of_a_frozen_copy():
    towers = nn.ModuleDict({"target": Scaled().requires_grad_(False), "student": Scaled()})
    loss = share_logit_scale(CLIPLoss(), towers)
    assert loss.temperature.logit_scale is towers["student"].logit_scale
    with pytest.raises(ValueError, match="'logit_scale', got several"):
        share_logit_scale(CLIPLoss(), towers.requires_grad_(True))


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="loss must have a temperature"):
        share_logit_scale(NegativeCosineLoss(), Scaled())
    with pytest.raises(
        ValueError, match=r"'scale', got none. .*Its parameters of one element are: logit_scale"
    ):
        share_logit_scale(CLIPLoss(), Scaled(), scale="scale")
    with pytest.raises(
        ValueError, match=r"'logit_offset_bias', got none.* With bias=None the loss keeps its own"
    ):
        share_logit_scale(SigLIPLoss(), Scaled(), bias="logit_offset_bias")
    with pytest.raises(ValueError, match=r"must be one floating-point number, got torch.float32"):
        share_logit_scale(CLIPLoss(), Scaled(), scale="image.weight")
