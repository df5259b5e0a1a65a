"""The states of the random generators that a run draws from."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

ForwardRandomState = tuple[Any, Any, Tensor, Tensor | None]
"""The states of Python's, NumPy's, torch's CPU and the device's generators."""


def mixed_seed(*numbers: int) -> int:
    """Mix integers into one seed; neighbouring integers give unrelated streams (splitmix64)."""
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & 0x7FFFFFFFFFFFFFFF


def seed_host(seed: int) -> None:
    """Seed Python's, NumPy's and torch's CPU generators, but no device's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()


def random_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators, of CUDA devices too.

    The result has tensors, numbers and lists only, so a checkpoint with it loads with
    `weights_only=True`.
    """
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": {"version": version, "internal": list(internal), "gauss": gauss},
        "numpy": {
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if _cuda_in_use() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore the generators from a state that `random_state` returned.

    Args:
        state: if it has more or fewer CUDA devices than this machine, the common ones are set.
    """
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["internal"]), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"])
    if _cuda_in_use():
        for index, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state, index)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore every generator at the end of the context.

    For example, a data loader draws a seed each time it is iterated.
    """
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


def forward_random_state(device: torch.device) -> ForwardRandomState:
    """Return the states of the generators of a forward pass on `device`, without waiting for it."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_forward_random_state(state: ForwardRandomState, device: torch.device) -> None:
    """Restore the generators from a state that `forward_random_state` returned."""
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)


@contextmanager
def seeded_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of host and `device` in this context, and restore them at its end."""
    before = forward_random_state(device)
    seed_host(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    try:
        yield
    finally:
        set_forward_random_state(before, device)
