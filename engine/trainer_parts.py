"""Checks of the parts that a trainer is built from."""

from __future__ import annotations

import difflib
import inspect
import logging
import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.loss import _Loss
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from diptych.engine import tasks
from diptych.engine.distributed.collectives import rank
from diptych.engine.distributed.dtensor import is_sharded
from diptych.engine.handler import Attachable, Handler
from diptych.engine.name_patterns import listed
from diptych.engine.tasks import KeyedTask, Task

logger = logging.getLogger(__name__)

WAY_TO_SCHEDULE = (
    "A scheduler of torch steps at an event: "
    "trainer.add_event_handler(Events.ITERATION_COMPLETED, scheduler.step)"
)
ORDER = "The order is Trainer(model, loss, optimizer, task=...)"


METHODS = {
    **dict.fromkeys(("fit", "start", "loop"), "run(loader, max_epochs=...)"),
    **dict.fromkeys(
        ("evaluate", "eval", "validate", "test", "validation"),
        "attach(Evaluation(loader, metrics=[...])), or the class Evaluator outside of a run",
    ),
    **dict.fromkeys(
        ("save", "save_checkpoint", "save_model"), "attach(CheckpointManager(directory))"
    ),
    **dict.fromkeys(
        ("load", "load_checkpoint", "resume", "restore"),
        "attach(CheckpointManager(directory)), which resumes, or load_weights(model, path)",
    ),
    **dict.fromkeys(("predict", "encode"), "model.eval() and the model itself, or recipes.Encoder"),
    **dict.fromkeys(("stop", "should_stop", "stop_training"), "terminate()"),
    **dict.fromkeys(("add_handler", "add_callback", "add", "register"), "attach(handler, ...)"),
    **dict.fromkeys(("log", "log_metrics", "log_dict"), "metrics.update({'train/name': value})"),
    **dict.fromkeys(("lr", "learning_rate"), "optimizer.param_groups[0]['lr']"),
    **dict.fromkeys(("current_epoch", "epoch"), "state.epoch"),
    **dict.fromkeys(("global_step", "iteration", "step_count"), "state.iteration"),
}
"""What other trainers have, and what a `Trainer` has instead."""


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
    if _is_loss(model) and not _is_loss(loss):
        raise TypeError(
            f"model must be the model, got the loss {type(model).__name__}, and "
            f"{type(loss).__name__} as the loss. {ORDER}"
        )
    _check_task(task)
    _check_whole(loss)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [n for n, p in _learned(loss) if id(p) not in held]
    if missing:
        raise ValueError(
            f"optimizer must hold the loss's parameters, but lacks {', '.join(missing)}. "
            "Build it with [*model.parameters(), *loss.parameters()]"
        )
    _check_built_from(model, loss, held)


def report_parts(model: nn.Module, loss: nn.Module, optimizer: Optimizer) -> None:
    """Warn, on rank 0, of parts that work and are hardly what was intended.

    These are logit scales and parameters that a training would leave as they are, parameters in
    half precision, and a model inside a wrapper that does the trainer's work a second time.
    """
    if rank() == 0:
        _report_two_scales(model, loss)
        _report_half_precision(model, loss)
        _report_float16(model)
        _report_replaced_parts(model, loss, optimizer)
        _report_wrapper(model)
        _report_frozen(model, loss)


def shown(value: object) -> str:
    """Return a value for an error message: on one line, without addresses and numbers."""
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    text = repr(value)
    short = len(text) <= 80 and "\n" not in text and " at 0x" not in text
    return text if short else f"a {type(value).__name__}"


def _check_task(task: object) -> None:
    if isinstance(task, str):
        names = [name for name, found in vars(tasks).items() if isinstance(found, KeyedTask)]
        near = difflib.get_close_matches(task, names, n=1)
        way_out = f"Pass tasks.{near[0]}" if near else f"There are tasks.{', tasks.'.join(names)}"
    elif isinstance(task, type):
        way_out = f"Make an instance: {task.__name__}()"
    elif callable(task):
        try:
            inspect.signature(task).bind(None, None)
        except TypeError:
            way_out = "It is called as task(model, batch)"
        except ValueError:  # a function without a signature
            return
        else:
            return
    else:
        way_out = "diptych.engine.tasks has the usual ones"
    raise TypeError(f"task must be a function of model and batch, got {shown(task)}. {way_out}")


def _is_loss(module: nn.Module) -> bool:
    return hasattr(module, "couples_samples") or isinstance(module, _Loss)


def _check_built_from(model: nn.Module, loss: nn.Module, held: set[int]) -> None:
    """Check that the optimizer was not built from another model."""
    of_model, of_loss = ({id(p) for _, p in _learned(part)} for part in (model, loss))
    others = held - {id(p) for part in (model, loss) for p in part.parameters()}
    needed = of_model if others and of_model else of_model | of_loss
    if needed and held.isdisjoint(needed):
        raise ValueError(
            "optimizer must hold parameters of the model, got those of another model. Build it "
            "from the model that you pass to the trainer, not from a copy of it"
        )


