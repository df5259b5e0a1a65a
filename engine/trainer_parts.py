"""Checks of the parts that a trainer is built from."""

from __future__ import annotations

import inspect
import warnings

import torch
from torch import nn
from torch.optim import Optimizer

from diptych.engine.distributed.collectives import rank
from diptych.engine.distributed.dtensor import is_sharded
from diptych.engine.tasks import Task


def check_parts(model: nn.Module, loss: nn.Module, optimizer: Optimizer, task: Task) -> None:
    """Check the types of a trainer's parts, and that the optimizer holds their parameters.

    Raises:
        TypeError: if a part has the wrong type.
        ValueError: if the optimizer lacks parameters of the loss, or has no parameter of model or
            loss; or if the loss has a sharded parameter.
    """
    _check_kind("model", model, nn.Module)
    _check_kind("loss", loss, nn.Module)
    _check_kind("optimizer", optimizer, Optimizer)
    if not callable(task):
        raise TypeError(f"task must be a function of model and batch, got {task!r}")
    _check_whole(loss)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, p in _learned(loss) if id(p) not in held]
    if missing:
        raise ValueError(
            f"optimizer must hold the loss's parameters, but lacks {', '.join(missing)}. "
            "Build it with [*model.parameters(), *loss.parameters()]"
        )
    own = {id(p) for _, p in (*_learned(model), *_learned(loss))}
    if own and held.isdisjoint(own):
        raise ValueError(
            "optimizer must hold parameters of the model or the loss, got only others. Build it "
            "from the model that you pass to the trainer, not from a copy of it"
        )


def report_scales(model: nn.Module, loss: nn.Module) -> None:
    """Warn, on rank 0, of logit scales that a training would leave as they are."""
    if rank() == 0:
        _report_two_scales(model, loss)
        _report_half_precision(model, loss)


def _report_two_scales(model: nn.Module, loss: nn.Module) -> None:
    own, other = (
        [(path, p) for path, p in _single(part) if path.endswith("logit_scale")]
        for part in (model, loss)
    )
    if own and other and {id(p) for _, p in other}.isdisjoint(id(p) for _, p in own):
        warnings.warn(
            f"model has a logit scale of its own, {own[0][0]}, but {type(loss).__name__} trains "
            "another: the model's stays as it is, in its export too. For a single scale, call "
            "share_logit_scale(loss, model) before the optimizer is built.",
            stacklevel=5,
        )


def _report_half_precision(model: nn.Module, loss: nn.Module) -> None:
    names = ("logit_scale", "logit_bias")
    scales = [*_single(loss), *(one for one in _single(model) if one[0].endswith(names))]
    half = {
        id(p): path
        for path, p in scales
        if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)
    }
    if half:
        warnings.warn(
            f"{', '.join(half.values())} must be float32 to be trained, got half precision: "
            "small updates are rounded away, and it may never move. Keep parameters in float32; "
            "precision='bf16' computes in bfloat16.",
            stacklevel=5,
        )


def _single(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(path, p) for path, p in module.named_parameters() if p.numel() == 1]


def _check_kind(name: str, part: object, kind: type) -> None:
    if isinstance(part, kind):
        return
    if inspect.isclass(part):
        got, way_out = f"the class {part.__name__}", f"Make an instance: {part.__name__}(...)"
    else:
        text = repr(part)
        got = text if len(text) <= 80 and "\n" not in text else f"a {type(part).__name__}"
        way_out = "The order is Trainer(model, loss, optimizer, task=...)"
    raise TypeError(f"{name} must be a torch {kind.__name__}, got {got}. {way_out}")


def check_needs_no_closure(optimizer: Optimizer) -> None:
    """Check that an optimizer makes an update without a function that evaluates the loss.

    Raises:
        ValueError: if it needs one.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer must make an update without a closure, got {type(optimizer).__name__}, "
            "which evaluates the loss several times per update. Pass a step of your own; the page "
            "on a custom training step (docs/how_to/custom_step.md) shows one"
        )


def _check_whole(loss: nn.Module) -> None:
    shared = [name for name, parameter in loss.named_parameters() if is_sharded(parameter)]
    if shared:
        raise ValueError(
            f"loss must hold whole parameters, got the sharded {', '.join(shared)} of the model. "
            "Pass this loss when the trainer is built: it then leaves them whole"
        )


def _learned(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]
