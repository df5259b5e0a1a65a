"""The states of the random generators that a run draws from."""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

ForwardRandomState = tuple[Any, Any, Tensor, Tensor | None]
"""The states of Python's, NumPy's, torch's CPU and the device's generators."""


WORDS = 624
SIZE = 4 * (WORDS + 1)
"""Bytes of a Mersenne Twister: its words and the position in them."""


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

    Of CUDA devices, those are set that both the state and this machine have.
    """
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["internal"]), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"])
    if _cuda_in_use():
        for index, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state, index)


def host_state() -> tuple[object, ...]:
    """Return the states of Python's, NumPy's and torch's CPU generators, only to be compared."""
    _, keys, *position = np.random.get_state(legacy=True)
    words = np.asarray(keys).tobytes(), torch.get_rng_state().numpy().tobytes()
    return random.getstate(), *position, *words


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


class GeneratorSnapshot:
    """The states of Python's, NumPy's, torch's CPU and the device's generators, copied often.

    Reading the states of Python's and NumPy's generators takes 30 microseconds, which a short
    update would notice. Both are Mersenne Twisters in a block of memory that C code owns, so this
    class copies the memory. It compares the layout with the public functions first, and uses those
    functions if the layout differs.
    """

    def __init__(self, device: torch.device) -> None:
        self._python, self._numpy = _PythonGenerator(), _NumpyGenerator()
        self._cpu: Tensor | None = None
        self._cuda: torch.Generator | None = None
        self._position = (0, 0)
        if device.type == "cuda":
            torch.cuda.init()
            index = torch.cuda.current_device() if device.index is None else device.index
            self._cuda = torch.cuda.default_generators[index]

    def take(self) -> None:
        """Copy the states, without waiting for the device."""
        self._python.take()
        self._numpy.take()
        self._cpu = torch.default_generator.get_state()
        if self._cuda is not None:  # a counter, whose two numbers are cheaper than its state
            self._position = (self._cuda.initial_seed(), self._cuda.get_offset())

    def restore(self) -> None:
        """Restore the states that `take` has copied."""
        assert self._cpu is not None
        self._python.restore()
        self._numpy.restore()
        torch.default_generator.set_state(self._cpu)
        if self._cuda is not None:
            seed, offset = self._position
            self._cuda.manual_seed(seed)
            self._cuda.set_offset(offset)


class _PythonGenerator:
    """The generator behind the functions of `random`."""

    def __init__(self) -> None:
        self._generator: random.Random = random.getstate.__self__  # type: ignore[attr-defined]
        self._read: Callable[[], bytes] | None = None
        self._state: Any = None
        self._gauss: float | None = None
        header = object.__basicsize__
        if type(self._generator).__basicsize__ >= header + SIZE:
            read = _reader_of(id(self._generator) + header)
            if _words_after_position(read()) == random.getstate()[1]:
                self._read = read

    def take(self) -> None:
        if self._read is None:
            self._state = random.getstate()
            return
        self._state = self._read()
        self._gauss = getattr(self._generator, "gauss_next")  # noqa: B009 - not in the stubs

    def restore(self) -> None:
        if self._read is None:
            random.setstate(self._state)
        else:
            words = _words_after_position(self._state)
            random.setstate((random.Random.VERSION, words, self._gauss))


def _reader_of(address: int) -> Callable[[], bytes]:
    """Return a function that copies the memory of a Mersenne Twister."""
    return memoryview((ctypes.c_char * SIZE).from_address(address)).tobytes


def _words_after_position(memory: bytes) -> tuple[int, ...]:
    position, *words = struct.unpack(f"=i{WORDS}I", memory)
    return (*words, position)


class _NumpyGenerator:
    """The generator behind the functions of `numpy.random`.

    Beside its memory it may hold one normal number in reserve. It gets one only by a draw, which
    changes the memory; the state is read in full then, and as long as there is such a number.
    """

    def __init__(self) -> None:
        self._source: Any = None
        self._read: Callable[[], bytes] | None = None
        self._before = b""
        self._state: Any = None

    def take(self) -> None:
        source = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if source is not self._source:
            self._find(source)
        memory = b"" if self._read is None else self._read()
        if not memory or memory != self._before or self._state["has_gauss"]:
            self._before, self._state = memory, np.random.get_state(legacy=False)

    def restore(self) -> None:
        np.random.set_state(self._state)

    def _find(self, source: Any) -> None:
        self._source, self._read, self._before = source, None, b""
        if type(source) is not np.random.MT19937:
            return
        read = _reader_of(source.ctypes.state_address)
        key, position = source.state["state"]["key"], source.state["state"]["pos"]
        if read() == struct.pack(f"={WORDS}Ii", *key, position):
            self._read = read
