"""The events that a run fires beside Ignite's own, and the loop as pseudocode.

```text
RunEvents.RESTORE                       the last moment to load a state: the start is decided next
STARTED
  EPOCH_STARTED                         once an epoch, not again when it is resumed half way
    GET_BATCH_STARTED, GET_BATCH_COMPLETED
    ITERATION_STARTED
      StepEvents.FORWARD_COMPLETED      trainer.outputs: the task's named tensors, on the device
      StepEvents.LOSS_COMPUTED          trainer.terms: the loss's named terms
      StepEvents.GRADIENTS_READY        unscaled, averaged over ranks: look, clip, balance
      StepEvents.OPTIMIZER_STEPPED      schedules, weight averages, momentum encoders
    ITERATION_COMPLETED
    MetricsEvents.LOGGED                every log point: one transfer, a plain dict of floats
    RunEvents.SAFE_POINT                nothing is pending: save here
  EPOCH_COMPLETED
    EvaluationEvents.EVALUATED          val/... are in trainer.state.metrics
  RunEvents.SAFE_POINT                  the last iteration's, after the epoch's own handlers
                                        instead; where nobody could know before that it was the
                                        last, again, and not for what chooses iterations (every=n)
COMPLETED | TERMINATE | INTERRUPT | EXCEPTION_RAISED
RunEvents.RELEASE                       whatever happened: let go of what was taken at RESTORE
```

`RunEvents.SAVED` comes where a handler has saved the run, mostly at a safe point. Every event takes
Ignite's filters; `every=n` counts iterations for all events of this module.
"""

from ignite.engine import EventEnum


class StepEvents(EventEnum):
    """The phases of one update, in the order in which they fire.

    In pieces (`microbatch_size`) each of them still fires once an update, after the last piece.
    """

    FORWARD_COMPLETED = "forward_completed"
    LOSS_COMPUTED = "loss_computed"
    GRADIENTS_READY = "gradients_ready"
    OPTIMIZER_STEPPED = "optimizer_stepped"


class MetricsEvents(EventEnum):
    """`LOGGED` fires when `trainer.metrics.record` holds new values for the sinks."""

    LOGGED = "metrics_logged"


class EvaluationEvents(EventEnum):
    """`EVALUATED` fires when an evaluation has put its values into `trainer.state.metrics`."""

    EVALUATED = "evaluated"


class RunEvents(EventEnum):
    """When a whole run may be loaded (`RESTORE`) and saved (`SAFE_POINT`), and when it is over.

    `SAVED` follows each checkpoint on every rank: at a safe point, at the end, or by hand; a thread
    may still be writing it. `RELEASE` follows every `RESTORE`, however the run between them ends.
    """

    RESTORE = "restore"
    SAFE_POINT = "safe_point"
    SAVED = "saved"
    RELEASE = "release"


ITERATION_EVENTS: tuple[EventEnum, ...] = (
    *StepEvents,
    *MetricsEvents,
    *EvaluationEvents,
    *RunEvents,
)
"""The events above, all counted in iterations (`every=n` fires when the iteration is a multiple of
n)."""
