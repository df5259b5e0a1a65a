"""How fast the run is, where its time goes, and what it takes of the device's memory."""

from __future__ import annotations

import math
from time import perf_counter
from typing import TYPE_CHECKING

import attrs
import torch
from ignite.engine import Events

from diptych.engine.distributed import world_size
from diptych.engine.events import MetricsEvents, RunEvents

if TYPE_CHECKING:
    from diptych.engine import Trainer

GIB = 2**30


@attrs.define(eq=False)
class Throughput:
    """Publishes speed and memory at every log point, as means since the one before.

    - `time/samples_per_second`: samples of all ranks, from `trainer.state.output.batch_size`.
    - `time/step`: seconds for an iteration, waiting for its batch included.
    - `time/data`: seconds of it in which the loop waited for its batch.
    - `memory/allocated`, `memory/reserved` (CUDA): the most GiB that tensors took, and that the
      allocator held, since the process began.

    The clock runs from the first batch after a log point to the next log point, where it waits for
    the work that is queued on the device; so does the log point itself, a moment later. What
    happens between two epochs (evaluations, checkpoints) does not count; what happens inside one
    does.

    Event: `GET_BATCH_STARTED`, `GET_BATCH_COMPLETED`.
    Cost: a microsecond an iteration; no synchronisation between two log points.
    """

    _device: torch.device = attrs.field(default=torch.device("cpu"), init=False, repr=False)
    _since: float = attrs.field(default=0.0, init=False, repr=False)
    _fetching_since: float = attrs.field(default=0.0, init=False, repr=False)
    _seconds: float = attrs.field(default=0.0, init=False, repr=False)
    _waited: float = attrs.field(default=0.0, init=False, repr=False)
    _iterations: int = attrs.field(default=0, init=False, repr=False)
    _samples: int = attrs.field(default=0, init=False, repr=False)

    def attach(self, trainer: Trainer) -> None:
        """Measure the trainer's iterations and publish what they took."""
        self._device = trainer.device
        trainer.add_event_handler(RunEvents.RESTORE, self._start_over)
        trainer.add_event_handler(Events.GET_BATCH_STARTED, self._start_fetching)
        trainer.add_event_handler(Events.GET_BATCH_COMPLETED, self._end_fetching)
        trainer.add_event_handler(MetricsEvents.LOGGED, self._start_over_if_read)
        trainer.metrics.gauge("time/samples_per_second", lambda: self._samples_per_second(trainer))
        trainer.metrics.gauge("time/step", self._seconds_per_iteration)
        trainer.metrics.gauge("time/data", self._seconds_for_data)
        if trainer.device.type == "cuda":
            device = trainer.device
            trainer.metrics.gauge(
                "memory/allocated", lambda: torch.cuda.max_memory_allocated(device) / GIB
            )
            trainer.metrics.gauge(
                "memory/reserved", lambda: torch.cuda.max_memory_reserved(device) / GIB
            )

    def _start_over(self, _: Trainer) -> None:
        self._since = self._fetching_since = perf_counter()
        self._waited, self._iterations, self._samples = 0.0, 0, 0

    def _start_fetching(self, trainer: Trainer) -> None:
        self._fetching_since = now = perf_counter()
        if self._iterations:
            self._samples += getattr(trainer.state.output, "batch_size", 0)  # of the one before
        else:
            self._since = now

    def _end_fetching(self, _: Trainer) -> None:
        self._waited += perf_counter() - self._fetching_since
        self._iterations += 1

    def _samples_per_second(self, trainer: Trainer) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        self._seconds = perf_counter() - self._since
        return (self._samples + _samples(trainer)) * world_size() / self._seconds

    def _seconds_per_iteration(self) -> float:
        return self._seconds / self._iterations if self._iterations else math.nan

    def _seconds_for_data(self) -> float:
        return self._waited / self._iterations if self._iterations else math.nan

    def _start_over_if_read(self, trainer: Trainer) -> None:
        if "time/step" in trainer.metrics.record.values:  # not an evaluation's record
            self._start_over(trainer)


def _samples(trainer: Trainer) -> int:
    return getattr(trainer.state.output, "batch_size", 0)
