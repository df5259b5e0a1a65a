"""Weights from a file for a model that may differ from the saved one: a warm start."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor, nn

from diptych.engine.distributed.dtensor import local_part
from diptych.engine.errors import CheckpointError, checkpoint_errors
from diptych.engine.name_patterns import listed
from diptych.engine.state.checkpoint_structure import check_archive, load_plain
from diptych.engine.state.module_state import clean_state_dict, load_clean_state_dict
from diptych.handlers.checkpointing.checkpoint_store import CheckpointStore
from diptych.handlers.checkpointing.entries import resumable_entries

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]

NESTED = ("state_dict", "model_state_dict", "model", "weights")
"""The keys under which other programs save a state dict, in the order in which they are tried."""

WRAPPER = "module."
"""The prefix that DataParallel and DistributedDataParallel give to all names."""

DEPTH = 3
"""The most names in a prefix that is found."""


@attrs.frozen
class LoadedWeights:
    """What `load_weights` has loaded, and what it has left as it was.

    Attributes:
        path: the file.
        matched: the names of the loaded parameters and buffers, as the model has them.
        missing: those of the model that the file lacks; they keep their values.
        unexpected: those of the file that the model lacks.
        other_shape: those of both whose shapes differ: the file's shape and the model's. They keep
            the model's values.
        prefix: the change of prefix that made the names fit: with `-module.`, it was removed from
            the file's names, with `+backbone.`, it was added; empty if none was needed.
    """

    path: Path
    matched: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    other_shape: Mapping[str, tuple[Shape, Shape]] = attrs.field(factory=dict)
    prefix: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether file and model have the same names and shapes."""
        return not (self.missing or self.unexpected or self.other_shape)

    def __str__(self) -> str:
        shapes = [f"{n} {there} -> {here}" for n, (there, here) in self.other_shape.items()]
        total = len(self.matched) + len(self.missing) + len(shapes)
        changed = f" (prefix {self.prefix})" if self.prefix else ""
        lines = [f"{self.path.name}: {len(self.matched)} of {total} loaded{changed}"]
        for title, names in (
            ("missing, kept", self.missing),
            ("other shape, kept", shapes),
            ("unexpected", self.unexpected),
        ):
            if names:
                lines.append(f"  {title:18} {len(names):4}  {listed(names)}")
        return "\n".join(lines)


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    strict: bool = False,
    rename: Mapping[str, str] | None = None,
) -> LoadedWeights:
    """Load the weights of a file into a model, as far as they fit.

    ```python
    report = load_weights(model, "runs/emoji/checkpoint_epoch_3.pt", rename={"visual.": "image."})
    print(report)
    ```

    Names fit also if one side has a prefix that the other lacks, such as `module.` or `backbone.`,
    and whatever wraps the model. A parameter without a counterpart, or of another shape (a new
    head), keeps its values. Types are converted to the model's. Nothing is modified before
    everything is checked.

    Args:
        model: the model; call it before or after building a trainer, before `run`.
        path: a checkpoint, a directory of checkpoints (of which the newest is read), a safetensors
            file, or a state dict that `torch.save` has written, also inside of a dictionary under
            `state_dict` or `model`. Only tensors and plain values are unpickled.
        strict: whether everything in the file and in the model must fit.
        rename: prefixes in the file's names, each with the one to put instead; "" stands before all
            names. Prefixes are then taken as they are: no other change is tried.

    Returns:
        A report; `print` shows it as a short table.

    Raises:
        CheckpointError: if the file cannot be read or has no weights; if none of them fits, or they
            fit in several ways; with `strict`, if anything does not fit.
        ValueError: if the model is on the meta device.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"path must be a path, got a {type(path).__name__}. The order is load_weights(model, "
            "path); model.load_state_dict takes a state dict"
        )
    file = Path(path)
    weights = _renamed(read_weights(file), rename or {})
    own = {k: v for k, v in clean_state_dict(model).items() if isinstance(v, Tensor)}
    if any(value.is_meta for value in own.values()):
        raise ValueError(
            "model must have memory for its weights, got one on the meta device. Call "
            'model.to_empty(device="cpu") first'
        )
    prefix = "" if rename else _best_prefix(file, weights, own)
    report, fitting = _compared(file, prefix, _with_prefix(weights, prefix), own)
    if not report.matched:
        raise CheckpointError(
            f"path must hold weights of this model, got {file}, of which none fits: it has "
            f"{listed(weights)}; the model has {listed(own)}. Pass rename={{...}} if they are the "
            "same under other names"
        )
    if strict and not report.is_complete:
        raise CheckpointError(
            f"all weights must fit with strict=True. Pass strict=False to load those that do.\n"
            f"{report}"
        )
    load_clean_state_dict(model, {**clean_state_dict(model), **fitting})
    logger.info("Loaded weights. %s", report)
    return report


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights in a file by name, on the CPU.

    Raises:
        CheckpointError: if the file cannot be read, or has no weights.
    """
    if path.is_dir():
        entries = resumable_entries(CheckpointStore(path).entries())
        if not entries:
            raise CheckpointError(f"path must hold a checkpoint, got the directory {path} without")
        path = path / entries[0].file
    if not path.is_file():
        raise CheckpointError(f"path must be a file with weights, got {path}, which does not exist")
    # Torch, zipfile, pickle and safetensors each have errors of their own.
    with checkpoint_errors(f"weights {path} cannot be read", Exception):
        loaded = _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
    if isinstance(loaded, Mapping) and {"format", "model", "trainer"} <= loaded.keys():
        return CheckpointStore(path.parent).read_weights(path.name)
    return _state_dict_in(loaded, path)


