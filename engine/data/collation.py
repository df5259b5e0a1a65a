"""Torch's default collation, with errors that name the part of the samples that does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate

from diptych.engine.errors import BatchError

OWN = "pass collate= to the loader"


def collate_samples(samples: list[Any]) -> Any:
    """Return the batch that `torch.utils.data.default_collate` makes of samples.

    Raises:
        BatchError: if it cannot; the message names the part.
    """
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError, KeyError, IndexError) as error:
        message = _misfit(samples)
        if message is None:
            raise
        raise BatchError(message) from error


def _misfit(samples: Sequence[Any]) -> str | None:
    """Return what does not fit in samples that cannot be collated; None if that is not known."""
    if any(sample is None for sample in samples):
        return f"a sample must not be None. Leave it out of the data set, or {OWN}, which drops it"
    if len(set(map(_is_mapping_or_sequence, samples))) > 1:
        kinds = sorted({type(sample).__name__ for sample in samples})
        return f"samples must be of one kind, got a {' and a '.join(kinds)}. Convert them, or {OWN}"
    keys = {frozenset(sample): tuple(sample) for sample in samples if isinstance(sample, Mapping)}
    if len(keys) > 1:
        one, other, *_ = (", ".join(map(repr, names)) for names in sorted(keys.values(), key=len))
        return f"samples must have the same keys, got {one} and {other}. Complete them, or {OWN}"
    return next(filter(None, (_misfit_of(name, values) for name, values in _parts(samples))), None)


def _is_mapping_or_sequence(sample: Any) -> tuple[bool, bool]:
    return isinstance(sample, Mapping), isinstance(sample, (tuple, list))


def _misfit_of(name: str, values: list[Any]) -> str | None:
    shapes = sorted({tuple(v.shape) for v in values if isinstance(v, (Tensor, np.ndarray))})
    if len(shapes) > 1:
        listed = " and ".join(map(str, shapes[:2]))
        return (
            f"samples must have equal shapes, got {listed} in {name}. Resize images and pad "
            f"texts in the data set, or {OWN}"
        )
    kinds = [type(value) for value in values if not _can_collate(value)]
    if kinds:
        return (
            f"samples must hold tensors, arrays, numbers or strings, got a "
            f"{kinds[0].__name__} in {name}. Convert it in the data set, or {OWN}"
        )
    return None


def _parts(samples: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    first = samples[0]
    if isinstance(first, Mapping):
        yield from ((repr(key), [sample[key] for sample in samples]) for key in first)
    elif isinstance(first, (tuple, list)):
        columns = zip(*samples, strict=False)
        yield from ((f"part {index}", list(column)) for index, column in enumerate(columns))
    else:
        yield "the samples", list(samples)


def _can_collate(value: Any) -> bool:
    known = (Tensor, np.ndarray, np.generic, int, float, str, bytes, Mapping, tuple, list)
    return isinstance(value, known)
