"""Keeps a batch whose loss or gradient went wrong from doing harm, and keeps it to look at."""

from __future__ import annotations

import functools
import logging
import math
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import attrs
import torch
from ignite.engine import Events
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from diptych.engine.checks import whole_number
from diptych.engine.distributed.collectives import rank, sum_over_ranks, world_size
from diptych.engine.distributed.gathering import from_all_ranks
from diptych.engine.errors import CheckpointError
from diptych.engine.events import MetricsEvents, StepEvents
from diptych.engine.random_state import (
    ForwardRandomState,
    forward_random_state,
    preserved_random_state,
    random_state,
    set_forward_random_state,
)
from diptych.engine.trainer import Trainer
from diptych.handlers.checkpointing.checkpoint_manager import CheckpointManager
from diptych.handlers.components import parameter_names
from diptych.handlers.loss_guard.fault_records import (
    NAME,
    record_path,
    sample_ids,
    update_state,
    write_record,
)
from diptych.handlers.loss_guard.spikes import RunningMedian
from diptych.handlers.optimization.gradient_norms import (
    GradientNorms,
    held_parameters,
    shared_norms,
)
from diptych.handlers.optimization.modality_balancing import ModalityBalancing

logger = logging.getLogger(__name__)

Policy = Literal["skip", "stop", "raise"]


class FaultError(RuntimeError):
    """An update went wrong, or too many did."""


def _check_policy(_: Any, __: attrs.Attribute[str], value: object) -> None:
    if value not in get_args(Policy):
        raise ValueError(f"policy must be one of {', '.join(get_args(Policy))}, got {value!r}")


