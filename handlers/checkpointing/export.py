"""The weights of a model as a safetensors file, which other programs can read."""

from __future__ import annotations

import logging
import warnings
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.engine.errors import checkpoint_errors
from diptych.engine.name_patterns import listed
from diptych.handlers.contained_paths import is_plain_file
from diptych.handlers.files import write_atomically

logger = logging.getLogger(__name__)

EVALUATED = "evaluated"
"""The part of a checkpoint with the evaluated weights, if they are not the trained ones."""

DIGEST = "diptych.digest"
"""The key of the checksum of all tensors in a file's metadata."""


def weights_in(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights in a checkpoint that were evaluated."""
    weights: dict[str, Tensor] = state.get(EVALUATED, state["model"])
    return weights


def export_weights(
    weights: Mapping[str, Any], path: Path, *, source: Mapping[str, str] | None = None
) -> None:
    """Write a model's weights and buffers; the file is replaced atomically.

    Args:
        weights: a state dict; tensors that share memory are written separately. Extra states of
            modules that are no tensors are left out, with a warning.
        path: the path of the file.
        source: strings that describe where the weights come from, for the file's metadata;
            `exported_from` returns them.

    Raises:
        CheckpointError: if the file cannot be written; an earlier file stays intact.
    """
    from safetensors import SafetensorError  # noqa: PLC0415 - an extra
    from safetensors.torch import save_file  # noqa: PLC0415

    others = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if others:
        warnings.warn(
            f"{path.name} holds tensors only: the extra state {listed(others, 4)} of the model "
            "is left out. Its checkpoints have it.",
            stacklevel=2,
        )
    copies = {
        key: value.detach().cpu().clone().contiguous()
        for key, value in weights.items()
        if key not in others
    }
    metadata = {**source, DIGEST: _digest(copies)} if source else None
    with checkpoint_errors(f"weights {path} could not be written", OSError, SafetensorError):
        write_atomically(path, partial(save_file, copies, metadata=metadata))


def exported_from(path: Path) -> dict[str, str]:
    """Return the source that an exported file describes; {} if there is none or it is damaged."""
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415 - an extra

    if not is_plain_file(path):
        return {}
    source: dict[str, str] = {}
    try:
        with safe_open(path, framework="pt") as file:
            source = dict(file.metadata() or {})
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
        if DIGEST not in source:  # an earlier version wrote the file
            return {}
        is_intact = source.pop(DIGEST) == _digest(weights)
    except (OSError, SafetensorError, RuntimeError):
        is_intact = False
    if not is_intact:
        logger.warning("The weights in %s are not those that were exported.", path)
    return source if is_intact else {}


def _digest(weights: Mapping[str, Tensor]) -> str:
    """Return a checksum of names, types, shapes and values."""
    checksum = 0
    for key in sorted(weights):
        value = weights[key]
        checksum = zlib.crc32(f"{key} {value.dtype} {tuple(value.shape)}".encode(), checksum)
        checksum = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return str(checksum)
