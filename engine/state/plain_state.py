"""The values that a checkpoint may hold: they load without running any code."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.engine.errors import CheckpointError

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
"""The types that `torch.load(weights_only=True)` accepts, besides tensors and containers."""


def plain_state(state: Any, path: str = "") -> Any:
    """Return a state that can be loaded again; NumPy's numbers become Python's.

    The path is that of the state in the whole, for the error.

    Raises:
        CheckpointError: if a value has another type; the message gives its path. Nothing has been
            written by then.
    """
    if type(state) in PLAIN:
        return state
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, np.generic):
        return state.item()
    if type(state) in (dict, OrderedDict):
        return type(state)(
            (plain_state(key, f"a key of {path}"), plain_state(value, f"{path}.{key}".lstrip(".")))
            for key, value in state.items()
        )
    if type(state) in (list, tuple):
        return type(state)(plain_state(value, f"{path}[{i}]") for i, value in enumerate(state))
    raise CheckpointError(
        f"{path} must consist of tensors, numbers, strings, lists and dictionaries, got a "
        f"{type(state).__module__}.{type(state).__qualname__}. Let state_dict() return such values"
    )
