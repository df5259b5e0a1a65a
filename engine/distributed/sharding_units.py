"""The units of a sharded model: the modules whose parameters are gathered together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from diptych.engine.modules import unwrapped
from diptych.engine.name_patterns import matches, near_matches
from diptych.engine.settings import Units

ParameterSlot = tuple[nn.Module, str, nn.Parameter]
"""A module, the name of an attribute, and the parameter in it."""


def find_units(model: nn.Module, shard: Units) -> list[str]:
    """Return the paths of the modules whose parameters are gathered together, parents first.

    Args:
        model: its parameters outside of all units are gathered for a whole forward pass.
        shard: True: each element of each `nn.ModuleList`, and of each `nn.Sequential` whose
            elements are all of one class. Or patterns of paths, with wildcards inside a part of a
            path: "image.blocks.*".

    Raises:
        ValueError: if a pattern matches nothing, or a module that is not called itself.
    """
    modules = {path: part for path, part in unwrapped(model).named_modules() if path}
    if isinstance(shard, bool):
        elements = set(_elements(unwrapped(model)))
        return [path for path in modules if path in elements and _is_called(modules[path])]
    found = {path for pattern in shard for path in _named(modules, pattern)}
    return [path for path in modules if path in found]


def _elements(model: nn.Module) -> Iterator[str]:
    """Yield the paths of the elements of all sequences."""
    for path, part in model.named_modules():
        if _is_sequence(part):
            yield from (f"{path}.{name}".lstrip(".") for name, _ in part.named_children())


def _is_sequence(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList):
        return True
    parts = list(module.children()) if isinstance(module, nn.Sequential) else []
    return len(parts) > 1 and len({type(part) for part in parts}) == 1


def _is_called(module: nn.Module) -> bool:
    is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    return not is_list and any(True for _ in module.parameters())


def _named(modules: Mapping[str, nn.Module], pattern: str) -> list[str]:
    """Return the paths that match a pattern."""
    depth = pattern.count(".")
    named = [path for path in modules if path.count(".") == depth and matches(path, pattern)]
    if not named:
        raise ValueError(
            f"shard must name modules of the model, got {pattern!r}, which matches none; "
            f"{near_matches(pattern, modules)}"
        )
    for path in named:
        if not _is_called(modules[path]):
            raise ValueError(
                f"shard must name modules that are called and have parameters, got {path!r}, a "
                f"{type(modules[path]).__name__}. Name its elements: {path + '.*'!r}."
            )
    return named


def slots_by_unit(model: nn.Module, units: Sequence[str]) -> Mapping[str, list[ParameterSlot]]:
    """Return the slots of the parameters of each unit, and under "" those outside of all units.

    Raises:
        ValueError: if a parameter belongs to two units.
    """
    slots: defaultdict[str, list[ParameterSlot]] = defaultdict(list)
    first: dict[int, tuple[str, str]] = {}
    for path, module in unwrapped(model).named_modules():
        unit = max((u for u in units if f"{path}.".startswith(f"{u}.")), key=len, default="")
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            own = f"{path}.{name}".lstrip(".")
            other, before = first.setdefault(id(parameter), (unit, own))
            if other != unit and parameter.ndim:
                raise ValueError(
                    f"a parameter must belong to one unit, got {own} of {unit or 'no unit'}, which "
                    f"is {before} of {other or 'no unit'} too. Choose shard patterns that put both "
                    "in one unit, or in none."
                )
            slots[unit].append((module, name, parameter))
    return slots
