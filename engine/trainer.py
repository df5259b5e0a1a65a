"""The trainer: an Ignite engine with a model, a loss and an optimizer."""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

import attrs
import torch
from ignite import distributed as idist
from ignite.engine import Engine, Events
from ignite.utils import manual_seed
from torch import Tensor, nn
from torch.optim import Optimizer

from diptych._argument_names import names_the_right_argument
from diptych._summaries import Summarized
from diptych.engine.data.transform import Transform, placed_transform
from diptych.engine.distributed.agreement import wait_for_all_ranks
from diptych.engine.distributed.collectives import (
    broadcast_module,
    rank,
    world_size,
)
from diptych.engine.distributed.comparison import check_equal_over_ranks, check_same_tensors
from diptych.engine.distributed.dtensor import has_shards
from diptych.engine.distributed.hang_report import failures_published, publish, waits_at
from diptych.engine.distributed.sharding import shard_model
from diptych.engine.errors import BatchError
from diptych.engine.evaluator import EvaluatesModel, computed_by_metrics
from diptych.engine.events import MetricsEvents, RunEvents
from diptych.engine.handler import Attachable, Finding, Handler
from diptych.engine.loop.listener import cost_table
from diptych.engine.loop.position import Position, planned_iterations
from diptych.engine.metrics.metrics_collector import MetricsCollector
from diptych.engine.modules import TrainingModes
from diptych.engine.optimizers.optimizer_modes import put_into_training_mode
from diptych.engine.settings import Precision, TrainerSettings, Units
from diptych.engine.state.handler_states import was_stopped_early
from diptych.engine.state.rank_agreement import check_ranks_agree
from diptych.engine.state.references import checked_optimizers
from diptych.engine.state.run_identity import RunIdentity
from diptych.engine.step.batch_checks import (
    check_first_batch,
    check_tensors,
    report_last_batch,
)
from diptych.engine.step.compilation import CompileMode, compile_in_place
from diptych.engine.step.exact_steps import ExactSteps
from diptych.engine.step.loss_contract import minimum_batch, scalars_of
from diptych.engine.step.step_snapshot import StepSnapshot
from diptych.engine.step.train_step import TrainStep, check_fp16
from diptych.engine.step.untrained import Untrained
from diptych.engine.tasks import Outputs, Task
from diptych.engine.trainer_parts import (
    METHODS,
    check_can_move,
    check_handler,
    check_needs_no_closure,
    check_parts,
    in_float16,
    report_parts,
)
from diptych.engine.trials.dry_run import DryRun, dry_run
from diptych.engine.trials.overfit import Overfit, overfit

logger = logging.getLogger(__name__)

Step = Callable[["Trainer", Any], Any]
Kind = TypeVar("Kind")


