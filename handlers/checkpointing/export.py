"""The weights of a model as a safetensors file, which other programs can read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from diptych.engine.errors import CheckpointError
from diptych.handlers.files import write_atomically


def export_weights(
    weights: Mapping[str, Tensor], path: Path, *, source: Mapping[str, str] | None = None
) -> None:
    """Write a model's weights and buffers; the file is replaced atomically.

    Args:
        weights: a state dict; tensors that share memory are written separately.
        path: the path of the file.
        source: strings that describe where the weights come from, for the file's metadata;
            `exported_from` returns them.

    Raises:
        CheckpointError: if the file cannot be written; an earlier file stays intact.
    """
    from safetensors import SafetensorError  # noqa: PLC0415 - an extra
    from safetensors.torch import save_file  # noqa: PLC0415

    copies = {key: value.detach().cpu().clone().contiguous() for key, value in weights.items()}
    try:
        write_atomically(path, partial(save_file, copies, metadata=dict(source or {}) or None))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"weights {path} could not be written: {error}") from error


def exported_from(path: Path) -> dict[str, str]:
    """Return the source that an exported file describes; {} if there is none."""
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - an extra

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}