def _check_spike(_: Any, __: attrs.Attribute[Any], value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise ValueError(f"spike must be > 0 and finite, or None, got {value!r}")


@attrs.define(eq=False)
class LossGuard:
    """Catches a batch whose loss or gradient is not finite, or spikes, before the optimizer steps.

    The loss (over ranks: its mean) and the norm of all gradients, before clipping, are each held
    against their last `window` values: what lies more than `spike` times their median distance
    from the median above the median is caught (and never less than a tenth of the median, times
    `spike`). Values that were caught do not enter the window; until it is full, only what is not
    finite is caught. All ranks judge the same two numbers, so all do the same.

    A batch that is caught changes no parameter and no state of the optimizer; momentum and weight
    decay do not act either. The buffers of model and loss (a batch norm's statistics, a queue of
    features) go back to what they were before it. Its loss is published as it is: a window or
    an epoch with a loss that is NaN has a mean that is NaN. Then, by `policy`:

    - "skip": the run goes on. More than `budget` such batches in a run end it with an error.
    - "stop": the run ends with this iteration, as `trainer.terminate()` ends it.
    - "raise": a `FaultError` names what was seen, and the record.

    In fp16 a gradient that is not finite while the loss is finite is left to the scaler, which
    looks for its scale that way, skips the update itself and counts `train/skipped_steps`.

    With a `directory`, the first `records` batches that are caught are each written into it, one
    file a rank: the batch, the ids of its samples where they are known, the weights, buffers and
    random state from which the update started, terms, norms and the latest checkpoint.
    `diptych replay RECORD --factory module:function` repeats the update. They load with
    `weights_only=True`.

    Published: `guard/caught`, the batches caught so far in the run, and `guard/spikes`, those of
    them that were finite.

    Event: `Events.ITERATION_STARTED`, `StepEvents.GRADIENTS_READY`, `MetricsEvents.LOGGED`. Attach
        it before `ModalityBalancing`.
    Cost: a copy of the buffers, the gradients' norm (shared with `GradientDiagnostics`), some
        twenty operations on few numbers, and over ranks one all-reduce of two numbers.
        Synchronisation: none under "skip" without a `directory` where the optimizer can leave an
        update out by itself on the device: torch's Adam, AdamW and SGD with `fused=True` (SGD
        with momentum from its second update on). What was caught is then told, and the budget
        checked, at the next log point. In all other cases the host waits for the gradients once
        an iteration, since it must decide before the next operation is queued: on a CPU that is
        free; on a GPU the time that the host otherwise works ahead is lost. A record takes the
        time to write the weights.

    Args:
        directory: of the records; None writes none.
        policy: "skip", "stop" or "raise".
        budget: batches that "skip" may leave out in a run, >= 0.
        spike: see above, > 0; None catches only what is not finite.
        window: values that the median is taken of, >= 1.
        records: batches to keep, >= 0.
        ids: the name under which a batch has the ids of its samples, if it has.

    Attributes:
        caught: batches caught so far, as of the last log point where nothing waits.

    Raises:
        ValueError: if an argument is out of range; when attached, if the trainer has a guard
            already, or balances gradients before it.
        FaultError: while running: under "raise", or when the budget is exceeded.
    """

    changes: ClassVar[tuple[str, ...]] = ("gradients", "weights")

    directory: Path | None = attrs.field(default=None, converter=attrs.converters.optional(Path))
    policy: Policy = attrs.field(default="skip", validator=_check_policy, kw_only=True)
    budget: int = attrs.field(default=10, validator=whole_number(0), kw_only=True)
    spike: float | None = attrs.field(default=20.0, validator=_check_spike, kw_only=True)
    window: int = attrs.field(default=100, validator=whole_number(), kw_only=True)
    records: int = attrs.field(default=3, validator=whole_number(0), kw_only=True)
    ids: str = attrs.field(default="id", kw_only=True)
    caught: int = attrs.field(default=0, init=False)
    _counts: Tensor = attrs.field(factory=lambda: torch.zeros(2), init=False, repr=False)
    _median: RunningMedian = attrs.field(init=False, repr=False)
    _skip: Tensor | None = attrs.field(default=None, init=False, repr=False)
    _before: list[tuple[nn.Module, str, Tensor]] = attrs.field(factory=list, init=False, repr=False)
    _random: ForwardRandomState | None = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._median = RunningMedian(self.window, self.spike or math.inf)

    def attach(self, trainer: Trainer) -> None:
        """Judge the trainer's updates before they are made."""
        before = {type(handler) for handler in trainer.handlers}
        if LossGuard in before:
            raise ValueError("a trainer must have one LossGuard, got a second one")
        if ModalityBalancing in before:
            raise ValueError(
                "LossGuard must be attached before ModalityBalancing, got it after: it judges and "
                "records gradients as the loss gives them"
            )
        shared_norms(trainer)
        self._counts = self._counts.to(trainer.device)
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(Events.ITERATION_STARTED, self._remember)
        trainer.add_event_handler(StepEvents.GRADIENTS_READY, self._judge)
        trainer.add_event_handler(MetricsEvents.LOGGED, self._tell)
        trainer.metrics.gauge("guard/caught", lambda: self._counts[0])
        trainer.metrics.gauge("guard/spikes", lambda: self._counts[1])
        trainer.optimizer.register_step_pre_hook(functools.partial(self._before_step, trainer))
        trainer.optimizer.register_step_post_hook(functools.partial(self._after_step, trainer))

    def state_dict(self) -> dict[str, Any]:
        """Return counts and windows, as numbers."""
        return {"counts": self._counts.tolist(), "values": self._median.to_lists()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` returned."""
        self._counts = torch.tensor(state_dict["counts"], device=self._counts.device)
        self.caught = int(state_dict["counts"][0])
        self._median.from_lists(state_dict["values"])

    def _start(self, trainer: Trainer) -> None:
        if trainer.state.iteration == 0:
            self._counts, self.caught = torch.zeros_like(self._counts), 0
            self._median.reset()

    def _remember(self, trainer: Trainer) -> None:
        """Keep what an update changes before it can be judged."""
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
        measured = shared_norms(trainer).measure(trainer)
        values = _agreed(_total(trainer, measured.total.device), measured.total)
        finite = values.isfinite()
        spikes = values > self._median.limits(values)
        spiked = spikes.any() & finite.all()
        # The scaler's search for its scale is no fault: it skips such an update by itself.
        judged = finite if trainer.scaler is None else finite[:1]
        bad = spiked | ~judged.all()
        self._median.add(values, ~bad & finite.all())
        self._counts = self._counts + torch.stack([bad, spiked])
        if self._decides_on_device(trainer.optimizer):
            self._skip = bad.float()
            self._restore_buffers(bad)
        elif bool(bad):
            self._catch(trainer, measured, values)
        self._before, self._random = [], None

    def _decides_on_device(self, optimizer: Optimizer) -> bool:
        return self.policy == "skip" and self.directory is None and _skips_by_itself(optimizer)

    def _before_step(self, trainer: Trainer, optimizer: Any, *_: Any) -> None:
        """Tell the optimizer in the way of torch's scaler whether to leave this update out."""
        if self._skip is not None:
            scalers = None if trainer.scaler is None else optimizer.found_inf
            own = self._skip
            optimizer.found_inf = own if scalers is None else torch.maximum(own, scalers)

    def _after_step(self, trainer: Trainer, optimizer: Any, *_: Any) -> None:
        if self._skip is not None and trainer.scaler is None:
            del optimizer.found_inf

    def _restore_buffers(self, bad: Tensor | None = None) -> None:
        """Put the buffers back, those too that a module has replaced; with `bad`, where it is 1."""
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
            f"iteration {trainer.state.iteration}: the loss is {loss:.6g} and the gradients' norm "
            f"{norm:.6g}"
        )
        record = self._record(trainer, measured)
        if record is not None:
            message += f"; recorded in {record}"
        if self.policy == "raise":
            raise FaultError(f"{message}; policy='skip' leaves such batches out")
        for parameter in held_parameters(trainer):
            parameter.grad = None  # an optimizer leaves alone what has no gradient
        if self.policy == "stop":
            logger.warning("%s; the run stops", message)
            trainer.terminate()
            return
        logger.warning("%s; the update is skipped", message)
        self._check_budget()

    def _check_budget(self) -> None:
        if self.caught > self.budget:
            raise FaultError(
                f"the run may skip {self.budget} updates, got {self.caught}: lower the rate or "
                "lengthen the warm-up, look at what was caught (LossGuard(directory), replay), go "
                "back to a checkpoint before the first, or raise the budget"
            )

    def _tell(self, trainer: Trainer) -> None:
        caught = int(trainer.metrics.record.values.get("guard/caught", 0))
        if caught > self.caught:
            logger.warning(
                "up to iteration %d: %d updates were skipped, whose loss or gradient was not "
                "finite or spiked; LossGuard(directory) records them",
                trainer.state.iteration,
                caught - self.caught,
            )
            self.caught = caught
            self._check_budget()

    def _record(self, trainer: Trainer, measured: GradientNorms) -> Path | None:
        """Write what was caught; return the file, or None where enough is written."""
        if self.directory is None or self._random is None:
            return None
        path = record_path(self.directory, trainer.state.iteration, rank())
        earlier = [p.name for p in self.directory.glob("*.pt") if NAME.fullmatch(p.name)]
        own = {name for name in earlier if name.endswith(f"_rank_{rank()}.pt")} - {path.name}
        # All ranks or none: the weights of a sharded model are gathered from all of them.
        if any(from_all_ranks(len(own) >= self.records)):
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
            "norms": norms_by_name(trainer, measured),
            "checkpoint": _latest_checkpoint(trainer),
        }
        try:
            write_record(path, record)
        except CheckpointError as error:
            logger.error("%s; the run goes on", error)  # noqa: TRY400 - the message says it all
            return None
        return path


def _skips_by_itself(optimizer: Optimizer) -> bool:
    """Say whether an optimizer can leave its next update out on the device."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    if not fused or type(optimizer) not in {Adam, AdamW, SGD}:
        return False
    return not isinstance(optimizer, SGD) or all(
        _has_momentum(optimizer, group) for group in optimizer.param_groups
    )


def _has_momentum(optimizer: SGD, group: Mapping[str, Any]) -> bool:
    # A fused SGD whose very first update is left out goes on from momentum that nobody has set.
    used = (p for p in group["params"] if p.grad is not None)
    return not group["momentum"] or all("momentum_buffer" in optimizer.state[p] for p in used)


def norms_by_name(trainer: Trainer, measured: GradientNorms) -> dict[str, Tensor]:
    """Return the norm of each parameter's gradient by its name, and of all as "total"."""
    names = {id(parameter): name for name, parameter in parameter_names(trainer).items()}
    pairs = zip(measured.parameters, measured.norms, strict=True)
    each = {names[id(p)]: norm.cpu() for p, norm in pairs if id(p) in names}
    return {**each, "total": measured.total.cpu()}


def _total(trainer: Trainer, device: torch.device) -> Tensor:
    if not trainer.terms:  # a step of one's own may name none
        return torch.zeros((), device=device)
    return functools.reduce(operator.add, trainer.terms.values()).detach()


def _agreed(loss: Tensor, norm: Tensor) -> Tensor:
    """Return loss and norm [2], the means over ranks: not finite where one rank's is not."""
    values = torch.stack([loss.float().to(norm.device), norm.float()])
    return sum_over_ranks(values) / world_size()


def _latest_checkpoint(trainer: Trainer) -> str | None:
    for handler in trainer.handlers:
        if isinstance(handler, CheckpointManager):
            latest = handler.get_latest_checkpoint()
            return None if latest is None else str(latest)
    return None
