"""Components: named parts of a model and its loss, their parameters and sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from diptych.engine.modules import named_parameters
from diptych.engine.name_patterns import matches

Components = Mapping[str, str | Sequence[str]] | Sequence[str]
"""Names of components with the paths of their parameters; a path alone is its own name.

A path is the beginning of a parameter's name, in whole parts: "image.blocks" matches
"image.blocks.0.weight" and not "image.blocks_2.weight". A part may contain wildcards:
"image.blocks.*.attention". Names of the loss's parameters begin with "loss".
"""


class ComponentSize(NamedTuple):
    """Numbers of parameters: all, and the trainable ones."""

    parameters: int
    trainable: int


def default_components(
    model: nn.Module, loss: nn.Module | None = None
) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of the default components, by name; a shared one is in the first only.

    They are each child of the model, each parameter of the model itself, and the loss. If the model
    is only a wrapper (one child with children, and no parameters), those of its child are taken
    instead, with the child's name in front: "model.image".
    """
    named = named_parameters(model, None)
    prefix = _wrapper_prefix(list(named))
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        child = name.removeprefix(prefix).partition(".")[0]
        found.setdefault(prefix + child, []).append(parameter)
    of_loss = [p for name, p in named_parameters(model, loss).items() if name not in named]
    return {**found, "loss": of_loss} if of_loss else found


def _wrapper_prefix(names: Sequence[str]) -> str:
    """Return the longest prefix "a.b." of all names behind which there is still a module."""
    prefix = ""
    while names:
        first, dot, _ = names[0].partition(".")
        inside = [name.removeprefix(first + dot) for name in names]
        shared = dot and all(name.startswith(first + dot) for name in names)
        if not shared or not any("." in name for name in inside):
            break
        prefix, names = prefix + first + dot, inside
    return prefix


def component_sizes(model: nn.Module, loss: nn.Module | None = None) -> dict[str, ComponentSize]:
    """Return the number of parameters of each default component; a shared one counts once."""
    return {
        name: ComponentSize(
            sum(p.numel() for p in parameters),
            sum(p.numel() for p in parameters if p.requires_grad),
        )
        for name, parameters in default_components(model, loss).items()
    }


def model_and_loss_sizes(
    model: nn.Module, loss: nn.Module
) -> tuple[dict[str, ComponentSize], ComponentSize]:
    """Return the sizes of the model's components, and that of the loss.

    A run's number of parameters is the sum of the first: the loss's own, such as a temperature, are
    counted apart. A parameter of both counts for the model.
    """
    sizes = component_sizes(model, loss)
    of_loss = sizes.pop("loss", ComponentSize(0, 0))
    return sizes, of_loss


def total_size(sizes: Mapping[str, ComponentSize]) -> ComponentSize:
    """Return the sum of sizes."""
    columns = zip(*sizes.values(), strict=True) if sizes else [(), ()]
    return ComponentSize(*(sum(column) for column in columns))


def find_components(
    model: nn.Module, loss: nn.Module, components: Components | None
) -> dict[str, set[int]]:
    """Return the ids of each component's parameters, by the component's name.

    Without components, those of `default_components`.

    Raises:
        ValueError: if a component has no parameter; the message lists the first parts of names.
    """
    if components is None:
        found_by_default = default_components(model, loss)
        return {name: set(map(id, members)) for name, members in found_by_default.items()}
    named = named_parameters(model, loss)
    found: dict[str, set[int]] = {}
    for component, patterns in _with_patterns(components):
        found[component] = {
            id(parameter)
            for name, parameter in named.items()
            if any(matches(name, pattern) for pattern in patterns)
        }
        if not found[component]:
            raise ValueError(
                f"component {component!r} must have parameters, got none that begin with "
                f"{' or '.join(patterns)}; names begin with "
                f"{', '.join(dict.fromkeys(name.partition('.')[0] for name in named))}"
            )
    return found


def _with_patterns(components: Components) -> Iterator[tuple[str, Sequence[str]]]:
    if not isinstance(components, Mapping):
        components = {name: name for name in components}
    for component, patterns in components.items():
        yield component, [patterns] if isinstance(patterns, str) else list(patterns)
