"""The number of parameters of each component of a model and its loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from diptych.engine.modules import named_parameters


class ComponentSize(NamedTuple):
    """Numbers of parameters: all, and the trainable ones."""

    parameters: int
    trainable: int


def component_sizes(model: nn.Module, loss: nn.Module) -> dict[str, ComponentSize]:
    """Return the sizes of the model's top-level parts and of the loss; empty parts are left out."""
    sizes: dict[str, ComponentSize] = {}
    for name, parameter in named_parameters(model, loss).items():
        component, size = name.partition(".")[0], parameter.numel()
        earlier = sizes.get(component, ComponentSize(0, 0))
        trainable = size if parameter.requires_grad else 0
        sizes[component] = ComponentSize(earlier.parameters + size, earlier.trainable + trainable)
    return sizes


def total_size(sizes: dict[str, ComponentSize]) -> ComponentSize:
    """Return the sum of sizes."""
    columns = zip(*sizes.values(), strict=True) if sizes else [(), ()]
    return ComponentSize(*(sum(column) for column in columns))
