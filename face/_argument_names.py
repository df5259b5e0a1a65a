"""Errors for arguments that a function does not take, which name the right ones.

Imports nothing of the library, so that losses, engine and handlers can all use it.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])

SYNONYMS: dict[str, tuple[str, ...]] = {
    # Trainer and its run
    "loss": ("criterion", "loss_fn", "loss_function"),
    "optimizer": ("optim", "optimizers"),
    "device": ("accelerator", "devices", "gpus", "cuda", "n_gpu", "local_rank"),
    "precision": ("amp", "fp16", "bf16", "half", "dtype", "mixed_precision", "use_amp"),
    "microbatch_size": (
        *("accumulate_grad_batches", "gradient_accumulation_steps", "micro_batch_size"),
        *("grad_accum", "accumulation_steps", "accum_freq", "micro_batch"),
    ),
    "shard": ("strategy", "fsdp"),
    "compile": ("torch_compile",),
    "log_every": ("log_every_n_steps", "logging_steps", "log_interval", "print_freq"),
    "max_epochs": ("epochs", "num_epochs", "n_epochs", "max_epoch", "num_train_epochs", "epoch"),
    "num_epochs": ("epochs", "max_epochs", "n_epochs"),
    "max_iters": (
        *("max_steps", "steps", "num_steps", "total_steps", "train_steps"),
        *("max_iterations", "iterations", "num_iterations", "max_iter", "num_iters", "iters"),
    ),
    "epoch_length": ("steps_per_epoch", "iters_per_epoch", "limit_train_batches"),
    "data": ("loader", "dataloader", "train_loader", "train_dataloader", "train_dataloaders"),
    # loaders
    "dataset": ("data", "train_dataset"),
    "collate": ("collate_fn", "data_collator"),
    "batch_size": ("batchsize", "bs", "train_batch_size", "per_device_train_batch_size"),
    # handlers
    "loader": ("data", "dataloader", "val_loader", "eval_loader", "dataset", "eval_dataset"),
    "metrics": ("metric", "compute_metrics"),
    "metric": ("monitor", "metric_name", "score_name", "metric_for_best_model"),
    "best": ("monitor", "metric", "metric_name", "score_name", "metric_for_best_model"),
    "keep": ("save_top_k", "n_saved", "save_total_limit", "max_to_keep", "save_last_k"),
    "every": (
        *("every_n_epochs", "every_n_train_steps", "every_n_steps", "interval", "save_steps"),
        *("save_every", "save_interval", "eval_every", "eval_steps", "frequency"),
    ),
    "directory": ("dirpath", "dirname", "log_dir", "logdir", "save_dir", "output_dir", "run_dir"),
    "run_dir": ("directory", "dirpath", "log_dir", "logdir", "save_dir", "output_dir"),
    "path": ("filename", "file", "directory", "log_dir"),
    "prefix": ("name", "split", "stage"),
    "patience": ("early_stopping_patience", "wait", "num_bad_epochs"),
    "min_delta": ("early_stopping_threshold", "delta", "threshold", "tolerance"),
    "warmup": ("warmup_steps", "warmup_iters", "num_warmup_steps", "warmup_epochs"),
    "total": ("total_steps", "num_training_steps", "T_max", "max_steps", "total_iters"),
    "floor": ("min_lr", "eta_min", "end_lr"),
    "LearningRate.decay": ("schedule", "scheduler", "lr_scheduler_type", "kind"),
    "WeightAverage.decay": ("momentum", "ema_decay", "beta", "alpha", "m"),
    "MomentumEncoder.momentum": ("decay", "m", "tau", "ema_decay", "beta"),
    "max_norm": (
        *("max_grad_norm", "gradient_clip_val", "clip_grad_norm", "clip", "norm", "clip_norm"),
        *("grad_clip", "clip_grad"),
    ),
    "max_value": ("clip_value", "gradient_clip_value"),
    "k": ("top_k", "ks", "topk", "recall_k"),
    "project": ("project_name", "task_name", "experiment_name"),
    "Teacher.model": ("teacher", "teacher_model"),
    # losses
    "temperature": ("tau", "t", "temp", "init_temperature", "logit_scale", "init_logit_scale"),
    "learn_temperature": ("learnable_temperature", "learnable_temp", "trainable_temperature"),
    "max_logit_scale": ("logit_scale_max", "clamp", "max_scale"),
    "bias": ("logit_bias", "init_bias", "init_logit_bias"),
    "label_smoothing": ("smoothing", "label_smooth"),
    "ignore_index": ("ignore_label", "pad_token_id"),
    "weight": ("class_weights", "class_weight", "weights"),
    "normalize": ("l2_normalize", "l2_norm", "normalise", "norm"),
    "tile": ("chunk_size", "chunk", "block_size", "tile_size", "mini_batch_size"),
    "queue_size": ("K", "memory_bank_size", "size", "queue_length", "bank_size"),
    "dim": ("feature_dim", "embedding_dim", "embed_dim", "out_dim", "dimension"),
    "margin": ("m", "alpha"),
    "redundancy_weight": ("lambd", "lambda_param", "lambda_coeff", "off_diagonal_weight"),
    "invariance_weight": ("sim_coeff", "lambda_param", "inv_coeff"),
    "variance_weight": ("std_coeff", "mu_param", "var_coeff"),
    "covariance_weight": ("cov_coeff", "nu_param"),
}
"""The arguments of this library (of one class, if it is named), with others' names for each."""

