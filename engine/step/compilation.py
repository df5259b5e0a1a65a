"""Compiles a model in place, and keeps what CUDA graphs would write over."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diptych.engine.containers import map_leaves

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
"""A mode of `torch.compile`."""

WITH_CUDA_GRAPHS = {"reduce-overhead", "max-autotune"}


def uses_cuda_graphs(device: torch.device, *, how: bool | CompileMode) -> bool:
    """Say whether a model that is compiled so runs as CUDA graphs."""
    return device.type == "cuda" and how in WITH_CUDA_GRAPHS


def compile_in_place(model: nn.Module, device: torch.device, *, how: bool | CompileMode) -> None:
    """Compile the call of a model; its state-dict keys stay.

    A CUDA graph has its results in the same memory each time it runs. They are copied out of it:
    an update in pieces, an evaluation and the handlers keep the results of several calls.

    Args:
        model: whose copies are not compiled.
        device: where the model runs.
        how: False does nothing; True is the mode "default".
    """
    if how is False or model._compiled_call_impl is not None:  # noqa: SLF001 - a replica's model
        return
    model.compile(mode="default" if how is True else how)
    if uses_cuda_graphs(device, how=how):
        call = model._compiled_call_impl  # noqa: SLF001 - what Module.compile sets, and copies drop
        assert call is not None
        model._compiled_call_impl = _copying(call)  # noqa: SLF001


def _copying(call: Callable[..., Any]) -> Callable[..., Any]:
    def copied(*arguments: Any, **keywords: Any) -> Any:
        return map_leaves(call(*arguments, **keywords), _copy)

    return copied


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def keep_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Copy gradients that a backward pass may have left in the memory of a CUDA graph."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()
