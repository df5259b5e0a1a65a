"""The registry of losses: a name for each, so that a flag or a settings file can choose one."""

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
_FAMILIES = ("combine", "contrastive", "multimodal", "supervised")
"""The packages of `diptych.losses` whose modules register losses."""


class UnknownLossError(ValueError):
    """A loss was asked for under a name that nobody registered."""


def register_loss(name: str) -> Callable[[LossClass], LossClass]:
    """Register a loss class under a name, as a decorator.

    Args:
        name: Lower-case letters, digits and underscores, such as ``"clip"``.

    Returns:
        A decorator that registers the class and returns it unchanged.

    Raises:
        ValueError: If the name is malformed, or another class already holds it.
        TypeError: If what is decorated is no subclass of ``torch.nn.Module`` or has no docstring.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"a loss name is lower case with underscores, such as 'clip'; got {name!r}"
        )

    def register(loss: LossClass) -> LossClass:
        if not (isinstance(loss, type) and issubclass(loss, nn.Module)):
            raise TypeError(f"@register_loss({name!r}) decorates an nn.Module class, got {loss!r}")
        if not loss.__doc__:
            raise TypeError(
                f"{loss.__qualname__} needs a docstring: its first line is what"
                f" available_losses() shows for {name!r}"
            )
        if not loss.__module__.startswith("diptych.losses."):
            _import_families()  # so that a name which the library holds is refused here
        holder = _REGISTERED.setdefault(name, loss)
        if holder is not loss:
            raise ValueError(
                f"the loss name {name!r} is taken by {holder.__module__}.{holder.__qualname__};"
                f" register {loss.__qualname__} under another name"
            )
        return loss

    return register


def get_loss_class(name: str) -> type[nn.Module]:
    """Return the class registered under a name.

    Raises:
        UnknownLossError: If the name is unknown; the message lists close names, or all of them.
    """
    if name not in _REGISTERED:
        _import_families()
    if name not in _REGISTERED:
        close = difflib.get_close_matches(name, _REGISTERED, n=3, cutoff=0.5)
        hint = f"did you mean {_listed(close)}?" if close else f"known: {_listed(_REGISTERED)}"
        raise UnknownLossError(f"unknown loss {name!r}; {hint}")
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
        TypeError: If the constructor does not take one of the arguments, or lacks a required one.
    """
    loss = get_loss_class(name)
    accepted = {
        parameter.name: parameter
        for parameter in inspect.signature(loss).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    for argument in arguments:
        if argument not in accepted:
            close = difflib.get_close_matches(argument, accepted, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise TypeError(
                f"loss {name!r} takes no argument {argument!r}{hint}; it takes {_listed(accepted)}"
            )
    for parameter in accepted.values():
        required = parameter.default is inspect.Parameter.empty
        if required and parameter.name not in arguments:
            raise TypeError(f"loss {name!r} needs the argument {parameter.name!r}")
    return loss(**arguments)


def available_losses() -> dict[str, str]:
    """Return every registered name with the first line of its class's docstring, sorted by name."""
    _import_families()
    return {
        name: (inspect.getdoc(loss) or "").splitlines()[0]
        for name, loss in sorted(_REGISTERED.items())
    }


@cache
def _import_families() -> None:
    """Import every module that registers losses; they are not imported with the package."""
    for family in _FAMILIES:
        package = importlib.import_module(f"diptych.losses.{family}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")


def _listed(names: Iterable[str]) -> str:
    """Return names, quoted and joined by commas."""
    return ", ".join(repr(name) for name in names) or "none"
