"""The weights of a model as a safetensors file, for other programs to read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from diptych.engine.errors import CheckpointError
from diptych.handlers.evaluation.evaluation import average_scored

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer


def check_can_export() -> None:
    """Check that the package that writes the file is there.

    Raises:
        ImportError: naming the extra to install.
    """
    try:
        import safetensors.torch  # noqa: F401, PLC0415 - an extra: only who exports has it
    except ImportError as error:
        raise ImportError(
            "exporting weights needs the package safetensors: pip install 'diptych[safetensors]'"
        ) from error


def check_exports_what_is_scored(trainer: Trainer, metric: str) -> None:
    """Check that a metric is a score of the trained weights, which a checkpoint exports.

    Raises:
        ValueError: if it is one of averaged weights.
    """
    if average_scored(trainer, metric) is not None:
        raise ValueError(
            f"export must be of the weights that best ranks, and {metric} is a score of averaged "
            "weights, got export=True: export them with WeightAverage.export, or evaluate the "
            "trained ones, Evaluation(weights='model')"
        )


def export_weights(
    weights: Mapping[str, Tensor], path: Path, *, source: Mapping[str, str] | None = None
) -> None:
    """Write a model's weights and buffers; the file is replaced in one step.

    Args:
        weights: a state dict; tensors that share memory are written each for itself.
        path: of the file.
        source: what the file says of where they come from; `exported_from` reads it.

    Raises:
        CheckpointError: if it cannot be written; an earlier file stands.
    """
    from safetensors import SafetensorError  # noqa: PLC0415 - an extra
    from safetensors.torch import save_file  # noqa: PLC0415

    unfinished = path.with_name(path.name + ".unfinished")
    tensors = {name: value.detach().cpu().clone() for name, value in weights.items()}
    try:
        save_file(
            {name: value.contiguous() for name, value in tensors.items()},
            unfinished,
            metadata=dict(source) if source else None,
        )
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise CheckpointError(f"weights {path} could not be written: {error}") from error


def exported_from(path: Path) -> dict[str, str]:
    """Return what an exported file says of where its weights come from; {} if there is none."""
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - an extra

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}
