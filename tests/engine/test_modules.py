"""Walks over modules and their parameters."""

from __future__ import annotations

import torch
from torch import nn

from diptych.engine.modules import parameters_of, parts_of


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
        assert identities(parameters_of(module)) == identities(module.parameters())


def test_what_several_modules_share_is_found_once():
    module = Shared()
    both = nn.ModuleList([module, module.tied])
    assert identities(parameters_of(module, module.tied)) == identities(both.parameters())
