"""Replay: the kernels of a function, launched together as one CUDA graph.

The loss of a few thousand pairs is some thirty kernels of microseconds, which the host takes longer
to launch than the GPU to run. From the third call with inputs of one form on, a function's kernels
are recorded once and then replayed. They are the same kernels: no number changes.

The inputs are copied to the memory that the kernels were recorded with, and the results out of it.
A replay is therefore a function like the one recorded: its results stay as they are when it is
called again.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]

_logger = logging.getLogger(__name__)

_FORMS = 32
"""Forms of inputs that are remembered."""

_CALLS_BEFORE = 2
"""Direct calls of a form before it is recorded: the first compile kernels and load libraries."""

_CALLS_MORE = 50
"""Calls more, each time that recordings are forgotten: recording takes as long as some calls."""

_UNSUITABLE = ("CUDA_LAUNCH_BLOCKING", "PYTORCH_NO_CUDA_MEMORY_CACHING")
"""Variables of the environment, for debugging, under which nothing is recorded."""


def replayed(function: Function, *inputs: Any) -> tuple[Tensor, ...]:
    """Return function(*inputs); on a GPU, from the third call of one form on, by a replay.

    Recording waits for the device; a replay does not.

    Args:
        function: Launches the same kernels for all inputs of one form, reads no values of tensors
            on the host and communicates nothing. Autograd does not see into it.
        *inputs: Tensors and hashable values; the first is a tensor. Their form is the shapes and
            dtypes of the tensors, and the other values.
    """
    device = inputs[0].device
    if device.type != "cuda" or not _may_record():
        return function(*inputs)
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return replayed(function, *inputs)
    if torch.cuda.is_current_stream_capturing():
        return function(*inputs)
    return _recordings.run(function, inputs, torch.cuda.current_stream().cuda_stream)


@functools.cache
def _may_record() -> bool:
    return not any(os.environ.get(name, "0") != "0" for name in _UNSUITABLE)


class CaptureContext(NamedTuple):
    """The pool and the stream with which all calls of one of the user's streams are captured.

    Attributes:
        pool: Memory for intermediate results, which the recordings share.
        stream: The stream that is captured; torch reuses memory only within a stream.
    """

    pool: Any
    stream: Any

    @classmethod
    def new(cls) -> CaptureContext:
        """Return a context on the current device."""
        return cls(torch.cuda.graph_pool_handle(), torch.cuda.Stream())


class Recording:
    """The kernels of one call, and the memory that they read and write.

    Args:
        function: As for `replayed`.
        inputs: As for `replayed`.
        context: With what to capture.
    """

    def __init__(
        self, function: Function, inputs: tuple[Any, ...], context: CaptureContext
    ) -> None:
        # Memory of inference mode could not be written outside of it; leaving it enables gradients.
        with torch.inference_mode(False), torch.no_grad():
            memory = [x.contiguous().clone() if isinstance(x, Tensor) else x for x in inputs]
            self._by_dtype: dict[torch.dtype, dict[int, Tensor]] = {}  # one kernel copies each
            for position, x in enumerate(memory):
                if isinstance(x, Tensor):
                    self._by_dtype.setdefault(x.dtype, {})[position] = x
            self._graph = torch.cuda.CUDAGraph()
            self._results = self._recorded(function, memory, context)

    def _recorded(
        self, function: Function, memory: list[Any], context: CaptureContext
    ) -> tuple[Tensor, ...]:
        """Record the function, and return its results."""
        context.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(context.stream):
            function(*memory)  # compiles and loads what is missing, which no recording may do
            # The mode leaves other threads alone, such as one that pins memory.
            with torch.cuda.graph(self._graph, *context, capture_error_mode="thread_local"):
                return function(*memory)

    def __call__(self, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Return the results for other inputs of the same form, in new memory."""
        for targets in self._by_dtype.values():
            torch._foreach_copy_(list(targets.values()), [inputs[place] for place in targets])
        self._graph.replay()
        return tuple(result.clone() for result in self._results)


class _Form:
    """What is known of the inputs of one form."""

    def __init__(self) -> None:
        self.calls = 0
        self.recording: Any = None


class Recordings:
    """Recordings by function, stream and form of the inputs.

    Args:
        record: Returns the recording of a function for inputs, in a context.
        new_context: Returns a new context.
    """

    def __init__(
        self,
        record: Callable[..., Any] = Recording,
        new_context: Callable[[], Any] = CaptureContext.new,
    ) -> None:
        self._record, self._new_context = record, new_context
        self._contexts: dict[Any, Any] = {}
        self._forms: dict[Any, _Form] = {}
        self._calls_before: float = _CALLS_BEFORE
        self._lock = threading.Lock()

    def run(self, function: Function, inputs: tuple[Any, ...], stream: int) -> tuple[Tensor, ...]:
        """Return function(*inputs), called or replayed on the current device and stream."""
        described = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in inputs)
        where = inputs[0].device, stream
        with self._lock:  # the calls of two threads must not meet in a recording's memory
            form = self._remembered((function, where, described))
            form.calls += 1
            if form.recording is None and form.calls > self._calls_before:
                self._try_to_record(form, function, inputs, where)
            if form.recording is not None:
                results: tuple[Tensor, ...] = form.recording(inputs)
                return results
        return function(*inputs)

    def _remembered(self, key: Any) -> _Form:
        """Return a form; at the limit all others are forgotten."""
        if key not in self._forms and len(self._forms) == _FORMS:
            if any(form.recording for form in self._forms.values()):
                self._calls_before += _CALLS_MORE
            self._free_all()
        return self._forms.setdefault(key, _Form())

    def _free_all(self) -> None:
        """Free all recordings: torch frees with one what others of its stream still need."""
        self._forms.clear()
        self._contexts.clear()

    def _try_to_record(
        self, form: _Form, function: Function, inputs: tuple[Any, ...], where: Any
    ) -> None:
        """Record a call; without memory for it, free all recordings, for good."""
        if where not in self._contexts:
            self._contexts[where] = self._new_context()
        try:
            form.recording = self._record(function, inputs, self._contexts[where])
        except RuntimeError as error:  # CUDA reports a lack of memory in several ways
            _logger.info("Kernels are launched one by one, since recording them failed: %s", error)
            self._calls_before = math.inf
            self._free_all()


_recordings = Recordings()
