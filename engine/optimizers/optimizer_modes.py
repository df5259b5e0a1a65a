"""Optimizers with `train()` and `eval()`, such as schedule-free ones: the weights in the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from diptych.engine.distributed.dtensor import local_parts

Mode = Literal["train", "eval"]


class _Inside(NamedTuple):
    """A running context.

    Attributes:
        mode: the mode that it has put the optimizer into.
        trained: copies of the weights that are trained.
    """

    mode: Mode
    trained: list[Tensor]


_INSIDE: WeakKeyDictionary[Optimizer, _Inside] = WeakKeyDictionary()
"""The innermost context of each optimizer."""


def has_modes(optimizer: Optimizer) -> bool:
    """Return whether an optimizer, or a member of it, has `train()` and `eval()`."""
    members = getattr(optimizer, "members", None)
    if members is not None:
        return any(has_modes(member) for member in members)
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def put_into_training_mode(*optimizers: Optimizer) -> None:
    """Let the model hold the weights that are trained."""
    for optimizer in filter(has_modes, optimizers):
        modal: Any = optimizer
        modal.train()


@contextmanager
def evaluation_weights(*optimizers: Optimizer) -> Iterator[None]:
    """Let the model hold the weights that its optimizers evaluate; afterwards the trained ones.

    Nothing happens for an optimizer without `train()` and `eval()`. The weights that are trained
    are restored bit for bit, also after an error. A nested context changes nothing, and functions
    in it may call `eval()` and `train()` themselves.
    """
    with ExitStack() as stack:
        for optimizer in optimizers:
            stack.enter_context(_in_mode(optimizer, "eval"))
        yield


@contextmanager
def trained_weights(*optimizers: Optimizer) -> Iterator[None]:
    """Let the model hold the weights that are trained, as a checkpoint must; see above."""
    with ExitStack() as stack:
        for optimizer in optimizers:
            stack.enter_context(_in_mode(optimizer, "train"))
        yield


@contextmanager
def _in_mode(optimizer: Optimizer, mode: Mode) -> Iterator[None]:
    outer = _INSIDE.get(optimizer)
    if not has_modes(optimizer) or (outer is not None and outer.mode == mode):
        yield
        return
    modal: Any = optimizer
    given, trained = _before_and_trained(modal, outer)
    _INSIDE[optimizer] = _Inside(mode, trained)
    try:
        if mode == "eval":
            modal.eval()
        yield
    finally:
        modal.train()
        _write(optimizer, trained)
        if given is not None:
            modal.eval()
            _write(optimizer, given)
        if outer is None:
            del _INSIDE[optimizer]
        else:
            _INSIDE[optimizer] = outer


def _before_and_trained(
    modal: Any, outer: _Inside | None
) -> tuple[list[Tensor] | None, list[Tensor]]:
    """Put an optimizer into training mode; return copies of the weights before and then.

    The first are None if it was in training mode: `train()` does nothing then.
    """
    given = _copies(modal)
    modal.train()
    if outer is not None:  # `train()` may have rounded
        _write(modal, outer.trained)
    trained = _copies(modal) if outer is None else outer.trained
    return (None if _equal(given, trained) else given), trained


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    held = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    return local_parts(held)


def _copies(optimizer: Optimizer) -> list[Tensor]:
    return [parameter.clone() for parameter in _parameters(optimizer)]


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in pairs)


@torch.no_grad()
def _write(optimizer: Optimizer, values: list[Tensor]) -> None:
    for parameter, value in zip(_parameters(optimizer), values, strict=True):
        parameter.copy_(value)
