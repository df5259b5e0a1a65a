"""Walks over modules and their parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diptych.engine.modules import known_buffers, known_parameters, parts_of


class Shared(nn.Module):
    """Has parts and parameters that occur twice, none, and one under a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.again = self.first
        self.nothing = None
        self.register_module("none", None)
        self.tied = nn.Linear(2, 2, bias=False)
        self.tied.weight = self.first[0].weight
        self.scale = nn.Parameter(torch.ones(()))


def identities(objects: object) -> list[int]:
    return [id(one) for one in objects]


def test_parts_and_parameters_are_those_of_torch_in_its_order():
    for module in (Shared(), nn.Identity(), nn.ModuleList([Shared(), nn.ModuleDict()])):
        assert identities(parts_of(module)) == identities(module.modules())
        assert identities(known_parameters().of(module)) == identities(module.parameters())


def test_what_several_modules_share_is_found_once():
    module, other = Shared(), nn.Parameter(torch.ones(()))
    both = nn.ModuleList([module, module.tied])
    expected = [*both.parameters(), other]
    found = known_parameters().of(module, module.tied, others=[*expected[::-1]])
    assert identities(found) == identities(expected)


def replaced(module: Shared) -> None:
    module.first[0].bias = nn.Parameter(torch.zeros(2))


def removed(module: Shared) -> None:
    del module.tied.weight


def moved(module: Shared) -> None:
    module.tied.scale = module.scale
    del module.scale


def written_into_the_dictionaries(module: Shared) -> None:
    module.first._modules["0"]._parameters["weight"] = nn.Parameter(torch.zeros(2, 2))


CHANGES = {
    "a part is added at the bottom": lambda m: m.first[1].add_module("inner", nn.Linear(1, 1)),
    "a part is inserted": lambda m: m.first.insert(0, nn.Linear(2, 2)),
    "a part is replaced": lambda m: setattr(m, "first", nn.Linear(2, 2)),
    "a part is removed": lambda m: delattr(m, "tied"),
    "a parameter is added": lambda m: m.first[1].register_parameter(
        "new", nn.Parameter(torch.ones(1))
    ),
    "an absent parameter is set": lambda m: setattr(m.tied, "bias", nn.Parameter(torch.zeros(2))),
    "a parameter is replaced": replaced,
    "a parameter is removed": removed,
    "a parameter is moved to another part": moved,
    "a parameter is written into the dictionary": written_into_the_dictionaries,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_known_parameters_follow_every_change_of_the_modules(change):
    module, known = Shared(), known_parameters()
    assert known.of(module) is known.of(module)
    change(module)
    assert identities(known.of(module)) == identities(module.parameters())


def test_known_parameters_follow_another_root():
    module, known = Shared(), known_parameters()
    known.of(module)
    assert identities(known.of(module.tied)) == identities(module.tied.parameters())


BUFFER_CHANGES = {
    "a buffer is added": lambda m: m.tied.register_buffer("new", torch.ones(1)),
    "a buffer is replaced": lambda m: setattr(m.norm, "running_mean", torch.ones(2)),
    "a buffer is removed": lambda m: delattr(m.norm, "running_mean"),
    "a part with buffers is added": lambda m: m.add_module("other", nn.BatchNorm1d(2)),
}


@pytest.mark.parametrize("change", BUFFER_CHANGES.values(), ids=BUFFER_CHANGES)
def test_known_buffers_follow_every_change_of_the_modules(change):
    module, known = Shared(), known_buffers()
    module.norm = nn.BatchNorm1d(2)
    assert known.of(module) is known.of(module)
    change(module)
    assert identities(known.of(module)) == identities(module.buffers())
