"""Modules behind their wrappers, and the names of their parameters."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside of data-parallel and compiled wrappers."""
    while True:
        if isinstance(module, (DistributedDataParallel, DataParallel)):
            module = module.module
        elif "_orig_mod" in dict(module.named_children()):
            module = module.get_submodule("_orig_mod")
        else:
            return module


def named_parameters(model: nn.Module, loss: nn.Module | None) -> dict[str, nn.Parameter]:
    """Return the model's parameters by name, then the loss's with the prefix "loss.", each once."""
    pairs = list(unwrapped(model).named_parameters())
    if loss is not None:
        pairs += [(f"loss.{name}", p) for name, p in unwrapped(loss).named_parameters()]
    named: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, parameter in pairs:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            named[name.replace("_orig_mod.", "")] = parameter
    return named
