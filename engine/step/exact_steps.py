"""Recovery of a failed step: it is undone, or finished if its update was made."""

from __future__ import annotations

import logging
from typing import Any

import torch
from ignite.engine import Events
from torch import nn

from diptych.engine.events import EvaluationEvents, StepEvents
from diptych.engine.loop.continued_events import STEP
from diptych.engine.loop.event_loop import EventLoop
from diptych.engine.metrics.metrics_collector import MetricsCollector
from diptych.engine.modules import TrainingModes
from diptych.engine.step.step_snapshot import Failed, StepSnapshot, reset_unscaling
from diptych.engine.step.train_step import StepOutput, TrainStep

logger = logging.getLogger(__name__)


class ExactSteps(EventLoop):
    """An `EventLoop` whose steps update weights, and are continued exactly after an exception.

    A step that raises before its update is undone, and repeated by the next `run`. An update that
    was made counts, and the rest of its iteration is done then.
    """

    model: nn.Module
    loss: nn.Module
    scaler: torch.amp.GradScaler | None
    metrics: MetricsCollector
    _snapshot: StepSnapshot | None
    _modes: TrainingModes

    @property
    def resting_parts(self) -> list[nn.Module]:
        """The parts of model and loss that are in eval mode in the next step."""
        return self._modes.resting

    def _forget_failure(self) -> None:
        super()._forget_failure()
        self._unreported: dict[str, dict[str, float]] = {}
        reset_unscaling(self.scaler)
        if isinstance(self._process_function, TrainStep):
            self._process_function.unfinished = None

    def make_update(self, batch: Any) -> Any:
        """Call the step with a batch outside of any run, and return its output."""
        try:
            return super().make_update(batch)
        finally:
            if isinstance(self._process_function, TrainStep):  # the next call has another batch
                self._process_function.unfinished = None

    @property
    def _has_unfinished_update(self) -> bool:
        step = self._process_function
        return isinstance(step, TrainStep) and step.unfinished is not None

    def _call_step(self, batch: Any) -> Any:
        if not (self.model.training and self.loss.training):
            self._modes.train()  # a handler has evaluated, with other code than this library's
        elif not self._position.epoch_iteration:
            self._modes.remember()
        if self._snapshot is None:
            return super()._call_step(batch)
        if getattr(self._process_function, "unfinished", None) is None:
            self._snapshot.take()
        try:
            return super()._call_step(batch)
        except BaseException:
            self._judge_step(self._snapshot)
            raise

    def _judge_step(self, snapshot: StepSnapshot) -> None:
        """Undo a step that has raised before its update; let one after its update count."""
        own = not isinstance(self._process_function, TrainStep)
        after = self._has_unfinished_update
        failed = Failed.AFTER_UPDATE if after else snapshot.judge(by_members=own)
        if failed is Failed.AFTER_UPDATE:
            self._count_update()
        elif failed is Failed.INSIDE_UPDATE:
            self._refuse(
                f"the optimizer raised in iteration {self.state.iteration} after it had changed "
                "some of the weights"
            )
        elif lost := snapshot.restore():
            self._refuse(
                f"the step raised in iteration {self.state.iteration} after it had changed the "
                f"buffers {', '.join(lost)}, which had never changed before"
            )

    def _count_update(self) -> None:
        """Note what an exception behind an update has left of its iteration."""
        step, last = self._process_function, StepEvents.OPTIMIZER_STEPPED
        returned = self._returned_of(last)
        fired: Any = self.last_event_name
        has_fired = returned is None and fired is last
        if isinstance(step, TrainStep) and not has_fired and step.keep_update():
            self._stopped_at[last.name] = returned or self._stopped_at.get(last.name, ())
            return
        logger.warning(
            "The step raised in iteration %d after an update. The update counts, and the rest of "
            "the step is left out.",
            self.state.iteration,
        )
        del self._stopped_at[STEP]
        self._stopped_at[Events.ITERATION_COMPLETED.name] = ()
        if not has_fired:
            self._stopped_at[last.name] = returned or ()

    @property
    def plain_output(self) -> Any:
        """The last step's output as a checkpoint can hold it, for `restore_output`."""
        output: Any = self.state.output
        return output._asdict() if isinstance(output, StepOutput) else output

    def restore_output(self, output: Any) -> None:
        """Put an output that `plain_output` has returned into `state.output`."""
        is_own = isinstance(self._process_function, TrainStep) and isinstance(output, dict)
        restored: Any = StepOutput(**output) if is_own else output
        self.state.output = restored

    def fire_and_report(self, event: Any) -> None:
        """Fire an event, and report what its handlers publish as a record of this iteration.

        `EPOCH_COMPLETED`, `EPOCH_PUBLISHED`, `EVALUATED` and `COMPLETED` fire in this way: a value
        that a handler publishes there belongs to the epoch, the evaluation or the run that has
        ended. After an exception, the next call continues the event, with the values that were
        published before.
        """
        reported = self.metrics.record
        try:
            values = self._unreported.get(event.name)  # if all handlers have returned
            if values is None:
                # A state that is saved here holds what was published before: a start after a kill
                # repeats COMPLETED, and one after TERMINATE continues the run.
                ends = event in {Events.COMPLETED, Events.TERMINATE}
                with self.metrics.collected_apart(event.name, repeated=ends) as values:
                    self._fire(event)
            if values:
                self._unreported[event.name] = values
                self.state.metrics.update(values)
                self.metrics.report(self.state.iteration, values)
                del self._unreported[event.name]
        except BaseException:
            if event is EvaluationEvents.EVALUATED:  # the evaluation is made again
                self.metrics.expect_again(reported)
            raise
