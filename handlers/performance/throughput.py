"""The speed of a run, its waits for data, and the device memory that it takes."""

from __future__ import annotations

import logging
import math
from time import perf_counter
from typing import TYPE_CHECKING

import attrs
import torch
from ignite.engine import Events

from diptych.engine.checks import whole_number
from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.events import MetricsEvents, RunEvents
from diptych.engine.handler import Finding, Handler
from diptych.handlers.argument_checks import number
from diptych.handlers.performance.data_wait import DataWaitRule, DeviceWait, HostWait

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer

logger = logging.getLogger(__name__)

GIB = 2**30


# Its attributes change in every iteration, so setting them runs no validator.
@attrs.define(kw_only=True, eq=False, on_setattr=attrs.setters.NO_OP)
class Throughput(Handler):
    """Publishes speed and memory at every log point, as means since the previous one.

    - `time/samples_per_second`: samples of all ranks, from `trainer.state.output.batch_size`.
    - `time/step`: seconds for an iteration, including the wait for its batch.
    - `time/data`: seconds of an iteration spent waiting for its batch. On a CUDA device this is the
      time in which the device is idle while the loop waits for a batch; elsewhere it is the whole
      time that the loop waits.
    - `memory/allocated`, `memory/reserved` (CUDA): peak GiB of tensors, and of the allocator, since
      the process started.

    The clock runs from the first batch after a log point to the next log point. There it waits for
    the work queued on the device, as the log point itself would. The time between two epochs
    (evaluations, checkpoints) does not count; the time of handlers within an epoch does.

    If `time/data` exceeds the share `tolerated_wait` of `time/step` at `patience` log points in a
    row, and these waits took ten seconds, rank 0 logs a warning with the remedies, once a run.
    `TensorBoard` shows it among the findings.

    Event: `GET_BATCH_STARTED`, `GET_BATCH_COMPLETED`, `MetricsEvents.LOGGED`.
    Cost: a microsecond an iteration; on a CUDA device ten microseconds and two events. No
        synchronisation between two log points.

    Args:
        tolerated_wait: the tolerated share of an iteration's time spent waiting, in (0, 1].
        patience: log points in a row that must exceed it for a warning, >= 1.

    Attributes:
        findings: the warning, if there was one.

    Raises:
        ValueError: if an argument is out of range.
    """

    tolerated_wait: float = attrs.field(
        default=0.2, validator=number("be in (0, 1]", lambda value: 0 < value <= 1)
    )
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
        """Measure the trainer's iterations."""
        self._device = device = trainer.device
        self._wait = DeviceWait(device) if device.type == "cuda" else HostWait()
        trainer.add_event_handler(Events.STARTED, self._reset_rule)
        trainer.add_event_handler(RunEvents.RESTORE, self._start_window)
        trainer.add_event_handler(Events.GET_BATCH_STARTED, self._start_wait)
        trainer.add_event_handler(Events.GET_BATCH_COMPLETED, self._end_wait)
        trainer.add_event_handler(MetricsEvents.LOGGED, self._judge)
        trainer.metrics.gauge("time/samples_per_second", lambda: self._samples_per_second(trainer))
        trainer.metrics.gauge("time/step", self._seconds_per_iteration)
        trainer.metrics.gauge("time/data", self._seconds_for_data)
        if device.type == "cuda":
            trainer.metrics.gauge(
                "memory/allocated", lambda: torch.cuda.max_memory_allocated(device) / GIB
            )
            trainer.metrics.gauge(
                "memory/reserved", lambda: torch.cuda.max_memory_reserved(device) / GIB
            )

    def _reset_rule(self, trainer: Trainer) -> None:
        if trainer.state.iteration == 0:
            self.findings.clear()
            self._rule.start()

    def _start_window(self, _: Trainer) -> None:
        self._since = perf_counter()
        self._iterations = self._samples = 0
        self._wait.clear()

    def _start_wait(self, trainer: Trainer) -> None:
        self._wait.start()
        if self._iterations:
            self._samples += _samples(trainer)  # of the previous iteration
        else:
            self._since = perf_counter()

    def _end_wait(self, _: Trainer) -> None:
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
        if "time/step" not in record.values:  # the record of an evaluation
            return
        finding = self._rule.judge(record.step, self._wait.read(), self._seconds)
        if finding is not None:
            self.findings.append(finding)
            if rank() == 0:
                logger.warning("%s", finding)
        self._start_window(trainer)


def _samples(trainer: Trainer) -> int:
    return getattr(trainer.state.output, "batch_size", 0)