_OF_TRAINER = (
    *("model", "loss", "optimizer", "task", "transform", "precision", "microbatch_size"),
    *("device", "prefetch", "compile", "seed", "log_every", "shard", "step"),
)
_OF_RUN = ("max_epochs", "max_iters", "epoch_length")


def _each(names: tuple[str, ...], way_out: str) -> dict[str, str]:
    return dict.fromkeys(names, way_out)


ELSEWHERE: dict[str, str] = {
    **_each(("data", *SYNONYMS["data"]), "Pass it to the run: trainer.run(loader, max_epochs=...)"),
    **{
        other: f"Pass it to the run: trainer.run(loader, {name}=...)"
        for name in _OF_RUN
        for other in (name, *SYNONYMS[name])
    },
    **{
        other: f"Pass {name}= to Trainer"
        for name in _OF_TRAINER
        for other in (name, *SYNONYMS.get(name, ()))
    },
    **_each(
        (
            *("val_loader", "val_dataloader", "val_dataloaders", "eval_dataset"),
            *("validation_data", "eval_loader", "val_data"),
        ),
        "Attach Evaluation(loader) to the trainer",
    ),
    **_each(("callbacks", "handlers"), "Attach handlers with trainer.attach(handler, ...)"),
    **_each(
        ("ckpt_path", "resume", "resume_from_checkpoint", "resume_from", "model_checkpoint"),
        "Attach a CheckpointManager, which resumes",
    ),
    **_each(
        ("save_steps", "save_strategy", "save_top_k", "enable_checkpointing", "save_every"),
        "Attach CheckpointManager(directory, every=..., keep=...)",
    ),
    **_each(
        ("monitor", "load_best_model_at_end", "metric_for_best_model"),
        "Attach CheckpointManager(directory, best='val/...')",
    ),
    **_each(
        (
            *("check_val_every_n_epoch", "val_check_interval", "eval_steps", "eval_every"),
            *("val_every", "eval_strategy", "evaluation_strategy"),
        ),
        "Attach Evaluation(loader, every=...) to the trainer",
    ),
    **_each(("fast_dev_run", "dry_run"), "Call trainer.dry_run(loader)"),
    "overfit_batches": "Call trainer.overfit(loader, batches=...)",
    "num_sanity_val_steps": "Attached evaluations try their first batch when the run starts",
    **_each(
        ("scheduler", "lr_scheduler", "schedulers", "lr_scheduler_type"),
        "Attach LearningRate(...) to the trainer",
    ),
    **_each(("lr", "learning_rate", "max_lr", "weight_decay", "betas"), "Pass it to the optimizer"),
    **_each(
        ("warmup", "warmup_steps", "warmup_ratio", "num_warmup_steps"),
        "Attach LearningRate(warmup=...) to the trainer",
    ),
    **_each(
        (
            *("batch_size", "num_workers", "shuffle", "dataset", "train_dataset", "collate_fn"),
            *("data_collator", "drop_last"),
        ),
        "The loader has it: SeededLoader(dataset, batch_size=...)",
    ),
    **_each(("pin_memory", "persistent_workers", "generator"), "The loader does it by itself"),
    **_each(
        ("sampler", "batch_sampler"), "Use torch's DataLoader, which the trainer takes as it is"
    ),
    **_each(("metrics", "compute_metrics"), "Attach Evaluation(loader, metrics=[...])"),
    **_each(
        ("patience", "early_stopping", "early_stopping_patience"),
        "Attach EarlyStopping(metric=..., patience=...)",
    ),
    **_each(("ema", "ema_decay"), "Attach WeightAverage(decay=...)"),
    **_each(("ddp", "distributed", "num_nodes", "nnodes"), "Start the script with torchrun"),
    **_each(
        ("world_size", "rank", "gather_with_grad", "local_loss", "gather_distributed", "gather"),
        "Leave it out: over several ranks the features of all are gathered, with their gradients",
    ),
    "gradient_checkpointing": "Switch it on in the model",
    "tokenizer": "Tokenize in the data set, or in the loader's collate function",
    **_each(
        ("deterministic", "benchmark"),
        "Call torch.use_deterministic_algorithms, or set torch.backends.cudnn.benchmark",
    ),
    "sync_batchnorm": "Convert the model with torch.nn.SyncBatchNorm.convert_sync_batchnorm",
    **_each(("temperature", "label_smoothing"), "Pass it to the loss"),
    **_each(("reduction", "size_average"), "Leave it out: a loss returns one number for the batch"),
    **_each(("num_classes", "n_classes"), "Leave it out: the model's output decides"),
    "profiler": "Attach Profile(directory)",
    "max_time": "Add Ignite's TimeLimit(seconds) to Events.ITERATION_COMPLETED",
    **_each(
        SYNONYMS["max_norm"],
        "Attach GradientClipping(max_norm=...) to the trainer",
    ),
    **_each(("logger", "loggers", "report_to"), "Attach a sink, such as TensorBoard(directory)"),
    **_each(
        ("default_root_dir", "output_dir", "save_dir", "log_dir", "logging_dir", "run_dir"),
        "Attach default_handlers(directory)",
    ),
    **_each(("verbose", "progress", "enable_progress_bar"), "Attach ProgressBar()"),
    **_each(("args", "config"), "Pass each setting as an argument"),
}
"""What other libraries pass to a function, and where it goes here if the function does not take
it."""


