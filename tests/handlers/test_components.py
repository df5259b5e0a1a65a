"""Components: their parameters and sizes, and the error if a path has none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diptych.engine import Trainer, tasks
from diptych.engine.modules import named_parameters
from diptych.handlers.components import (
    component_sizes,
    default_components,
    find_components,
    total_size,
)
from diptych.handlers.sinks.run_record import run_settings


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.image_2 = nn.Linear(2, 2)
        self.text = nn.Linear(3, 2)
        self.text.weight = self.image[0].weight  # tied
        self.gain = nn.Parameter(torch.ones(()))


def make_trainer() -> Trainer:
    model, loss = TwoTowers(), Scaled()
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    return Trainer(model, loss, optimizer, task=tasks.image_text, device="cpu")


def names_in(trainer: Trainer, components: object) -> dict[str, set[str]]:
    names = {id(p): name for name, p in named_parameters(trainer.model, trainer.loss).items()}
    found = find_components(trainer.model, trainer.loss, components)
    return {component: {names[i] for i in members} for component, members in found.items()}


def test_the_default_components_are_children_own_parameters_and_the_loss():
    assert names_in(make_trainer(), None) == {
        "image": {"image.0.weight", "image.0.bias", "image.1.weight", "image.1.bias"},
        "image_2": {"image_2.weight", "image_2.bias"},
        "text": {"text.bias"},
        "gain": {"gain"},
        "loss": {"loss.scale"},
    }


def test_the_default_components_of_a_wrapper_are_those_of_its_child():
    model = TwoTowers()
    assert list(default_components(nn.Sequential(model))) == [
        "0.gain",
        "0.image",
        "0.image_2",
        "0.text",
    ]
    wrapped = nn.Sequential(nn.Sequential(model))
    assert list(default_components(wrapped, Scaled()))[-2:] == ["0.0.text", "loss"]
    assert list(default_components(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))) == ["0"]
    assert list(default_components(nn.Linear(2, 2))) == ["weight", "bias"]
    assert default_components(nn.ReLU()) == {}


def test_every_count_of_tied_weights_is_the_same():
    trainer = make_trainer()
    sizes = component_sizes(trainer.model, trainer.loss)
    settings = run_settings(trainer)
    every = {id(p): p.numel() for p in [*trainer.model.parameters(), *trainer.loss.parameters()]}
    assert total_size(sizes).parameters == sum(every.values())
    assert sizes["text"].parameters == 2  # its weight is the image tower's
    model, loss = settings["model"], settings["loss"]
    assert model["components"] == {n: s.parameters for n, s in sizes.items() if n != "loss"}
    assert model["parameters"] + loss["parameters"] == total_size(sizes).parameters


def test_a_path_matches_whole_parts_of_names():
    assert "image_2.weight" not in names_in(make_trainer(), ["image"])["image"]
    assert names_in(make_trainer(), ["image.1"]) == {"image.1": {"image.1.weight", "image.1.bias"}}


def test_a_component_may_have_several_paths_and_patterns_of_whole_parts():
    found = names_in(make_trainer(), {"biases": "*.*.bias", "heads": ("image.1", "text")})
    assert found == {
        "biases": {"image.0.bias", "image.1.bias"},
        "heads": {"image.1.weight", "image.1.bias", "text.bias"},
    }


def test_a_component_without_parameters_is_refused_with_a_list_of_names():
    trainer = make_trainer()
    with pytest.raises(ValueError, match=r"'vision'.*begin with gain, image, image_2, text, loss$"):
        find_components(trainer.model, trainer.loss, ["vision"])


def test_a_compiled_model_has_the_names_of_the_bare_one():
    trainer = make_trainer()
    names = list(named_parameters(trainer.model, trainer.loss))
    trainer.model = torch.compile(trainer.model)
    assert list(named_parameters(trainer.model, trainer.loss)) == names
