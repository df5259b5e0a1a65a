"""Logit scales that a training would leave as they are are reported when the trainer is built."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diptych.engine import Trainer, tasks
from diptych.handlers import CheckpointManager
from diptych.losses import (
    CaptioningLoss,
    CLIPLoss,
    MatryoshkaLoss,
    SigLIPLoss,
    VICRegLoss,
    WeightedSum,
    share_logit_scale,
)
from tests.engine.models import TwoTower, paired


class Scaled(TwoTower):
    """Two towers with a logit scale of their own, as open_clip's and transformers' models."""

    def __init__(self, start: float = math.log(100)) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(start))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        return (*super().forward(image, text), self.logit_scale.exp())


class Wrapped(nn.Module):
    """A model under the path that peft puts in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = Scaled()

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        features: tuple[Tensor, ...] = self.base_model.model(image, text)
        return features


def trainer_for(model: nn.Module, loss: nn.Module, precision: str = "fp32") -> Trainer:
    parameters = {id(p): p for p in (*model.parameters(), *loss.parameters())}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    return Trainer(model, loss, optimizer, task=tasks.image_text, seed=0, precision=precision)


@pytest.mark.parametrize("loss", [CLIPLoss(), SigLIPLoss(), WeightedSum(losses=[CLIPLoss()])])
@pytest.mark.parametrize(
    ("model", "path"), [(Scaled(), "logit_scale"), (Wrapped(), "base_model.model.logit_scale")]
)
def test_a_scale_of_the_model_beside_another_of_the_loss_is_reported(
    model: nn.Module, path: str, loss: nn.Module
) -> None:
    with pytest.warns(UserWarning, match=f"of its own, {path}, but .*share_logit_scale"):
        trainer_for(model, loss)


@pytest.mark.parametrize("build", [Scaled, Wrapped])
@pytest.mark.parametrize(
    "make",
    [
        CLIPLoss,
        SigLIPLoss,
        CaptioningLoss,
        lambda: WeightedSum(losses={"clip": CLIPLoss(), "vicreg": VICRegLoss()}),
        lambda: MatryoshkaLoss(loss=CLIPLoss(), dims=(2, 4)),
    ],
)
def test_the_advice_makes_a_single_scale_wherever_it_is(
    make: type[nn.Module], build: type[nn.Module]
) -> None:
    model = build()
    loss = share_logit_scale(make(), model)
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for p in loss.parameters())
    trainer_for(model, loss)  # warns of nothing


def test_models_and_losses_without_a_second_scale_are_not_reported() -> None:
    trainer_for(TwoTower(), CLIPLoss())
    trainer_for(Scaled(), VICRegLoss())


def test_an_export_holds_the_scale_that_was_trained(tmp_path: Path) -> None:
    model = Scaled(start=2.0)
    trainer = trainer_for(model, share_logit_scale(CLIPLoss(), model))
    trainer.attach(CheckpointManager(tmp_path, export=True))
    trainer.run([paired(8, torch.float32)] * 3)
    exported = load_file(next(tmp_path.rglob("model.safetensors")))["logit_scale"]
    assert exported.equal(model.logit_scale)
    assert float(exported) != 2.0


def test_a_scale_in_half_precision_is_reported_wherever_it_is() -> None:
    model = Scaled().bfloat16()
    with pytest.warns(UserWarning, match="logit_scale, logit_bias must be float32"):
        trainer_for(model, share_logit_scale(CLIPLoss(), model))
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.warns(UserWarning, match=r"temperature.logit_scale must be float32"):
            trainer_for(TwoTower(), CLIPLoss().to(dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen = Scaled().bfloat16().requires_grad_(False)
        trainer_for(frozen, VICRegLoss())
        trainer_for(TwoTower().bfloat16(), CLIPLoss())


def test_a_model_in_float16_is_reported_and_refused_by_a_loss_scale() -> None:
    with pytest.warns(UserWarning, match="trainable parameters in float16, .* first. Adam's eps"):
        trainer_for(TwoTower().half(), VICRegLoss())
    with (
        pytest.warns(UserWarning, match="in float16"),
        pytest.raises(ValueError, match=r"float32 if precision is 'fp16'.* Call model.float\(\)"),
    ):
        trainer_for(TwoTower().half(), VICRegLoss(), precision="fp16")
