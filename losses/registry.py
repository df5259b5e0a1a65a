"""Registry of losses by name, so that a flag or a settings file can choose one."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import TypeVar

from torch import nn

LossClass = TypeVar("LossClass", bound=type[nn.Module])

_REGISTERED: dict[str, type[nn.Module]] = {}
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_FAMILIES = (
    "combine",
    "contrastive",
    "distillation",
    "multimodal",
    "self_supervised",
    "supervised",
)
"""The packages of `diptych.losses` whose modules register losses."""


class UnknownLossError(ValueError):
    """The requested loss name is not registered."""


def register_loss(name: str) -> Callable[[LossClass], LossClass]:
    """Register a loss class under a name, as a decorator.

    A class of the same name and module, as of a notebook's cell that is run again, replaces it.

    Args:
        name: Lower-case letters, digits and underscores, such as ``"clip"``.

    Returns:
        A decorator that registers the class and returns it unchanged.

    Raises:
        ValueError: If the name is malformed, or taken by another class.
        TypeError: If the decorated object is not a subclass of ``torch.nn.Module``.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"name must be lower case with underscores, such as 'clip', got {name!r}")

    def register(loss: LossClass) -> LossClass:
        if not (isinstance(loss, type) and issubclass(loss, nn.Module)):
            raise TypeError(
                f"@register_loss({name!r}) must decorate an nn.Module class, got {loss!r}"
            )
        if not loss.__module__.startswith("diptych.losses."):
            _import_families()  # to refuse the names of the library here
        holder = _REGISTERED.setdefault(name, loss)
        again = (loss.__module__, loss.__qualname__) == (holder.__module__, holder.__qualname__)
        if again:  # a notebook's cell, or a module, is run a second time
            _REGISTERED[name] = loss
        else:
            raise ValueError(
                f"name {name!r} is taken by {holder.__module__}.{holder.__qualname__}."
                f" Register {loss.__qualname__} under another name."
            )
        return loss

    return register


def get_loss_class(name: str) -> type[nn.Module]:
    """Return the class registered under a name.

    Raises:
        UnknownLossError: If the name is unknown; the message lists close names, or all of them.
        TypeError: If it is not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, such as 'clip', got {name!r}. Call a class itself")
    if name not in _REGISTERED:
        _import_families()
    if name not in _REGISTERED:
        close = difflib.get_close_matches(name, _REGISTERED, n=3, cutoff=0.5)
        hint = f"Did you mean {_listed(close)}?" if close else f"Known: {_listed(_REGISTERED)}."
        raise UnknownLossError(f"unknown loss {name!r}. {hint}")
    return _REGISTERED[name]


def get_loss(name: str, **arguments: object) -> nn.Module:
    """Build a registered loss by name.

    Args:
        name: A name of ``available_losses()``.
        **arguments: The constructor's keyword arguments.

    Returns:
        The loss, an ``nn.Module``.

    Raises:
        UnknownLossError: If the name is unknown.
        TypeError: If an argument is unknown, or a required one is missing.
    """
    loss = get_loss_class(name)
    accepted = {
        parameter.name: parameter
        for parameter in inspect.signature(loss).parameters.values()
        if parameter.kind not in {parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL}
    }
    for argument in arguments:
        if argument not in accepted:
            close = difflib.get_close_matches(argument, accepted, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise TypeError(
                f"loss {name!r} takes no argument {argument!r}{hint}. It takes {_listed(accepted)}."
            )
    for parameter in accepted.values():
        required = parameter.default is inspect.Parameter.empty
        if required and parameter.name not in arguments:
            raise TypeError(f"loss {name!r} needs the argument {parameter.name!r}")
    return loss(**arguments)


def available_losses() -> dict[str, str]:
    """Return every registered name with one line, sorted by name.

    The line is the first of the class's own docstring, or the name of a class without one.
    """
    _import_families()
    return {
        name: inspect.cleandoc(loss.__doc__ or "").partition("\n")[0] or loss.__qualname__
        for name, loss in sorted(_REGISTERED.items())
    }


@cache
def _import_families() -> None:
    """Import every module that registers losses, which `import diptych.losses` does not do."""
    for family in _FAMILIES:
        package = importlib.import_module(f"diptych.losses.{family}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


def _listed(names: Iterable[str]) -> str:
    """Return names, quoted and joined by commas."""
    return ", ".join(repr(name) for name in names) or "none"
