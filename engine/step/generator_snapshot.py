"""The random generators of a step, copied before each one at a cost of about two microseconds.

Reading the states of Python's and NumPy's generators takes 30 microseconds, which a short update
would notice. Both are Mersenne Twisters in a block of memory that C code owns, so this module
copies the memory. It compares the layout with the public functions first, and uses those functions
if the layout differs.
"""

from __future__ import annotations

import ctypes
import random
import struct
from typing import Any

import numpy as np
import torch

WORDS = 624
SIZE = 4 * (WORDS + 1)
"""Bytes of a Mersenne Twister: its words and the position in them."""


class GeneratorSnapshot:
    """The states of Python's, NumPy's, torch's CPU and the device's generators.

    Args:
        device: its generator is copied, besides those of the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._python, self._numpy = _PythonGenerator(), _NumpyGenerator()
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            torch.cuda.init()
            index = torch.cuda.current_device() if device.index is None else device.index
            self._generators.append(torch.cuda.default_generators[index])
        self._states: tuple[Any, ...] = ()

    def take(self) -> None:
        """Copy the states, without waiting for the device."""
        self._python.take()
        self._numpy.take()
        self._states = tuple([generator.get_state() for generator in self._generators])

    def restore(self) -> None:
        """Restore the states that `take` has copied."""
        self._python.restore()
        self._numpy.restore()
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)


class _PythonGenerator:
    """The generator behind the functions of `random`."""

    def __init__(self) -> None:
        self._generator: random.Random = random.getstate.__self__  # type: ignore[attr-defined]
        header = object.__basicsize__
        self._address: int | None = id(self._generator) + header
        self._state: Any = None
        self._gauss: float | None = None
        fits = type(self._generator).__basicsize__ >= header + SIZE
        if not fits or self._words() != random.getstate()[1]:
            self._address = None

    def take(self) -> None:
        if self._address is None:
            self._state = random.getstate()
            return
        self._state = ctypes.string_at(self._address, SIZE)
        self._gauss = self._generator.gauss_next

    def restore(self) -> None:
        if self._address is None:
            random.setstate(self._state)
        else:
            words = _words_after_position(self._state)
            random.setstate((random.Random.VERSION, words, self._gauss))

    def _words(self) -> tuple[int, ...]:
        assert self._address is not None
        return _words_after_position(ctypes.string_at(self._address, SIZE))


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
        self._address: int | None = None
        self._memory: bytes | None = None
        self._state: Any = None

    def take(self) -> None:
        source = np.random.get_bit_generator()
        if source is not self._source:
            self._find(source)
        if self._address is None:
            self._state = np.random.get_state()
            return
        memory = ctypes.string_at(self._address, SIZE)
        if memory != self._memory or self._state[3]:
            self._memory, self._state = memory, np.random.get_state()

    def restore(self) -> None:
        np.random.set_state(self._state)

    def _find(self, source: Any) -> None:
        self._source, self._address, self._memory = source, None, None
        if type(source) is not np.random.MT19937:
            return
        address = source.ctypes.state_address
        key, position = source.state["state"]["key"], source.state["state"]["pos"]
        if ctypes.string_at(address, SIZE) == struct.pack(f"={WORDS}Ii", *key, position):
            self._address = address
