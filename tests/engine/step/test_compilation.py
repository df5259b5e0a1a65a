"""Models compiled in place: their keys, their copies, and results that outlive the next call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.engine.state.run_state import run_state
from diptych.engine.step import train_step as step
from diptych.engine.step.compilation import compile_in_place, keep_gradients, uses_cuda_graphs
from tests.engine.models import CoupledLoss, TwoTower, named_parameters, paired, trainer_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class DistanceLoss(nn.Module):
    """A mean over samples."""

    couples_samples = False

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return (image - text).square().mean()


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, value: Tensor) -> Any:
        return {"scaled": value * self.weight}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Scale:
    """Return a model that has all its results in the same memory, as a CUDA graph does."""
    modes: list[str] = []

    def compiled(_: Callable[..., Any], mode: str) -> Callable[..., Any]:
        modes.append(mode)
        memory = torch.zeros(4)
        return lambda value: {"scaled": memory.copy_(value * model.weight)}

    monkeypatch.setattr(torch, "compile", compiled)
    model = Scale()
    compile_in_place(model, CUDA, how="reduce-overhead")
    assert modes == ["reduce-overhead"]
    return model


def test_results_outlive_the_next_call(model):
    with torch.no_grad():
        first, second = (model(torch.full((4,), value))["scaled"] for value in (1.0, 2.0))
    assert [float(first.sum()), float(second.sum())] == [4.0, 8.0]


def test_gradients_outlive_the_next_backward_pass(model):
    memory = torch.ones(4)
    model.weight.grad = memory.view(4)
    keep_gradients(model.parameters())
    memory.fill_(2.0)
    assert model.weight.grad.tolist() == [1.0] * 4


@pytest.mark.parametrize(("size", "kept"), [(None, 0), (6, 0), (4, 1), (2, 2)])
@pytest.mark.parametrize("couples", [True, False])
def test_gradients_are_kept_between_two_pieces_and_only_there(monkeypatch, size, kept, couples):
    calls: list[int] = []
    monkeypatch.setattr(step, "keep_gradients", lambda parameters: calls.append(len(parameters)))
    loss = CoupledLoss().double() if couples else DistanceLoss()
    trainer = trainer_of(loss=loss, microbatch_size=size)
    trainer._process_function.cuda_graphs = True
    trainer.run([paired(6)], max_epochs=1)
    assert calls == [len(named_parameters(trainer.model, loss))] * kept


def test_a_copy_of_the_model_is_its_own(model):
    twin = copy.deepcopy(model)
    twin.weight.data.fill_(5.0)
    assert twin(torch.ones(4))["scaled"].tolist() == [5.0] * 4


def test_cuda_graphs_are_of_a_cuda_device_and_some_modes():
    assert uses_cuda_graphs(CUDA, how="reduce-overhead")
    assert uses_cuda_graphs(CUDA, how="max-autotune")
    assert not any(uses_cuda_graphs(CUDA, how=how) for how in (False, True, "default"))
    assert not uses_cuda_graphs(CUDA, how="max-autotune-no-cudagraphs")
    assert not uses_cuda_graphs(CPU, how="reduce-overhead")


@pytest.mark.parametrize("how", [True, "default", "reduce-overhead"])
def test_a_compiled_model_keeps_its_keys(how):
    keys = list(TwoTower().state_dict())
    trainer = trainer_of(compile=how)
    assert list(trainer.model.state_dict()) == keys
    assert list(run_state(trainer)["model"]) == keys


def test_a_model_that_is_not_to_be_compiled_is_left_alone():
    trainer = trainer_of(compile=False)
    assert trainer.model._compiled_call_impl is None