def _report_replaced_parts(model: nn.Module, loss: nn.Module, optimizer: Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    others = held - {id(p) for part in (model, loss) for p in part.parameters()}
    missing = [name for name, p in _learned(model) if id(p) not in held]
    if others and missing:
        warnings.warn(
            f"optimizer lacks {listed(missing, 4)} of the model, and holds "
            f"{len(others)} parameters that neither model nor loss has: a part was replaced after "
            "the optimizer was built. Build the optimizer last.",
            stacklevel=5,
        )


def _report_frozen(model: nn.Module, loss: nn.Module) -> None:
    scales = _learned(loss)
    has_parameters = next(model.parameters(), None) is not None
    if has_parameters and not _learned(model) and scales and all(p.numel() == 1 for _, p in scales):
        logger.warning(
            "The model is frozen, so only %s of the loss is trained. Set requires_grad_(True) on "
            "what is to learn.",
            ", ".join(name for name, _ in scales),
        )


def _report_wrapper(model: nn.Module) -> None:
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        warnings.warn(
            f"model is wrapped in {type(model).__name__}, and the trainer averages gradients over "
            "ranks too. Pass the module itself, model.module, and start the script with torchrun.",
            stacklevel=5,
        )


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


def _report_float16(model: nn.Module) -> None:
    names = in_float16(model)
    if names:
        warnings.warn(
            f"model has {len(names)} trainable parameters in float16, {names[0]} first. Adam's eps "
            "is 0 in float16, and updates become infinite. Keep parameters in float32, with "
            "model.float(); precision='fp16' or 'bf16' computes in half precision.",
            stacklevel=5,
        )


def in_float16(model: nn.Module) -> list[str]:
    """Return the names of a model's trainable parameters in float16."""
    named = model.named_parameters()
    return [path for path, p in named if p.requires_grad and p.dtype == torch.float16]


def _single(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(path, p) for path, p in module.named_parameters() if p.numel() == 1]


def _check_kind(name: str, part: object, kind: type) -> None:
    if isinstance(part, kind):
        return
    raise TypeError(
        f"{name} must be a torch {kind.__name__}, got {shown(part)}. {_way(name, part)}"
    )


def _way(name: str, part: object) -> str:
    """Return the way out for a part of the wrong type."""
    if inspect.isclass(part):
        return f"Make an instance: {part.__name__}(...)"
    if name == "optimizer":
        if isinstance(part, LRScheduler):
            return f"Pass its optimizer. {WAY_TO_SCHEDULE}"
        if isinstance(part, (list, tuple)):
            return "Join several in a CompositeOptimizer"
    elif inspect.isroutine(part):
        return "Call it in the forward method of a Module"
    if name == "loss" and isinstance(part, str):
        return f"Build it by its name: get_loss({part!r})"
    return ORDER


def check_handler(handler: object, attached: Sequence[object]) -> None:
    """Check that an object can be attached, and is not attached yet: it would act twice.

    Raises:
        TypeError: if it has no `attach`.
        ValueError: if it is a handler of this library that is attached.
    """
    if isinstance(handler, type) or not isinstance(handler, Attachable):
        raise TypeError(
            f"a handler must be an object with attach(trainer), got {shown(handler)}. "
            f"{_way_to_attach(handler)}"
        )
    if isinstance(handler, Handler) and any(one is handler for one in attached):
        raise ValueError(
            f"a handler must be attached once, got {shown(handler)} again. Make another instance, "
            "or leave out the second attach"
        )


def _way_to_attach(handler: object) -> str:
    """Return the way out for an object that is not a handler."""
    if isinstance(handler, type):
        return f"Make an instance: {handler.__name__}(...)"
    if isinstance(handler, (list, tuple)):
        return "Unpack several handlers: trainer.attach(*handlers)"
    if isinstance(handler, LRScheduler):
        return f"{WAY_TO_SCHEDULE}, and LearningRate(...) is a handler"
    if str(getattr(handler, "__module__", "")).startswith("diptych.") and callable(handler):
        return "Call it, and unpack what it returns: trainer.attach(*function(...))"
    return "For a function, use trainer.add_event_handler(event, function)"


def check_can_move(module: nn.Module, device: torch.device) -> None:
    """Check that a module can be moved to a device.

    Raises:
        ValueError: if this machine lacks the device, or the module has no values to move.
    """
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device must be one that this process has, got {device}, and torch finds no CUDA "
            "device. Without device= the trainer takes what there is"
        )
    empty = [name for name, p in module.named_parameters() if p.is_meta]
    if empty:
        raise ValueError(
            f"model must have values, got {len(empty)} parameters on the meta device, such as "
            f"{empty[0]}. Call model.to_empty(device=...), and load or initialise its weights"
        )


def check_needs_no_closure(optimizer: Optimizer, error: Exception | None = None) -> None:
    """Check that an optimizer makes an update without a function that evaluates the loss.

    Some refuse only in `step`; the error is the one that it has raised.

    Raises:
        ValueError: if it needs one.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is None or (closure.default is not inspect.Parameter.empty and not _misses(error)):
        return
    raise ValueError(
        f"optimizer must make an update without a closure, got {type(optimizer).__name__}, "
        "which evaluates the loss several times per update. Pass a step of your own; the page "
        "on a custom training step (docs/how_to/custom_step.md) shows one"
    ) from error


def _misses(error: Exception | None) -> bool:
    """Return whether an error says that a closure is missing; that of a bare `assert` is empty."""
    text = str(error)
    bare = isinstance(error, AssertionError) and not text
    called = isinstance(error, TypeError) and "'NoneType' object is not callable" in text
    return bare or called or "closure" in text.lower()


def _check_whole(loss: nn.Module) -> None:
    shared = [name for name, parameter in loss.named_parameters() if is_sharded(parameter)]
    if shared:
        raise ValueError(
            f"loss must hold whole parameters, got the sharded {', '.join(shared)} of the model. "
            "Pass this loss when the trainer is built: it then leaves them whole"
        )


def _learned(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]
