"""The settings by which runs are compared: the columns of TensorBoard's tab HParams."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diptych.engine.handler import Handler

HyperparameterValue = str | float | bool
TRAINER_SETTINGS = (
    "precision",
    "microbatch_size",
    "seed",
    "ranks",
    "max_epochs",
    "max_iters",
    "compile",
)
OPTIMIZER_SETTINGS = ("lr", "weight_decay", "betas", "momentum")


def hyperparameters(
    settings: Mapping[str, Any], handlers: Sequence[object]
) -> dict[str, HyperparameterValue]:
    """Return the settings by which runs are compared, as a flat mapping.

    A `Handler` that only reports is left out: it changes no value of the run. The settings are
    those that `run_settings` returns.
    """
    group = settings["optimizer"]["groups"][0]
    found = {
        "loss": " ".join(settings["loss"]["settings"].split()),
        "model": settings["model"]["class"].rpartition(".")[2],
        "parameters": settings["model"]["parameters"],
        "optimizer": settings["optimizer"]["class"].rpartition(".")[2],
        # A schedule has replaced the given rate by its first one.
        **{
            f"optimizer/{key}": group.get(f"initial_{key}", group.get(key))
            for key in OPTIMIZER_SETTINGS
        },
        **{f"trainer/{key}": settings["trainer"].get(key) for key in TRAINER_SETTINGS},
        **dict(_handler_hyperparameters(settings["handlers"], handlers)),
    }
    plain = (bool, int, float, str)
    return {k: v if isinstance(v, plain) else str(v) for k, v in found.items() if v is not None}


def _handler_hyperparameters(
    settings: Sequence[Mapping[str, Any]], handlers: Sequence[object]
) -> Iterator[tuple[str, float]]:
    for handler, of_handler in zip(handlers, settings, strict=True):
        if isinstance(handler, Handler) and not handler.changes:
            continue
        name = of_handler.get("prefix") or type(handler).__name__
        for key, value in of_handler.items():
            if isinstance(value, (bool, int, float)):
                yield f"{name}/{key}", value


def session_start(values: Mapping[str, HyperparameterValue]) -> Any:
    """Return the summary that adds a run to the table.

    It names no columns of results, so TensorBoard shows the last value of every scalar.
    """
    from tensorboard.plugins.hparams.plugin_data_pb2 import SessionStartInfo  # noqa: PLC0415

    start = SessionStartInfo(start_time_secs=time.time())
    for name, value in values.items():
        cell = start.hparams[name]
        if isinstance(value, bool):
            cell.bool_value = value
        elif isinstance(value, str):
            cell.string_value = value
        else:
            cell.number_value = value
    return _summary("SESSION_START_INFO_TAG", session_start_info=start)


def session_end() -> Any:
    """Return the summary that marks a run as completed."""
    from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2  # noqa: PLC0415

    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    return _summary("SESSION_END_INFO_TAG", session_end_info=end)


def _summary(tag: str, **content: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415
    from tensorboard.plugins.hparams import metadata  # noqa: PLC0415
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # noqa: PLC0415

    value = Summary.Value(
        tag=getattr(metadata, tag),
        metadata=metadata.create_summary_metadata(HParamsPluginData(**content)),
        tensor=metadata.NULL_TENSOR,
    )
    return Summary(value=[value])
