"""How fast the run is, whether it waits for its data, and what it takes of the device's memory."""

from __future__ import annotations

import logging
import math
from time import perf_counter
from typing import TYPE_CHECKING, Any

import attrs
import torch
from ignite.engine import Events

from diptych.engine.checks import whole_number
from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.events import MetricsEvents, RunEvents
from diptych.handlers.health.rules import Finding
from diptych.handlers.performance.data_wait import DataWaitRule, DeviceWait, HostWait, wait_of

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer

logger = logging.getLogger(__name__)

GIB = 2**30


def _check_share(_: Any, __: attrs.Attribute[float], value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"tolerated_wait must be in (0, 1], got {value!r}")


@attrs.define(kw_only=True, eq=False)
class Throughput:
    """Publishes speed and memory at every log point, as means since the one before.

    - `time/samples_per_second`: samples of all ranks, from `trainer.state.output.batch_size`.
    - `time/step`: seconds for an iteration, waiting for its batch included.
    - `time/data`: seconds of it in which there was no batch to compute on. On a CUDA device that is
      the time in which the device has nothing left to do while the loop waits for a batch;
      elsewhere all the time that the loop waits.
    - `memory/allocated`, `memory/reserved` (CUDA): the most GiB that tensors took, and that the
      allocator held, since the process began.

    The clock runs from the first batch after a log point to the next log point, where it waits for
    the work that is queued on the device; so does the log point itself, a moment later. What
    happens between two epochs (evaluations, checkpoints) does not count; what happens inside one
    does.

    Where `time/data` is more than `tolerated_wait` of `time/step` at `patience` log points in a
    row, and this has cost ten seconds, a warning says so on rank 0, once in a process, with what to
    do; `TensorBoard` shows it among the findings.

    Event: `GET_BATCH_STARTED`, `GET_BATCH_COMPLETED`, `MetricsEvents.LOGGED`.
    Cost: a microsecond an iteration, on a CUDA device ten and two events in its queue; no
        synchronisation between two log points.

    Args:
        tolerated_wait: the share of an iteration's time that may go by without a batch, in (0, 1].
        patience: log points in a row at which it must be larger for a warning, >= 1.

    Attributes:
        findings: the warning, where there was one.

    Raises:
        ValueError: if an argument is out of range.
    """

    tolerated_wait: float = attrs.field(default=0.2, validator=_check_share)
    patience: int = attrs.field(default=3, validator=whole_number())
    findings: list[Finding] = attrs.field(factory=list, init=False)
    _device: torch.device = attrs.field(default=torch.device("cpu"), init=False, repr=False)
    _since: float = attrs.field(default=0.0, init=False, repr=False)
    _seconds: float = attrs.field(default=0.0, init=False, repr=False)
    _wait: HostWait | DeviceWait = attrs.field(factory=HostWait, init=False, repr=False)
    _rule: DataWaitRule = attrs.field(init=False, repr=False)
    _iterations: int = attrs.field(default=0, init=False, repr=False)
    _samples: int = attrs.field(default=0, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._rule = DataWaitRule(self.tolerated_wait, self.patience)

    def attach(self, trainer: Trainer) -> None:
        """Measure the trainer's iterations and publish what they took."""
        self._device, self._wait = trainer.device, wait_of(trainer.device)
        trainer.add_event_handler(Events.STARTED, self._forget)
        trainer.add_event_handler(RunEvents.RESTORE, self._start_over)
        trainer.add_event_handler(Events.GET_BATCH_STARTED, self._start_fetching)
        trainer.add_event_handler(Events.GET_BATCH_COMPLETED, self._end_fetching)
        trainer.add_event_handler(MetricsEvents.LOGGED, self._judge)
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

    def _forget(self, trainer: Trainer) -> None:
        if trainer.state.iteration == 0:
            self.findings.clear()
            self._rule.start()

    def _start_over(self, _: Trainer) -> None:
        self._since = perf_counter()
        self._iterations = self._samples = 0
        self._wait.clear()

    def _start_fetching(self, trainer: Trainer) -> None:
        self._wait.start()
        if self._iterations:
            self._samples += getattr(trainer.state.output, "batch_size", 0)  # of the one before
        else:
            self._since = perf_counter()

    def _end_fetching(self, _: Trainer) -> None:
        self._wait.stop()
        self._iterations += 1

    def _samples_per_second(self, trainer: Trainer) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        self._seconds = perf_counter() - self._since
        return (self._samples + _samples(trainer)) * world_size() / self._seconds

    def _seconds_per_iteration(self) -> float:
        return self._seconds / self._iterations if self._iterations else math.nan

    def _seconds_for_data(self) -> float:
        return self._wait.read() / self._iterations if self._iterations else math.nan

    def _judge(self, trainer: Trainer) -> None:
        record = trainer.metrics.record
        if "time/step" not in record.values:  # an evaluation's record
            return
        finding = self._rule.judge(record.step, self._wait.read(), self._seconds)
        if finding is not None:
            self.findings.append(finding)
            if rank() == 0:
                logger.warning("%s", finding)
        self._start_over(trainer)


def _samples(trainer: Trainer) -> int:
    return getattr(trainer.state.output, "batch_size", 0)
