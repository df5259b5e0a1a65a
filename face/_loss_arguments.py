"""Which outputs of a task a loss gets in their order, and which by name.

Imports nothing of the library, so that losses and engine can both use it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")

TEACHER = "teacher_"
"""The beginning of the names of a teacher's outputs, which a loss takes by name or not at all."""

ALL = "outputs"
"""The name of the `**` argument of a function that gets every output by name."""

Arguments = tuple[list[str], list[str]]
"""The names of the outputs that are passed in their order, and of those that are by name."""


def call_with(function: Callable[..., T], outputs: Mapping[str, Tensor]) -> T:
    """Call a loss, or a method of a loss, with the task's outputs.

    Outputs are passed in their order. One that has the name of an optional argument is passed by
    name. An output of a teacher is left out unless the function has an argument of its name. A
    function with an argument `**outputs` gets all by name.

    Raises:
        TypeError: if there are too few or too many outputs for the function's arguments.
    """
    in_order, by_name = arguments_of(written(function), tuple(outputs))
    named = {name: outputs[name] for name in by_name} if by_name else {}
    try:
        return function(*map(outputs.__getitem__, in_order), **named)
    except TypeError as error:
        if takes(function, in_order, by_name):
            raise
        arguments, too_few = misfit(function, len(in_order))
        way_out = (
            "Return the missing ones too, or choose a loss that needs fewer."
            if too_few
            else "Leave the others out. An optional one must have the name of its argument."
        )
        raise TypeError(
            f"task must return outputs for the arguments of {arguments}, got "
            f"{', '.join(outputs) or 'none'}. {way_out}"
        ) from error


def takes(function: Callable[..., Any], in_order: Iterable[Any], by_name: Iterable[str]) -> bool:
    """Return whether a function can be called with so many arguments, and those by name."""
    # The signature of a module is that of its `__call__`, which takes anything.
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        inspect.signature(called).bind(*in_order, **dict.fromkeys(by_name))
    except TypeError:
        return False
    except ValueError:  # not written in Python
        return True
    return True


def misfit(function: Callable[..., Any], given: int) -> tuple[str, bool]:
    """Return a loss with its arguments in words, and whether `given` are too few for them."""
    required, optional = _names(written(function), ()) or ((), ())
    loss = getattr(function, "__self__", function)
    name = type(loss).__name__ if isinstance(loss, nn.Module) else getattr(loss, "__name__", "it")
    others = f" (optional: {', '.join(optional)})" if optional else ""
    return f"{name}: {', '.join(required)}{others}", given < len(required)


def written(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as it was written, without the object to which it is bound."""
    found: Any = function.forward if isinstance(function, nn.Module) else function
    plain: Callable[..., Any] = getattr(found, "__func__", found)
    return plain


@lru_cache(maxsize=64)
def arguments_of(function: Callable[..., Any], outputs: tuple[str, ...]) -> Arguments:
    """Return how a loss gets the outputs of a task."""
    names = _names(function, outputs)
    if names is None:
        return list(outputs), []
    by_name = [name for name in names[1] if name in outputs]
    others = (name for name in outputs if name not in by_name)
    return [name for name in others if not name.startswith(TEACHER)], by_name


@lru_cache(maxsize=64)
def arguments_of_parts(
    functions: tuple[Callable[..., Any], ...], outputs: tuple[str, ...]
) -> list[Arguments]:
    """Return how each of the losses that share the outputs of a task gets them.

    A loss whose required arguments all have the names of outputs gets these by name. What one gets
    by name, another one gets in order only if it would otherwise lack a required argument.
    """
    required = [(_names(function, outputs) or ((), ()))[0] for function in functions]
    found = [_arguments_of_part(function, outputs) for function in functions]
    for index, (in_order, by_name) in enumerate(found):
        others = {name for part in (*found[:index], *found[index + 1 :]) for name in part[1]}
        found[index] = _without(others, in_order, len(required[index])), by_name
    return found


def _arguments_of_part(function: Callable[..., Any], outputs: tuple[str, ...]) -> Arguments:
    required, optional = _names(function, outputs) or ((), ())
    if required and {*required} <= {*outputs}:
        return [], [name for name in outputs if name in (*required, *optional)]
    return arguments_of(function, outputs)


def untaken(parts: list[Arguments], outputs: tuple[str, ...]) -> list[str]:
    """Return the outputs that no loss gets, without those of a teacher."""
    taken = {name for part in parts for names in part for name in names}
    return [name for name in outputs if name not in taken and not name.startswith(TEACHER)]


def _without(others: set[str], in_order: list[str], required: int) -> list[str]:
    """Leave out what other losses get by name, if the required arguments remain."""
    free = [name for name in in_order if name not in others]
    if len(free) >= required:
        return free if required else in_order
    return in_order[:required] + [name for name in in_order[required:] if name in free]


def _names(
    function: Callable[..., Any], outputs: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Return the names of required arguments, and of those by which outputs are passed.

    None: the function takes any number of arguments, or is not written in Python.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    kinds = {name: one.kind for name, one in parameters.items()}
    if kinds.get(ALL) is inspect.Parameter.VAR_KEYWORD:
        return (), outputs
    if inspect.Parameter.VAR_POSITIONAL in kinds.values():
        return None
    required, optional = list[str](), list[str]()
    for name, one in parameters.items():
        if one.default is not inspect.Parameter.empty or name.startswith(TEACHER):
            optional.append(name)
        elif one.kind is not inspect.Parameter.VAR_KEYWORD and name != "self":
            required.append(name)
    return tuple(required), tuple(optional)
