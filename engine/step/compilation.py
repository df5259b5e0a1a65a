"""Compilation of a model in place, with copies of results that CUDA graphs would overwrite."""

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
    """Say whether a compiled model runs as CUDA graphs."""
    return device.type == "cuda" and how in WITH_CUDA_GRAPHS


def compile_in_place(model: nn.Module, device: torch.device, *, how: bool | CompileMode) -> None:
    """Compile a model's `__call__`; its state-dict keys stay the same.

    A CUDA graph writes its results to the same memory in each call. They are copied out of it,
    because an update in pieces, an evaluation and handlers keep the results of several calls.
    Copies of the model are not compiled. If `how` is True, the mode is "default".
    """
    if how is False or model._compiled_call_impl is not None:  # noqa: SLF001 - compiled by another trainer
        return
    model.compile(mode="default" if how is True else how)
    if uses_cuda_graphs(device, how=how):
        call = model._compiled_call_impl  # noqa: SLF001 - set by Module.compile, dropped by copies
        assert call is not None
        model._compiled_call_impl = _copying(call)  # noqa: SLF001


def _copying(call: Callable[..., Any]) -> Callable[..., Any]:
    def copied(*arguments: Any, **keywords: Any) -> Any:
        results = call(*arguments, **keywords)
        return map_leaves(results, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)

    return copied


def keep_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Copy gradients out of the memory of a CUDA graph, which the next backward pass overwrites."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()