class Trainer(Summarized, ExactSteps):
    """Trains a model. One batch from the loader is one update; everything else is a handler.

    ```python
    trainer = Trainer(model, CLIPLoss(), optimizer, task=tasks.image_text, microbatch_size=256)
    trainer.attach(LearningRate(warmup=200), GradientClipping(max_norm=1.0))
    trainer.run(loader, max_epochs=20)
    ```

    Args:
        model: the model; moved to the device, and compiled in place if `compile` asks for it.
        loss: takes the task's outputs in their order and returns a scalar; moved to the device.
            The guide on losses describes its optional methods (`terms`, `couples_samples`,
            `constrain`, `scalars`).
        optimizer: holds the parameters to train, those of the loss included.
        task: maps model and batch to named tensors; see `diptych.engine.tasks`.
        precision: fp32, bf16 or fp16; `TrainerSettings` describes this and the settings below.
        transform: maps a batch to a batch on the device, before it is cut into micro-batches; an
            augmentation, for example. A module is moved to the device. Evaluations skip it.
        microbatch_size: samples per forward pass; None: the whole batch.
        device: the device to train on; None: this process's accelerator, else the CPU.
        prefetch: whether to copy a batch to the accelerator during the update before it.
        compile: whether to compile the model, or a mode of `torch.compile`.
        seed: the seed of all generators at the start of a new run.
        log_every: iterations between two log points.
        shard: whether to shard the model over the ranks, and by which units; the optimizer then
            holds the shards. See the guide on several GPUs.
        step: a subclass of `TrainStep`, or a function of trainer and batch; None: `TrainStep`.

    Attributes:
        identity: what decides the run's result, apart from its progress: a `RunIdentity`.
        metrics: the `MetricsCollector` to publish to.
        scaler: the gradient scaler of fp16, else None.
        skipped_steps: number of updates that fp16 has skipped, on the device.
        skipped_batches: number of batches that were too small for the loss (`minimum_batch`).
        handlers: the attached objects, in order.
        terms: the terms of the last loss, detached.
        step: the argument `step`.
        leaves_out: in a dry run, the handlers and functions that are not run.
        described_loader: the loader that the identity describes.
        transform: the argument `transform`. It can be replaced between two updates.
        loaded_length: iterations that the run of the loaded state was to have, if an earlier
            version wrote it, which did not save the lengths of schedules; else None.
        state: Ignite's state; `state.metrics` holds the means of the last epoch and the values of
            the last evaluation.

    Raises:
        TypeError: if model, loss, optimizer, task or transform has the wrong type.
        ValueError: if a setting is out of range, the device cannot compute in the precision, or
            the optimizer lacks a parameter of the loss, or has no parameter of model or loss.
    """

    _shown: ClassVar[tuple[str, ...]] = ("model", "loss", "optimizer", "device")
    _shown += ("settings.precision", "settings.microbatch_size", "state.epoch", "state.iteration")

    @names_the_right_argument
    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        optimizer: Optimizer,
        *,
        task: Task,
        transform: Transform | None = None,
        precision: Precision = "fp32",
        microbatch_size: int | None = None,
        device: torch.device | str | None = None,
        prefetch: bool = True,
        compile: bool | CompileMode = False,
        seed: int | None = None,
        log_every: int = 50,
        shard: Units | Sequence[str] = False,
        step: Step | type[TrainStep] | None = None,
    ) -> None:
        self.settings = TrainerSettings(
            precision=precision,
            microbatch_size=microbatch_size,
            device=device,
            prefetch=prefetch,
            compile=compile,
            seed=seed,
            log_every=log_every,
            shard=shard,
        )
        check_parts(model, loss, optimizer, task)
        report_parts(model, loss, optimizer)
        self.device = self.settings.device or idist.device()
        self.optimizer, self.task = optimizer, task
        self.transform = placed_transform(transform, step, self.device)
        self._place(model, loss)
        self.step = step
        self._hold_nothing_yet()
        super().__init__(self._make_step(step))
        self._listen_to_itself()

    def _hold_nothing_yet(self) -> None:
        self._outputs: Outputs = {}
        self._is_checked = False
        self.skipped_batches = 0
        self.terms: dict[str, Tensor] = {}
        self.handlers: list[Attachable] = []
        self._gauges_of_loss: list[str] = []
        self.loaded_length: int | None = None
        self._others: list[Optimizer] = []
        self.leaves_out: tuple[str, ...] = ()
        self._identity: RunIdentity | None = None
        self.described_loader: Any = None

    def _place(self, model: nn.Module, loss: nn.Module) -> None:
        """Move the modules to the device; shard and compile them if the settings ask for it."""
        check_same_tensors(model=model, loss=loss)
        if self.settings.shard and world_size() > 1:
            shard_model(model, loss, self.optimizer, self.settings.shard, self.device)
        self.model, self._loss = self._placed(model), self._placed(loss)
        self.scaler = self._gradient_scaler()
        self.skipped_steps = torch.zeros((), device=self.device)
        compile_in_place(self.model, self.device, how=self.settings.compile)

    def _placed(self, module: nn.Module) -> nn.Module:
        """Return the module on this rank's device, with the values of rank 0."""
        if has_shards(module):
            return module
        check_can_move(module, self.device)
        module = module.to(self.device)
        broadcast_module(module)
        return module

    def _make_step(self, step: Step | type[TrainStep] | None) -> Callable[[Any, Any], Any]:
        if step is None:
            for optimizer in getattr(self.optimizer, "members", (self.optimizer,)):
                check_needs_no_closure(optimizer)
            return TrainStep(self)
        return step(self) if isinstance(step, type) else step

    def _set_loss(self, loss: nn.Module) -> None:
        """Replace the loss; its scalars are published instead of those of the earlier one.

        Raises:
            ValueError: if the optimizer lacks one of its parameters.
        """
        check_parts(self.model, loss, self.optimizer, self.task)
        check_same_tensors(loss=loss)
        self._loss = self._placed(loss)
        if not loss.training:
            loss.train()
        self._publish_gauges()

    loss: nn.Module = property(  # type: ignore[assignment]
        attrgetter("_loss"),  # no call in Python, since an update reads it often
        _set_loss,
        doc="""The loss. It can be replaced between two updates.

        The optimizer must hold the parameters of the new loss by then.
        """,
    )

    def _set_outputs(self, outputs: Outputs) -> None:
        """Set the outputs, detached: a reference to the graph would outlive a failed step."""
        if not self._is_checked:
            check_tensors(outputs)
        self._outputs = {name: tensor.detach() for name, tensor in outputs.items()}
        if not self._is_checked:
            check_first_batch(self.loss, self._outputs, self.state.batch)
            self._is_checked = True

    outputs: Outputs = property(  # type: ignore[assignment]
        attrgetter("_outputs"), _set_outputs, doc="The task's outputs for the last batch, detached."
    )

    def attach(self, *handlers: Attachable) -> Trainer:
        """Attach handlers; those of one event run in the order in which they were attached.

        If one of them cannot be attached, none of them is.

        Args:
            handlers: objects with `attach(engine)`: this library's, Ignite's or your own.

        Raises:
            TypeError: if one has no `attach`.
            ValueError: if one is attached already.
        """
        before, task = list(self.handlers), self.task
        with ExitStack() as stack:
            for engine in (self, *(h.evaluator for h in self.handlers_of(EvaluatesModel))):
                stack.enter_context(engine.all_or_nothing())
            stack.enter_context(self.metrics.gauges_restored_on_error())
            try:
                for handler in handlers:
                    check_handler(handler, self.handlers)
                    handler.attach(self)
                    self.handlers.append(handler)
            except BaseException:
                self.handlers[:], self.task = before, task
                raise
        return self

    @property
    def identity(self) -> RunIdentity:
        """The script's side of the run: what decides its result, as declared when it first ran."""
        if self._identity is None:
            self._identity, self.described_loader = RunIdentity.of(self), self.state.dataloader
        return self._identity

    @contextmanager
    def _announced(self) -> Iterator[None]:
        with failures_published():
            yield
        state = self.state
        publish(f"ended its run in epoch {state.epoch}, after iteration {state.iteration}")

    @waits_at("the start of a run")
    def _declare(self, _: Engine) -> None:
        """Describe the run before a checkpoint, or a handler, changes anything."""
        if world_size() > 1:
            check_ranks_agree(self, self._limits)
        earlier, now = self._identity, RunIdentity.of(self)
        loader, before = self.state.dataloader, self.described_loader
        if earlier is not None:
            now = now.continued(earlier, same_loader=loader is not None and loader is before)
        self._identity, self.described_loader = now, loader
        if earlier is None and now.not_compared:
            logger.info(
                "Not compared when this run resumes, since it has no description: %s.",
                ", ".join(f"{name} ({kind})" for name, kind in now.not_compared.items()),
            )

    def handlers_of(self, kind: type[Kind]) -> list[Kind]:
        """Return the attached handlers of a class, or of a protocol, in order."""
        return [handler for handler in self.handlers if isinstance(handler, kind)]

    @property
    def findings(self) -> list[Finding]:
        """The problems that the attached handlers have found so far, by iteration."""
        found = [one for handler in self.handlers_of(Handler) for one in handler.findings]
        return sorted(found, key=lambda finding: finding.step)

    @property
    def optimizers(self) -> list[Optimizer]:
        """The trainer's optimizer, then others of its parameters that functions at events may step.

        The others are found when a run starts.
        """
        return [self.optimizer, *self._others]

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that build a trainer like this one, with its device resolved."""
        return {
            **attrs.asdict(self.settings, recurse=False),
            "device": self.device,
            "task": self.task,
            "transform": self.transform,
            "step": self.step,
        }

    def replica(self, handlers: Iterable[Attachable] = (), **changes: Any) -> Trainer:
        """Return a trainer with this one's parts, settings, task, transform and step.

        It shares model, loss and optimizer unless others are given, starts at iteration 0, and has
        none of this trainer's handlers.

        ```python
        search = trainer.replica([GradientClipping(max_norm=1.0)], log_every=1)
        ```

        Args:
            handlers: to attach to the replica.
            changes: arguments of `Trainer` to override: `model`, `precision`, ...

        Raises:
            TypeError: if `Trainer` has no such argument.
        """
        parts = {"model": self.model, "loss": self.loss, "optimizer": self.optimizer}
        return Trainer(**{**parts, **self.arguments, **changes}).attach(*handlers)

    def __reduce_ex__(self, _: Any) -> NoReturn:
        """Refuse to be copied or pickled.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "a Trainer must not be copied or pickled: functions at its events refer to it, and "
            "would act on it. Copy its parts in one call, model, loss, optimizer = "
            "copy.deepcopy((trainer.model, trainer.loss, trainer.optimizer)), and pass them to "
            "trainer.replica(handlers, model=model, loss=loss, optimizer=optimizer)"
        )

    @contextmanager
    def renewed(self, **changes: Any) -> Iterator[None]:
        """Within this context, be a trainer like this one at iteration 0, without handlers.

        Model, loss and optimizer are the same objects, and what is done to them stays. Functions
        that refer to this trainer work with the new state. Everything else is restored at the end.

        Args:
            changes: arguments of `Trainer` to override.
        """
        own, arguments = dict(vars(self)), self.arguments
        parts = {"model": self.model, "loss": self.loss, "optimizer": self.optimizer}
        placed = {"compile": False, "shard": False}  # the model is compiled and sharded already
        vars(self).clear()
        try:
            Trainer.__init__(self, **{**parts, **arguments, **placed, **changes})
            vars(self).update({k: v for k, v in own.items() if k not in vars(self)})
            yield
        finally:
            vars(self).clear()
            vars(self).update(own)

    def dry_run(self, loader: Iterable[Any], *, updates: int = 1, batches: int = 2) -> DryRun:
        """Do once, on little data, everything that a run does; undo it, and print what was done.

        A new run of one epoch of `updates` batches, with copies of the attached handlers: updates,
        evaluations of `batches` batches, checkpoints, sinks. Files are written into a scratch
        directory, which is removed. Model, loss, optimizer, random generators, loaders, this
        trainer and its handlers are as before. Functions on events, objects that are no `Handler`,
        and handlers that send to a service are not run; the report names them.

        Args:
            loader: of the run; its position stays.
            updates: batches to train on.
            batches: batches of each evaluation.

        Raises:
            Exception: whatever the run raises.
        """
        report = dry_run(self, loader, updates, batches)
        if rank() == 0:
            sys.stdout.write(f"{report}\n")
        return report

    def overfit(self, loader: Iterable[Any], *, batches: int = 1, updates: int = 100) -> Overfit:
        """Train on the first batches alone, and report whether the loss falls; nothing is kept.

        No handler is attached: the learning rate is the optimizer's current one, without a
        schedule. Model, loss, optimizer, random generators and this trainer are as before.

        ```python
        print(trainer.overfit(loader))  # 100 updates on 1 batch: loss 2.31 -> 0.02; it learns
        ```

        Args:
            loader: of the run; its position stays.
            batches: batches to repeat.
            updates: updates in all.
        """
        return overfit(self, loader, batches, updates)

    if not TYPE_CHECKING:  # which would take every attribute for one that exists

        def __getattr__(self, name: str) -> Any:
            """Raise the error for a missing attribute; others' methods are told in our words."""
            if name not in METHODS or hasattr(type(self), name):
                return self.__getattribute__(name)  # raises what a property has raised
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
            way_out = f". Use trainer.{METHODS[name]}"
            raise AttributeError(message + way_out, name=name, obj=self)

    @names_the_right_argument
    def train(self, loader: Iterable[Any], num_epochs: int) -> list[float]:
        """Run until `num_epochs` epochs are done, and return the mean loss of each epoch."""
        self.run(loader, max_epochs=num_epochs)
        try:
            return self.metrics.get_history("train/loss")
        except KeyError:  # the run stopped inside its first epoch
            return []

    def describe(self) -> str:
        """Return a Markdown table of the functions that listen to this trainer's events.

        A row gives the handler, its event, its cadence, the number of calls, and its time on the
        host, without the time of handlers that it caused to be called. Work that it queues on a
        device shows in the step that waits for it.
        """
        return cost_table(self.listeners)

    def state_dict(self) -> OrderedDict[str, Any]:
        """Return the position of the run; see `EventLoop.state_dict`."""
        return OrderedDict(super().state_dict(), schedules_saved=True)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a position; see `EventLoop.load_state_dict`."""
        super().load_state_dict(state_dict)
        saved = state_dict.get("schedules_saved", False)
        self.loaded_length = None if saved else planned_iterations(self.state)

    def _gradient_scaler(self) -> torch.amp.GradScaler | None:
        if self.settings.precision != "fp16":
            return None
        names = in_float16(self.model)
        if names:
            raise ValueError(
                "model must have parameters in float32 if precision is 'fp16', which computes in "
                f"float16, got float16 for {names[0]}. Call model.float()"
            )
        check_fp16(self.device)
        return torch.amp.GradScaler(self.device.type)

    def _publish_gauges(self) -> None:
        for tag in self._gauges_of_loss:
            self.metrics.remove_gauge(tag)
        self._gauges_of_loss = [f"train/{name}" for name in scalars_of(self.loss)]
        for tag in self._gauges_of_loss:
            self.metrics.gauge(tag, partial(_scalar_of, self.loss, tag.removeprefix("train/")))
        if self.scaler is not None:
            self.metrics.gauge("train/skipped_steps", lambda: self.skipped_steps)
        if minimum_batch(self.loss) > 1:
            self.metrics.gauge("train/skipped_batches", lambda: self.skipped_batches)

    def _start_over(self) -> None:
        if self.state.iteration:
            self.metrics.reset()
        super()._start_over()

    def _listen_to_itself(self) -> None:
        self._snapshot = StepSnapshot(self) if world_size() == 1 else None
        self._modes = TrainingModes(lambda: {"model": self.model, "loss": self.loss})
        self.metrics = MetricsCollector(on_record=lambda: self._fire(MetricsEvents.LOGGED))
        self._publish_gauges()
        self._untrained = Untrained(self)
        self.add_event_handler(RunEvents.RESTORE, self._declare)
        self.add_event_handler(RunEvents.RESTORE, self._put_optimizer_into_training_mode)
        self.add_event_handler(Events.STARTED, self._prepare)
        self.add_event_handler(Events.EPOCH_STARTED, self._check_length_over_ranks)
        self.add_event_handler(Events.EPOCH_STARTED, self._modes.train)
        self.every(self.settings.log_every, self._log, RunEvents.SAFE_POINT)

    @waits_at("the start of a run")
    def _prepare(self, _: Engine) -> None:
        if self.settings.seed is not None and self.position == Position():
            manual_seed(self.settings.seed + rank())
        self._others = checked_optimizers(self, self._others)[1:]
        put_into_training_mode(*self._others)
        if self._snapshot is not None:
            self._snapshot.find()
        self._modes.remember()
        self._modes.train()
        self._modes.report_resting()
        self._untrained.start()
        report_last_batch(self.loss, self.state.dataloader, "it is skipped, without an update")
        if self.state.iteration and was_stopped_early(self):
            self.terminate()

    def _put_optimizer_into_training_mode(self, _: Engine) -> None:
        put_into_training_mode(self.optimizer)

    @waits_at("the start of an epoch")
    def _check_length_over_ranks(self, _: Engine) -> None:
        """Check that all ranks run the same number of iterations: they wait for one another."""
        if world_size() == 1:
            return
        length = self.state.epoch_length
        check_equal_over_ranks(
            "the length of an epoch",
            {"": length},
            "Give every rank equally many batches, or pass epoch_length= to run",
        )
        if length is None:
            raise ValueError(
                "data must have a length over several ranks, got a "
                f"{type(self.state.dataloader).__name__} without one, whose ranks may run out of "
                "batches at different times. Pass epoch_length= to run"
            )

    def _report_length(self, found: str) -> None:
        if world_size() > 1:
            raise BatchError(
                f"data must have as many batches as its length over several ranks, got "
                f"{self.state.epoch_length} as the length and {found} batches in epoch "
                f"{self.state.epoch}. Correct __len__ of the loader, or pass epoch_length= to run"
            )
        super()._report_length(found)

    def _log(self, _: Engine) -> None:
        self.metrics.log(self.state.iteration)
        self._untrained.report()

    def _report_metrics(self) -> None:
        values = computed_by_metrics(self)
        if values:
            self.metrics.report(self.state.iteration, values)

    def _fire_completed(self, event: Any) -> None:
        if isinstance(event, MetricsEvents):  # the values of the end are known and logged
            self.fire_and_report(event)
            return
        ended = "an epoch" if event is Events.EPOCH_COMPLETED else "a run"
        wait_for_all_ranks(f"the end of {ended}", f"after iteration {self.state.iteration}")
        # If an exception has left it, what was published before it is logged.
        self._modes.remember()  # before handlers that may evaluate
        if event.name not in self._stopped_at and event.name not in self._unreported:
            # A state that a handler of LOGGED takes now has the handlers of the event before it.
            completing, self._completing = self._completing, None
            self._log_at_end(event)
            self._completing = completing
        self.fire_and_report(event)
        if event is Events.EPOCH_COMPLETED:
            self._report_metrics()

    def _log_at_end(self, event: Any) -> None:
        """Log what was published before the end of an epoch or of a run."""
        if event is Events.EPOCH_COMPLETED:
            self.metrics.log(self.state.iteration)
            self._untrained.report()
            self.state.metrics.update(self.metrics.end_epoch())
        elif not self.should_terminate or self.is_finished:
            # A stopped run keeps its buffered values, so that the run which continues it logs what
            # an uninterrupted one would.
            self.metrics.log(self.state.iteration)


def _scalar_of(loss: nn.Module, name: str) -> Tensor:
    return scalars_of(loss)[name]