def names_the_right_argument(function: Function) -> Function:
    """Return the function with errors that show the way out of a call that does not fit.

    A call that fits costs nothing more. A name of `SYNONYMS` or `ELSEWHERE` gets the argument or
    the place that it has here, a misspelt one the nearest argument.
    """

    @wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        try:
            return function(*arguments, **keywords)
        except TypeError:
            message = _misfit(function, arguments, keywords)
            if message is None:  # the function itself has raised
                raise
        raise TypeError(message)

    return cast("Function", call)


def names_the_right_arguments_of(kind: type) -> None:
    """Do the same for the constructor that a class defines."""
    own = vars(kind).get("__init__")
    if own is not None:
        type.__setattr__(kind, "__init__", names_the_right_argument(own))


def _misfit(
    function: Callable[..., Any], arguments: tuple[Any, ...], keywords: Mapping[str, Any]
) -> str | None:
    """Return the message for a call that does not fit a function's signature; None if it fits."""
    signature = inspect.signature(function)
    try:
        signature.bind(*arguments, **keywords)
    except TypeError:
        called = function.__qualname__.split(".")[-1]
        if called == "__init__" and arguments:
            called = type(arguments[0]).__name__
        own = dict(signature.parameters)
        if own.pop("self", None) is not None:
            arguments = arguments[1:]
        return _about(called, own, arguments, keywords)
    return None


def _about(
    called: str,
    own: Mapping[str, inspect.Parameter],
    arguments: tuple[Any, ...],
    keywords: Mapping[str, Any],
) -> str | None:
    kinds = {one.kind for one in own.values()}
    unknown = next((name for name in keywords if name not in own), None)
    if unknown is not None and inspect.Parameter.VAR_KEYWORD not in kinds:
        return _about_unknown(called, unknown, list(own))
    placed = [n for n, one in own.items() if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if len(arguments) > len(placed):
        return _about_positions(called, arguments[len(placed)], placed, list(own))
    given = {*placed[: len(arguments)], *keywords}
    return _about_missing(called, [name for name in _required(own) if name not in given], placed)


def _required(own: Mapping[str, inspect.Parameter]) -> list[str]:
    any_number = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = {n: one for n, one in own.items() if one.default is inspect.Parameter.empty}
    return [name for name, one in required.items() if one.kind not in any_number]


def _about_missing(called: str, missing: list[str], placed: list[str]) -> str | None:
    if not missing:
        return None
    listed = ", ".join([*placed, *(f"{name}=..." for name in missing if name not in placed)])
    return f"{called} must get {' and '.join(missing)}, got none. Write {called}({listed})"


def _about_unknown(called: str, name: str, own: list[str]) -> str:
    near = difflib.get_close_matches(name, own, n=1)
    ours = [
        one
        for one in own
        if name in SYNONYMS.get(f"{called}.{one}", ()) or name in SYNONYMS.get(one, ())
    ]
    way_out = ELSEWHERE.get(name, "")
    if ours or (near and not way_out):
        way_out = f"Pass {(ours or near)[0]}= instead"
    listed = ", ".join(own) or "none"
    return f"the arguments of {called} must be among {listed}, got {name}. {way_out}".rstrip(". ")


def _about_positions(called: str, extra: object, placed: list[str], own: list[str]) -> str:
    got = repr(extra) if isinstance(extra, (int, float, str)) else f"a {type(extra).__name__}"
    named = [name for name in own if name not in placed]
    if not named:
        most = f"at most the arguments {', '.join(placed)}" if placed else "no argument"
        return f"{called} must have {most}, got {got}"
    which = f"all arguments but {', '.join(placed)}" if placed else "its arguments"
    return (
        f"{called} must get {which} by name, got {got} without one. Write {named[0]}=..., or "
        f"another of {', '.join(named)}"
    )