def _safetensors(path: Path) -> Any:
    from safetensors.torch import load_file  # noqa: PLC0415 - an extra

    return load_file(path)


def _torch_file(path: Path) -> Any:
    if zipfile.is_zipfile(path):  # torch before 1.6 wrote no archive
        check_archive(path, path.stat().st_size)
    return load_plain(path)


def _state_dict_in(loaded: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict, which may be under a key of a larger dictionary."""
    candidates = [loaded]
    if isinstance(loaded, Mapping):
        candidates = [*(loaded[key] for key in NESTED if key in loaded), loaded]
    for candidate in candidates:
        if isinstance(candidate, Mapping):
            tensors = {str(k): v for k, v in candidate.items() if isinstance(v, Tensor)}
            if tensors:
                return {key.replace("_orig_mod.", ""): value for key, value in tensors.items()}
    got = (
        f"with {listed(map(str, loaded))}"
        if isinstance(loaded, Mapping)
        else "without a state dict"
    )
    raise CheckpointError(f"path must hold a state dict of tensors, got {path} {got}")


def _renamed(weights: Mapping[str, Tensor], rename: Mapping[str, str]) -> dict[str, Tensor]:
    """Return weights with each prefix replaced by its counterpart, the longest that a name has."""
    prefixes = sorted(rename, key=len, reverse=True)
    unused = [old for old in prefixes if not any(key.startswith(old) for key in weights)]
    if unused:
        raise CheckpointError(
            f"rename must have prefixes of names in the file, got {', '.join(map(repr, unused))}. "
            f"The file has {listed(weights)}"
        )
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        old = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
        name = key if old is None else rename[old] + key.removeprefix(old)
        if name in renamed:
            raise CheckpointError(f"rename must keep names apart, got {name} for two weights")
        renamed[name] = value
    return renamed


def _best_prefix(path: Path, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Return the change of prefix with which the most weights fit: "", `-module.`, `+backbone.`."""
    added = [f"+{prefix}" for prefix in _prefixes(own)]
    changes = ["", *(f"-{prefix}" for prefix in _prefixes(weights)), *added]
    if all(key.startswith(WRAPPER) for key in weights):
        changes += [f"-{WRAPPER} {change}" for change in added]
    scores = {change: _fitting(_with_prefix(weights, change), own) for change in changes}
    best = max(scores.values())
    if scores[""] == best:
        return ""
    found = [change for change in changes if scores[change] == best]
    if len(found) > 1:
        raise CheckpointError(
            f"the names in {path} must fit the model in one way, but fit equally well with the "
            f"prefixes {', '.join(found)} removed (-) or added (+). Choose one with rename: "
            f'rename={{"": "prefix."}} adds a prefix'
        )
    return found[0]


def _prefixes(names: Iterable[str]) -> list[str]:
    """Return the prefixes of names that end with a dot, of at most `DEPTH` parts."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")[:-1][:DEPTH]
        found.update({".".join(parts[: end + 1]) + ".": None for end in range(len(parts))})
    return list(found)


def _with_prefix(weights: Mapping[str, Tensor], change: str) -> dict[str, Tensor]:
    """Return weights after a change of prefix; a name that had the prefix wins over one without."""
    names = {key: key for key in weights}
    for one in change.split():
        prefix = one[1:]
        for key, name in names.items():
            names[key] = prefix + name if one.startswith("+") else name.removeprefix(prefix)
    unchanged = {names[key]: value for key, value in weights.items() if names[key] == key}
    return {**unchanged, **{names[k]: v for k, v in weights.items() if names[k] != k}}


def _fitting(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> int:
    return sum(key in own and own[key].shape == value.shape for key, value in weights.items())


def _compared(
    path: Path, prefix: str, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[LoadedWeights, dict[str, Tensor]]:
    """Return the report, and the weights that fit."""
    shapes = {
        key: (tuple(weights[key].shape), tuple(own[key].shape)) for key in own if key in weights
    }
    other = {key: (there, here) for key, (there, here) in shapes.items() if there != here}
    fitting = {key: weights[key] for key in shapes.keys() - other.keys()}
    fitting |= _tied(fitting, own, own.keys() - weights.keys())
    report = LoadedWeights(
        path=path,
        matched=tuple(key for key in own if key in fitting),
        missing=tuple(key for key in own if key not in fitting and key not in weights),
        unexpected=tuple(key for key in weights if key not in own),
        other_shape=other,
        prefix=prefix,
    )
    return report, fitting


def _tied(
    fitting: Mapping[str, Tensor], own: Mapping[str, Tensor], lacking: Iterable[str]
) -> dict[str, Tensor]:
    """Return the weights of lacking names that are tied to fitting ones: some files hold one."""
    by_memory = {_memory(own[key]): value for key, value in fitting.items()}
    return {key: by_memory[_memory(own[key])] for key in lacking if _memory(own[key]) in by_memory}


def _memory(tensor: Tensor) -> Any:
    """Return what tells whether two tensors of a model are one."""
    own = local_part(tensor)
    if not own.numel():
        return id(tensor)
    return own.data_ptr(), tuple(own.shape), own.stride(), own.device
