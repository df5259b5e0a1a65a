"""Errors for keyword arguments that a function does not have, which name the right one."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def names_the_right_argument(others: Mapping[str, str]) -> Callable[[Function], Function]:
    """Return a decorator: an unknown keyword raises a `TypeError` with the way out.

    Args:
        others: names that users of other trainers type, each with the argument that the function
            has instead, or with a sentence.
    """

    def decorate(function: Function) -> Function:
        own = [name for name in inspect.signature(function).parameters if name != "self"]

        @wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            for name in keywords:
                if name not in own:
                    raise TypeError(_message(function, name, own, others))
            return function(*arguments, **keywords)

        return cast("Function", call)

    return decorate


def _message(
    function: Callable[..., Any], name: str, own: list[str], others: Mapping[str, str]
) -> str:
    near = difflib.get_close_matches(name, own, n=1)
    way_out = others.get(name, near[0] if near else "")
    if way_out in own:
        way_out = f"Pass {way_out}= instead"
    called = function.__qualname__.removesuffix(".__init__").split(".")[-1]
    message = f"the arguments of {called} must be among {', '.join(own)}, got {name}. {way_out}"
    return message.rstrip(". ")


_EPOCHS = ("epochs", "num_epochs", "n_epochs", "max_epoch", "num_train_epochs", "epoch")
_ITERATIONS = (
    *("max_steps", "steps", "num_steps", "total_steps", "train_steps"),
    *("max_iterations", "iterations", "num_iterations", "max_iter", "num_iters", "iters"),
)
_PER_EPOCH = ("steps_per_epoch", "iters_per_epoch", "limit_train_batches")
_LOADER = ("loader", "dataloader", "train_loader", "train_dataloader", "train_dataloaders")
_ELSEWHERE = {
    **dict.fromkeys(
        ("val_loader", "val_dataloader", "val_dataloaders", "eval_dataset", "validation_data"),
        "Attach Evaluation(loader) to the trainer",
    ),
    **dict.fromkeys(("callbacks", "handlers"), "Attach handlers with trainer.attach(handler, ...)"),
    **dict.fromkeys(
        ("ckpt_path", "resume", "resume_from_checkpoint"),
        "Attach a CheckpointManager, which resumes",
    ),
    **dict.fromkeys(
        ("check_val_every_n_epoch", "val_check_interval", "eval_steps", "eval_every"),
        "Attach Evaluation(loader, every=...) to the trainer",
    ),
    **dict.fromkeys(("fast_dev_run", "dry_run"), "Call trainer.dry_run(loader)"),
    "overfit_batches": "Call trainer.overfit(loader, batches=...)",
    "num_sanity_val_steps": "Attached evaluations try their first batch when the run starts",
    **dict.fromkeys(
        ("scheduler", "lr_scheduler", "schedulers"), "Attach LearningRate(...) to the trainer"
    ),
    **dict.fromkeys(("lr", "learning_rate", "weight_decay"), "Pass it to the optimizer"),
    **dict.fromkeys(("warmup", "warmup_steps"), "Attach LearningRate(warmup=...) to the trainer"),
    **dict.fromkeys(
        ("batch_size", "num_workers", "shuffle", "dataset", "train_dataset", "collate_fn"),
        "The loader has it: SeededLoader(dataset, batch_size=...)",
    ),
    **dict.fromkeys(("metrics", "compute_metrics"), "Attach Evaluation(loader, metrics=[...])"),
    **dict.fromkeys(
        ("patience", "early_stopping"), "Attach EarlyStopping(metric=..., patience=...)"
    ),
    **dict.fromkeys(("ema", "ema_decay"), "Attach WeightAverage(decay=...)"),
    **dict.fromkeys(("ddp", "distributed", "num_nodes"), "Start the script with torchrun"),
    "gradient_checkpointing": "Switch it on in the model",
    "profiler": "Attach Profile(directory)",
    "max_time": "Add Ignite's TimeLimit(seconds) to Events.ITERATION_COMPLETED",
    **dict.fromkeys(
        ("gradient_clip_val", "max_grad_norm", "clip_grad_norm"),
        "Attach GradientClipping(max_norm=...) to the trainer",
    ),
    **dict.fromkeys(
        ("logger", "loggers", "report_to"), "Attach a sink, such as TensorBoard(directory)"
    ),
    **dict.fromkeys(
        ("default_root_dir", "output_dir", "save_dir", "log_dir", "run_dir"),
        "Attach default_handlers(directory)",
    ),
}

_OF_TRAINER = {
    **dict.fromkeys(("criterion", "loss_fn", "loss_function"), "loss"),
    **dict.fromkeys(("optim", "optimizers"), "optimizer"),
    **dict.fromkeys(("accelerator", "devices", "gpus", "cuda"), "device"),
    **dict.fromkeys(("amp", "fp16", "bf16", "mixed_precision", "use_amp"), "precision"),
    **dict.fromkeys(
        ("accumulate_grad_batches", "gradient_accumulation_steps", "micro_batch_size"),
        "microbatch_size",
    ),
    **dict.fromkeys(("strategy", "fsdp"), "shard"),
    **dict.fromkeys(("log_every_n_steps", "logging_steps"), "log_every"),
}
_OWN_OF_TRAINER = (
    *("model", "loss", "optimizer", "task", "transform", "precision", "microbatch_size"),
    *("device", "prefetch", "compile", "seed", "log_every", "shard", "step"),
)

FOR_RUN = {
    **{name: f"Pass {name}= to Trainer" for name in _OWN_OF_TRAINER},
    **{other: f"Pass {name}= to Trainer" for other, name in _OF_TRAINER.items()},
    **dict.fromkeys(_EPOCHS, "max_epochs"),
    **dict.fromkeys(_ITERATIONS, "max_iters"),
    **dict.fromkeys(_PER_EPOCH, "epoch_length"),
    **dict.fromkeys(_LOADER, "data"),
    **_ELSEWHERE,
}
"""What other trainers call the arguments of `run`, and what they take besides."""

FOR_TRAINER = {
    **dict.fromkeys(
        ("max_epochs", *_EPOCHS), "Pass it to the run: trainer.run(loader, max_epochs=...)"
    ),
    **dict.fromkeys(
        ("max_iters", *_ITERATIONS), "Pass it to the run: trainer.run(loader, max_iters=...)"
    ),
    **dict.fromkeys(
        ("epoch_length", *_PER_EPOCH), "Pass it to the run: trainer.run(loader, epoch_length=...)"
    ),
    **dict.fromkeys(_LOADER, "Pass it to the run: trainer.run(loader, max_epochs=...)"),
    **_OF_TRAINER,
    **_ELSEWHERE,
}
"""What other trainers call the arguments of `Trainer`, and what they take besides."""
