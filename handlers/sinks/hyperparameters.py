"""A run's settings as the columns of TensorBoard's table of runs, the tab "HParams"."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

Value = str | float | bool
OF_TRAINER = ("precision", "microbatch_size", "seed", "ranks", "max_epochs", "max_iters", "compile")
OF_OPTIMIZER = ("lr", "weight_decay", "betas", "momentum")
# They show a run and change none of its numbers, so runs are not compared by how.
ONLY_SHOW = {
    "CheckpointManager",
    "EmbeddingProjector",
    "FirstLayerFilters",
    "GradientDiagnostics",
    "Histograms",
    "HistoryPlots",
    "InBatchAccuracy",
    "JsonLines",
    "Profile",
    "ProgressBar",
    "RepresentationHealth",
    "RetrievalGallery",
    "RunCard",
    "RunRecord",
    "TensorBoard",
    "Throughput",
}
# Where files go is no setting that runs are compared by.
PLACES = ("directory", "resume")


def hyperparameters(settings: Mapping[str, Any]) -> dict[str, Value]:
    """Return what runs are compared by, flat: name to a number, a text or a truth value.

    Args:
        settings: what `run_settings` returns.
    """
    group = settings["optimizer"]["groups"][0]
    found = {
        "loss": " ".join(settings["loss"]["settings"].split()),
        "model": settings["model"]["class"].rpartition(".")[2],
        "parameters": settings["model"]["parameters"],
        "optimizer": settings["optimizer"]["class"].rpartition(".")[2],
        # A schedule has put a first rate in the place of the one that was given.
        **{f"optimizer/{key}": group.get(f"initial_{key}", group.get(key)) for key in OF_OPTIMIZER},
        **{f"trainer/{key}": settings["trainer"].get(key) for key in OF_TRAINER},
        **dict(_of_handlers(settings["handlers"])),
    }
    return {name: _flat(value) for name, value in found.items() if value is not None}


def session_start(values: Mapping[str, Value]) -> Any:
    """Return the summary that gives a run its row.

    The columns of results are not named in it: TensorBoard then takes the last values of all
    scalars of all runs.
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
    """Return the summary that says that a run was done to its end."""
    from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2  # noqa: PLC0415

    end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
    return _summary("SESSION_END_INFO_TAG", session_end_info=end)


def _summary(tag: str, **content: Any) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415
    from tensorboard.plugins.hparams import metadata  # noqa: PLC0415
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData  # noqa: PLC0415

    summary = Summary()
    summary.value.add(
        tag=getattr(metadata, tag),
        metadata=metadata.create_summary_metadata(HParamsPluginData(**content)),
        tensor=metadata.NULL_TENSOR,
    )
    return summary


def _of_handlers(handlers: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    for handler in handlers:
        kind = handler["class"].rpartition(".")[2]
        if kind in ONLY_SHOW:
            continue
        name = handler.get("prefix") or kind
        for key, value in handler.items():
            if key not in ("class", "prefix", *PLACES) and isinstance(value, (bool, int, float)):
                yield f"{name}/{key}", value


def _flat(value: Any) -> Value:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
