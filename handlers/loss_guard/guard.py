"""LossGuard: catches batches whose loss or gradient is not finite or spikes, and records them."""

from __future__ import annotations

import functools
import logging
import math
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import attrs
import torch
from ignite.engine import Events
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from diptych.engine.checks import whole_number
from diptych.engine.distributed.collectives import all_reduce_sum, rank, world_size
from diptych.engine.distributed.gathering import gather_values
from diptych.engine.errors import CheckpointError
from diptych.engine.events import MetricsEvents, StepEvents
from diptych.engine.handler import Change, Handler
from diptych.engine.random_state import (
    ForwardRandomState,
    forward_random_state,
    preserved_random_state,
    random_state,
    set_forward_random_state,
)
from diptych.engine.trainer import Trainer
from diptych.handlers.argument_checks import Validator, one_of, positive
from diptych.handlers.before_step import BeforeStep
from diptych.handlers.loss_guard.fault_records import (
    record_path,
    sample_ids,
    update_state,
    write_record,
)
from diptych.handlers.loss_guard.running_median import RunningMedian
from diptych.handlers.optimization.gradient_norms import (
    GradientNorms,
    held_parameters,
    shared_norms,
)
from diptych.handlers.optimization.modality_balancing import ModalityBalancing

logger = logging.getLogger(__name__)

Policy = Literal["skip", "stop", "raise"]
_positive_or_none: Validator = attrs.validators.optional(positive)


class FaultError(RuntimeError):
    """Raised when an update went wrong, or when too many updates were skipped."""


@runtime_checkable
class SavesCheckpoints(Protocol):
    """A handler that saves checkpoints, such as `CheckpointManager`."""

    def get_latest_checkpoint(self) -> Path | None:
        """Return the path of the newest checkpoint."""


