"""The events of a run besides Ignite's own, and the loop as pseudocode.

```text
RunEvents.RESTORE                       the last event before the start position is fixed: load here
STARTED
  EPOCH_STARTED                         once per epoch; not again if the epoch is resumed
    GET_BATCH_STARTED, GET_BATCH_COMPLETED
    ITERATION_STARTED
      StepEvents.FORWARD_COMPLETED      trainer.outputs: the task's named tensors, on the device
      StepEvents.LOSS_COMPUTED          trainer.terms: the loss's named terms
      StepEvents.GRADIENTS_READY        unscaled and averaged over ranks: inspect, clip, balance
      StepEvents.OPTIMIZER_STEPPED      schedules, weight averages, momentum encoders
    ITERATION_COMPLETED
    MetricsEvents.LOGGED                at a log point, as the first listener of SAFE_POINT
    RunEvents.SAFE_POINT                nothing is pending: save here
  EPOCH_COMPLETED
    EvaluationEvents.BATCH_EVALUATED    after each batch of an evaluation: leave it by raising
    EvaluationEvents.EVALUATED          val/... are in trainer.state.metrics
  MetricsEvents.EPOCH_PUBLISHED         every value of the epoch is known: best, patience, curricula
  RunEvents.SAFE_POINT                  of the last iteration, after the epoch's handlers; a second
                                        time, without the handlers that select iterations (every=n),
                                        if nothing could tell before that the epoch had ended
RunEvents.EPOCH_CUT                     max_iters ends the run inside an epoch: evaluate here
MetricsEvents.CUT_PUBLISHED             every value of that end is known
COMPLETED | TERMINATE | INTERRUPT | EXCEPTION_RAISED
RunEvents.ENDED                         once per run() call, however it ended: see trainer.outcome
```

A log point is every iteration that is a multiple of `log_every`, and the end of an epoch and of a
run. `RunEvents.SAVED` fires when a handler has saved the run, usually at a safe point. Every event
takes Ignite's filters; `every=n` counts iterations for all events of this module.
"""

from __future__ import annotations

import enum

from ignite.engine import EventEnum


class StepEvents(EventEnum):
    """The phases of one update, in the order in which they fire.

    With `microbatch_size`, each fires once per update, after the last piece.
    """

    FORWARD_COMPLETED = "forward_completed"
    LOSS_COMPUTED = "loss_computed"
    GRADIENTS_READY = "gradients_ready"
    OPTIMIZER_STEPPED = "optimizer_stepped"


class MetricsEvents(EventEnum):
    """`LOGGED` fires when `trainer.metrics.record` holds new values for the sinks.

    `EPOCH_PUBLISHED` follows every handler of `EPOCH_COMPLETED`: the values of the epoch are
    complete, those of its evaluations included. `CUT_PUBLISHED` follows those of
    `RunEvents.EPOCH_CUT` in the same way.
    """

    LOGGED = "metrics_logged"
    EPOCH_PUBLISHED = "epoch_published"
    CUT_PUBLISHED = "cut_published"


class EvaluationEvents(EventEnum):
    """`EVALUATED` fires when an evaluation has put its values into `trainer.state.metrics`.

    `BATCH_EVALUATED` fires after each of its batches, in one process; over ranks, equally often on
    all of them. A handler may raise to leave the evaluation: nothing of it is published then.
    """

    EVALUATED = "evaluated"
    BATCH_EVALUATED = "batch_evaluated"


class RunEvents(EventEnum):
    """When a whole run may be loaded (`RESTORE`) and saved (`SAFE_POINT`), and when it has ended.

    `SAVED` follows each checkpoint on every rank: at a safe point, at the end, or by hand; a thread
    may still be writing it. `EPOCH_CUT` fires once before `COMPLETED` if `max_iters` ends the run
    inside an epoch, for which `EPOCH_COMPLETED` does not fire: what is due at an epoch's end is due
    for the last weights. `ENDED` fires once for each `RESTORE`, however the run ended;
    `trainer.outcome` says how. `RELEASE` is its earlier name.
    """

    RESTORE = "restore"
    SAFE_POINT = "safe_point"
    SAVED = "saved"
    EPOCH_CUT = "epoch_cut"
    ENDED = "ended"
    RELEASE = "ended"


class Outcome(enum.Enum):
    """How a call of `run` ended.

    Attributes:
        COMPLETED: everything that was asked for is done.
        TERMINATED: `terminate()` ended the run; another `run` may continue it.
        INTERRUPTED: `interrupt()` paused the run; another `run` continues it without `STARTED`.
        FAILED: an exception reached the caller.
    """

    COMPLETED = "completed"
    TERMINATED = "terminated"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


ITERATION_EVENTS: tuple[EventEnum, ...] = (
    *StepEvents,
    *MetricsEvents,
    *EvaluationEvents,
    *RunEvents,
)
"""The events above. All are counted in iterations: `every=n` fires at multiples of n."""
