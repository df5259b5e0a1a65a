"""What may stand in a checkpoint: values that are read back without running anybody's code."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.engine.errors import CheckpointError

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
"""With tensors and the containers below, what `torch.load(weights_only=True)` takes."""


def plain_state(state: Any, path: str = "") -> Any:
    """Return a state whose numbers of NumPy's are Python's, and whose every value can be read back.

    Args:
        state: nested dictionaries, lists and tuples.
        path: where it stands, for the error.

    Raises:
        CheckpointError: naming what is of another type, where it is found: before anything is
            written that nothing could read.
    """
    if type(state) in PLAIN or isinstance(state, Tensor):
        return state
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
        f"{path} must be made of tensors, numbers, strings, lists and dictionaries to be saved, "
        f"got a {type(state).__module__}.{type(state).__qualname__}: let its state_dict() return "
        "such values"
    )