@attrs.define(eq=False)
class LossGuard(Handler):
    """Catches a batch whose loss or gradient is not finite or spikes, before the optimizer steps.

    Two numbers are judged: the loss, averaged over ranks, and the norm of all gradients before
    clipping. Each is compared with its last `window` values. It is a spike if it exceeds their
    median by more than `spike` times their median distance from the median, or `spike` times a
    tenth of the median if that is larger. Values of caught batches do not enter the window; until
    it is full, only values that are not finite are caught. All ranks judge the same two numbers and
    come to the same decision.

    A caught batch changes no parameter and no state of the optimizer; momentum and weight decay
    have no effect either. The buffers of model and loss (the statistics of a batch norm, a queue of
    features) are restored. Its loss is still published: the mean of a window or an epoch that
    contains a NaN is NaN. What follows depends on `policy`:

    - "skip": the run continues. More than `budget` such batches in a run end it with an error.
    - "stop": the run ends after this iteration, as with `trainer.terminate()`.
    - "raise": a `FaultError` with the values and the path of the record.

    In fp16, a gradient that is not finite while the loss is finite is left to the scaler, which
    finds its scale that way, skips the update itself and counts it in `train/skipped_steps`.

    With a `directory`, the first `records` caught batches are each written into it, one file per
    rank: the batch, the ids of its samples if they are known, the weights, buffers and random state
    before the update, terms, norms, and the path of the latest checkpoint.
    `diptych replay RECORD --factory module:function` repeats the update. The files load with
    `weights_only=True`.

    Published: `guard/caught`, the batches caught so far in the run, and `guard/spikes`, the number
    of them with finite values.

    Event: `Events.ITERATION_STARTED`, `StepEvents.GRADIENTS_READY`, `MetricsEvents.LOGGED`. Attach
        it before `ModalityBalancing`.
    Cost: a copy of the buffers, the gradients' norm (shared with `GradientDiagnostics`), about
        twenty operations on a few numbers, and with several ranks one all-reduce of two numbers.
        Synchronisation: none under "skip" without a `directory` if the optimizer can skip an update
        on the device: torch's Adam, AdamW and SGD with `fused=True` (SGD with momentum from its
        second update on). Caught batches are then logged, and the budget is checked, at the next
        log point. In all other cases the host waits for the gradients once an iteration, because it
        must decide before it queues the next operation. On a CPU that is free; on a GPU the host
        loses the time by which it otherwise runs ahead. A record takes the time to write the
        weights.

    Args:
        directory: the folder of the records; None: write none.
        policy: "skip", "stop" or "raise".
        budget: batches that may be skipped in a run, >= 0.
        spike: threshold in median distances, > 0; None: catch only values that are not finite.
        window: values that the median is computed from, >= 1.
        records: batches to record, >= 0.
        ids: the key of the samples' ids in a batch.

    Attributes:
        caught: batches caught so far; if the host does not wait, as of the last log point.

    Raises:
        ValueError: if an argument is out of range; when attached, if the trainer has a guard
            already, or a `ModalityBalancing`, which scales the gradients.
        FaultError: while running: under "raise", or if the budget is exceeded.
    """

    changes: ClassVar[frozenset[Change]] = frozenset(
        {Change.GRADIENTS, Change.WEIGHTS, Change.BUFFERS, Change.RUN_LENGTH}
    )
    collective: ClassVar[bool] = True

    directory: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    policy: Policy = attrs.field(default="skip", validator=one_of(Policy), kw_only=True)
    budget: int = attrs.field(default=10, validator=whole_number(0), kw_only=True)
    spike: float | None = attrs.field(default=20.0, validator=_positive_or_none, kw_only=True)
    window: int = attrs.field(default=100, validator=whole_number(), kw_only=True)
    records: int = attrs.field(default=3, validator=whole_number(0), kw_only=True)
    ids: str = attrs.field(default="id", kw_only=True)
    caught: int = attrs.field(default=0, init=False)
    _counts: Tensor = attrs.field(factory=lambda: torch.zeros(2), init=False, repr=False)
    _median: RunningMedian = attrs.field(init=False, repr=False)
    _skip: Tensor | None = attrs.field(default=None, init=False, repr=False)
    _before: list[tuple[nn.Module, str, Tensor]] = attrs.field(factory=list, init=False, repr=False)
    _random: ForwardRandomState | None = attrs.field(default=None, init=False, repr=False)
    _before_judging: BeforeStep[tuple[Tensor, Tensor | None, int]] = attrs.field(
        factory=BeforeStep, init=False, repr=False
    )

    def __attrs_post_init__(self) -> None:
        self._median = RunningMedian(self.window, self.spike or math.inf)

    def attach(self, trainer: Trainer) -> None:
        """Judge each of the trainer's updates before the optimizer steps."""
        if trainer.handlers_of(LossGuard):
            raise ValueError("a trainer must have one LossGuard, got a second one")
        if trainer.handlers_of(ModalityBalancing):
            raise ValueError(
                "LossGuard must be attached before ModalityBalancing, got it after: it judges and "
                "records the gradients of the loss. Attach it first"
            )
        shared_norms(trainer).attach(trainer)
        self._counts = self._counts.to(trainer.device)
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(Events.ITERATION_STARTED, self._remember)
        trainer.add_event_handler(StepEvents.GRADIENTS_READY, self._judge)
        trainer.add_event_handler(MetricsEvents.LOGGED, self._report_caught)
        trainer.metrics.gauge("guard/caught", lambda: self._counts[0])
        trainer.metrics.gauge("guard/spikes", lambda: self._counts[1])
        trainer.optimizer.register_step_pre_hook(functools.partial(self._before_step, trainer))
        trainer.optimizer.register_step_post_hook(functools.partial(self._after_step, trainer))

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and the values in the window."""
        return {"counts": self._counts.tolist(), "values": self._median.to_lists()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        self._counts = torch.tensor(state_dict["counts"], device=self._counts.device)
        self.caught = int(state_dict["counts"][0])
        self._before_judging.forget()
        self._median.from_lists(state_dict["values"])

    def _start(self, trainer: Trainer) -> None:
        if trainer.state.iteration == 0:
            self._counts, self.caught = torch.zeros_like(self._counts), 0
            self._before_judging.forget()
            self._median.reset()

    def _remember(self, trainer: Trainer) -> None:
        """Copy the buffers, which the forward pass changes before the update is judged."""
        self._skip = None
        self._before = [
            (module, name, buffer.detach().clone())
            for part in (trainer.model, trainer.loss)
            for module in part.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        if self.directory is not None and self.records:
            self._random = forward_random_state(trainer.device)

    def _judge(self, trainer: Trainer) -> None:
        memory = (self._counts, self._median.values, self.caught)
        memory = self._before_judging.of(trainer, memory)
        self._counts, self._median.values, self.caught = memory
        measured = shared_norms(trainer).measure(trainer)
        values = _agreed(_loss_of(trainer, measured.total.device), measured.total)
        finite = values.isfinite()
        spikes = values > self._median.limits(values)
        spiked = spikes.any() & finite.all()
        # An overflow while the scaler searches for its scale is no fault: it skips that update.
        judged = finite if trainer.scaler is None else finite[:1]
        bad = spiked | ~judged.all()
        self._median.add(values, ~bad & finite.all())
        self._counts = self._counts + torch.stack([bad, spiked])
        if self.policy == "skip" and self.directory is None and _skips_on_device(trainer):
            self._skip = bad.float()
            self._restore_buffers(bad)
        elif bool(bad):
            self._catch(trainer, measured, values)

    def _before_step(self, trainer: Trainer, optimizer: Any, *_: Any) -> None:
        """Set the optimizer's `found_inf`, as torch's scaler does, so that it skips the update."""
        if self._skip is not None:
            found = self._skip
            if trainer.scaler is not None:
                found = torch.maximum(found, optimizer.found_inf)
            optimizer.found_inf = found

    def _after_step(self, trainer: Trainer, optimizer: Any, *_: Any) -> None:
        if self._skip is not None and trainer.scaler is None:
            del optimizer.found_inf

    def _restore_buffers(self, bad: Tensor | None = None) -> None:
        """Restore the buffers, also replaced ones; with a tensor `bad`, only if it is true."""
        with torch.no_grad():
            for module, name, before in self._before:
                now = getattr(module, name)
                if now is None or now.shape != before.shape:
                    setattr(module, name, before)
                else:
                    now.copy_(before if bad is None else torch.where(bad, before, now))

    def _catch(self, trainer: Trainer, measured: GradientNorms, values: Tensor) -> None:
        self._restore_buffers()
        self.caught += 1
        loss, norm = values.tolist()
        message = (
            f"iteration {trainer.state.iteration}: the loss is {loss:.6g} and the norm of the "
            f"gradients is {norm:.6g}"
        )
        record = self._record(trainer, measured)
        if record is not None:
            message += f"; recorded in {record}"
        if self.policy == "raise":
            raise FaultError(f"{message}. Pass policy='skip' to skip such batches")
        for parameter in held_parameters(trainer):
            parameter.grad = None  # an optimizer skips parameters without gradient
        if self.policy == "stop":
            logger.warning("LossGuard stopped the run at %s", message)
            trainer.terminate()
        else:
            logger.warning("LossGuard skipped the update of %s", message)
            self._check_budget()

    def _check_budget(self) -> None:
        if self.caught > self.budget:
            raise FaultError(
                f"the run may skip {self.budget} updates, got {self.caught}. Lower the learning "
                "rate or lengthen the warm-up, inspect the caught batches (LossGuard(directory), "
                "diptych replay), resume from a checkpoint before the first, or raise the budget"
            )

    def _report_caught(self, trainer: Trainer) -> None:
        caught = int(trainer.metrics.record.values.get("guard/caught", 0))
        if caught > self.caught:
            logger.warning(
                "LossGuard skipped %d updates up to iteration %d: the loss or a gradient was not "
                "finite or spiked.\nLossGuard(directory) records such batches.",
                caught - self.caught,
                trainer.state.iteration,
            )
            self.caught = caught
            self._check_budget()

    def _record(self, trainer: Trainer, measured: GradientNorms) -> Path | None:
        """Write a record of the update; return its path, or None if none was written."""
        if self.directory is None or self._random is None:
            return None
        path = record_path(self.directory, trainer.state.iteration, rank())
        own = set(self.directory.glob(f"iteration_*_rank_{rank()}.pt")) - {path}
        # All ranks or none, because the weights of a sharded model are gathered.
        if any(gather_values(len(own) >= self.records)):
            return None
        with preserved_random_state():
            set_forward_random_state(self._random, trainer.device)
            random = random_state()
        batch = trainer.state.batch
        record = {
            **update_state(trainer),
            "batch": batch,
            "ids": sample_ids(trainer, batch, self.ids),
            "random": random,
            "terms": {name: value.cpu() for name, value in trainer.terms.items()},
            "norms": measured.by_name(trainer),
            "checkpoint": _latest_checkpoint(trainer),
        }
        try:
            write_record(path, record)
        except CheckpointError as error:
            message = "LossGuard could not record the batch of iteration %d; the run continues: %s"
            logger.error(message, trainer.state.iteration, error)  # noqa: TRY400 - no traceback
            return None
        return path


def _skips_on_device(trainer: Trainer) -> bool:
    """Return whether a trainer's optimizer can skip its next update on the device."""
    optimizer, *others = trainer.optimizers
    groups = optimizer.param_groups
    if (
        others
        or type(optimizer) not in {Adam, AdamW, SGD}
        or not all(g.get("fused") for g in groups)
    ):
        return False
    # If a fused SGD skips its very first update, its momentum buffers stay uninitialised.
    with_momentum = [p for g in groups if g.get("momentum") for p in g["params"]]
    states = [optimizer.state.get(p, {}) for p in with_momentum if p.grad is not None]
    return all("momentum_buffer" in state for state in states)


def _loss_of(trainer: Trainer, device: torch.device) -> Tensor:
    if not trainer.terms:  # a custom step may set none
        return torch.zeros((), device=device)
    return functools.reduce(operator.add, trainer.terms.values()).detach()


def _agreed(loss: Tensor, norm: Tensor) -> Tensor:
    """Return the means of loss and norm over ranks [2]; not finite if one rank's is not."""
    values = torch.stack([loss.float().to(norm.device), norm.float()])
    return all_reduce_sum(values) / world_size()


def _latest_checkpoint(trainer: Trainer) -> str | None:
    found = [handler.get_latest_checkpoint() for handler in trainer.handlers_of(SavesCheckpoints)]
    return str(found[0]) if found and found[0] is not None else None
