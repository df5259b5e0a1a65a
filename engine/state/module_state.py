"""A module's state dict, the same whatever wraps or shards the module."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from diptych.engine.distributed.dtensor import shard_of
from diptych.engine.modules import unwrapped


def clean_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state dict with the keys that it has without wrappers."""
    return {key.replace("_orig_mod.", ""): v for key, v in unwrapped(module).state_dict().items()}


def load_clean_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state dict from `clean_state_dict` into a module that may be wrapped."""
    bare = unwrapped(module)
    named = {key: (state[key.replace("_orig_mod.", "")], v) for key, v in bare.state_dict().items()}
    laid_out = {
        key: shard_of(value, like) if isinstance(value, Tensor) else value
        for key, (value, like) in named.items()
    }
    bare.load_state_dict(laid_out)
