"""Traces of a few iterations by torch's profiler."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import torch
from ignite.engine import Events
from torch.profiler import ProfilerActivity, profile, schedule

from diptych.engine.distributed.collectives import rank
from diptych.engine.events import RunEvents
from diptych.handlers.files import make_folder
from diptych.handlers.output.output_handler import OutputHandler
from diptych.handlers.run_directory import absolute

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer

ROWS = 40  # of the table of operators


@attrs.define(eq=False)
class Profile(OutputHandler):
    """Traces a few iterations with `torch.profiler`, on the host and the device.

    ```python
    trainer.attach(Profile(run_dir / "profile"))
    ```

    Each rank writes two files, named after the rank and the last iteration: the trace
    `rank0.15.pt.trace.json`, for `chrome://tracing`, Perfetto and TensorBoard's profiler plugin,
    and `rank0.15.operators.txt`, a table of the slowest operators. The window starts when its first
    batch is fetched. If the run ends inside the window, the iterations so far are written.

    Event: `STARTED`, `ITERATION_COMPLETED`, `RunEvents.ENDED`.
    Cost: a tenth of a microsecond an iteration outside the window. Inside it the profiler slows the
        run down; writing takes a second or more, and a few MB of disk for each iteration.

    Args:
        directory: of the files; created if missing.
        skip: iterations of this run before the window, >= 1: the first ones are not typical, and
            the last of them warms up the profiler.
        steps: iterations of the window, >= 1.
        shapes: whether to record the shapes of the operators' inputs.
        memory: whether to record allocations.

    Raises:
        ValueError: if a number is below 1.
    """

    directory: Path = attrs.field(converter=absolute)
    skip: int = attrs.field(default=10, validator=attrs.validators.ge(1), kw_only=True)
    steps: int = attrs.field(default=5, validator=attrs.validators.ge(1), kw_only=True)
    shapes: bool = attrs.field(default=False, kw_only=True)
    memory: bool = attrs.field(default=False, kw_only=True)
    _left: int = attrs.field(default=0, init=False, repr=False)
    _profiler: profile | None = attrs.field(default=None, init=False, repr=False)

    def attach(self, trainer: Trainer) -> None:
        """Trace a window of the trainer's next run, on every rank."""
        self.attach_guarded(trainer)

    @property
    def destination(self) -> str:
        """The directory."""
        return str(self.directory)

    def listen(self, trainer: Trainer) -> None:
        """Trace a window of the trainer's next run."""
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        trainer.add_event_handler(RunEvents.ENDED, self._end)

    def _start(self, trainer: Trainer) -> None:
        self._left = self.skip + self.steps
        if self.skip == 1:
            self._open(trainer)

    def _step(self, trainer: Trainer) -> None:
        if not self._left:
            return
        self._left -= 1
        if self._profiler is not None:
            self._synchronize(trainer)
            if self._left:
                self._profiler.step()
            else:
                self._end(trainer)
        elif self._left == self.steps + 1:
            self._open(trainer)

    def _open(self, trainer: Trainer) -> None:
        activities = [ProfilerActivity.CPU]
        if trainer.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=1, active=self.steps + 1),
            on_trace_ready=lambda profiler: self._write(profiler, trainer.state.iteration),
            record_shapes=self.shapes,
            profile_memory=self.memory,
        )
        self._profiler.start()

    def _synchronize(self, trainer: Trainer) -> None:
        """Wait for the device at both ends of the window, so that the trace is complete."""
        if trainer.device.type != "cpu" and self._left in {0, self.steps}:
            torch.accelerator.synchronize(trainer.device)

    def _end(self, _: Trainer) -> None:
        profiler, self._profiler, self._left = self._profiler, None, 0
        if profiler is not None:
            profiler.stop()

    def _write(self, profiler: profile, iteration: int) -> None:
        with self.tolerated(lost=1):
            self._export(profiler, f"rank{rank()}.{iteration}")

    def _export(self, profiler: profile, stem: str) -> None:
        make_folder(self.directory)
        profiler.export_chrome_trace(str(self.directory / f"{stem}.pt.trace.json"))
        order = "self_cpu_time_total"
        if ProfilerActivity.CUDA in profiler.activities:
            order = "self_cuda_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=ROWS)
        (self.directory / f"{stem}.operators.txt").write_text(f"{table}\n", encoding="utf-8")
