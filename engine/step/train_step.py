"""The training step: one update for one batch, in phases that each fire an event."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple, Protocol

import torch
from ignite.engine import State
from torch import Tensor, nn
from torch.optim import Optimizer

from diptych._loss_arguments import call_with
from diptych.engine.data.batches import batch_kind, batch_size, cut_batch
from diptych.engine.data.prefetch import mover
from diptych.engine.data.transform import Transform, apply_transform
from diptych.engine.distributed.collectives import all_reduce_sum, broadcast_buffers, world_size
from diptych.engine.distributed.dtensor import (
    call_on,
    has_shards,
    local_part,
    mixed_tensors_allowed,
)
from diptych.engine.distributed.gradient_average import GradientAverage
from diptych.engine.distributed.hang_report import waits_at
from diptych.engine.events import StepEvents
from diptych.engine.forward_faults import raise_likely_cause
from diptych.engine.modules import KnownParts, known_buffers, known_parameters
from diptych.engine.settings import AUTOCAST, TrainerSettings
from diptych.engine.step.batch_checks import report_skipped
from diptych.engine.step.compilation import keep_gradients, uses_cuda_graphs
from diptych.engine.step.loss_contract import (
    Terms,
    constrained,
    couples_samples,
    is_too_small,
    loss_terms,
    minimum_batch,
    optional,
    sample_mean_of,
    sum_of_terms,
)
from diptych.engine.step.microbatch import GradientCache, PieceCounter, join_outputs
from diptych.engine.step.single_samples import SingleSamples
from diptych.engine.tasks import Outputs, Task, check_outputs
from diptych.engine.trainer_parts import check_needs_no_closure

NOTHING, PARAMETERS = nullcontext(), itemgetter("params")


class TrainerParts(Protocol):
    """The parts of a `Trainer` that a step reads and writes."""

    device: torch.device
    settings: TrainerSettings
    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler | None
    skipped_steps: Tensor
    skipped_batches: int
    state: State
    task: Task
    transform: Transform | None

    @property
    def loss(self) -> nn.Module:
        """The loss."""
        ...


class StepOutput(NamedTuple):
    """The result of an update in `trainer.state.output`: detached, on the device, not waited for.

    Attributes:
        loss: the loss, a scalar.
        terms: its named terms, scalars whose sum it is.
        batch_size: samples of the batch on this rank.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    batch_size: int


class TrainStep:
    """Forward pass, loss, backward pass and update of one batch: a `Trainer`'s process function.

    Each phase is a method that a subclass can override.

    Attributes:
        model: the trainer's model.
        loss: the trainer's loss.
        optimizer: the trainer's optimizer.
        task: the trainer's task.
        unfinished: the result of an update after which an exception was raised. The next call with
            the same batch continues there.
    """

    # Read without a call in Python: an update reads them a dozen times.
    model: nn.Module = property(attrgetter("_trainer.model"))  # type: ignore[assignment]
    loss: nn.Module = property(attrgetter("_trainer.loss"))  # type: ignore[assignment]
    optimizer: Optimizer = property(attrgetter("_trainer.optimizer"))  # type: ignore[assignment]
    task: Task = property(attrgetter("_trainer.task"))  # type: ignore[assignment]

    def __init__(self, trainer: TrainerParts) -> None:
        settings = trainer.settings
        self._trainer = trainer
        self.device, self.scaler = trainer.device, trainer.scaler
        self.microbatch_size = settings.microbatch_size
        self.autocast_dtype = AUTOCAST.get(settings.precision)
        self.skipped_steps = trainer.skipped_steps
        self.cuda_graphs = uses_cuda_graphs(self.device, how=settings.compile)
        self.to_device = mover(self.device, prefetch=settings.prefetch)
        self.average = GradientAverage(lambda: (self.model, self.loss))
        self._unscaled, self._lacking = False, ""
        self._output: StepOutput | None = None
        self._is_cut = False
        self.unfinished: StepOutput | None = None
        self._ranks = world_size()
        self._early: AbstractContextManager[None] | None = None
        self._known, self._buffers = known_parameters(), known_buffers()
        self._constrained = KnownParts(constrained)
        self._single = SingleSamples(self.device)
        self._piece_counter = PieceCounter(agreed=has_shards(trainer.model))

    def __call__(self, trainer: Any, batch: Any) -> StepOutput:
        """Make one update with `batch`; after an exception behind an update, do what is left."""
        if self.unfinished is None:
            self._output = self._ready_to_update(trainer, batch)
            if self._output is None:
                return self._skipped()
            self.update()
            self.unfinished = self._output
        elif self._is_cut:
            self._finish_update()
        trainer.fire_event(StepEvents.OPTIMIZER_STEPPED)
        output, self.unfinished, self._output = self.unfinished, None, None
        trainer.metrics.update_uncopied(tagged_scalars(output))
        return output

    def _ready_to_update(self, trainer: Any, batch: Any) -> StepOutput | None:
        """Compute the gradients, up to their event; return the result of the update.

        None: the global batch is too small for the loss, or a rank's for the model.
        """
        batch = self.transformed(self.to_device(batch))
        size = batch_size(batch)
        self._ranks, self._early = world_size(), None
        self._lacking = self._too_small_for(batch, size)
        if self._lacking:
            return None
        self.clear_gradients()
        if self._ranks > 1:
            broadcast_buffers(self._buffers.of(self.model))
        terms, value = self.gradients(trainer, batch)
        self.finish_gradients()
        trainer.fire_event(StepEvents.GRADIENTS_READY)
        return StepOutput(value, terms, size)

    def _too_small_for(self, batch: Any, size: int) -> str:
        """Return the samples that a batch lacks, and for what; "" if it has enough."""
        if is_too_small(self.loss, size, lambda: self._announced_early(batch)):
            return f"the {minimum_batch(self.loss)} that {type(self.loss).__name__} needs"
        least = size // -(-size // (self.microbatch_size or size)) if size else 0
        first = self._trainer.state.iteration <= 1
        if self._single.is_left(self.model, self.forward, batch, least, first=first):
            return "the 2 that the model's batch normalisation needs" + (
                " on each rank" if self._ranks > 1 else ""
            )
        return ""

    def _skipped(self) -> StepOutput:
        """Count a batch that is too small; return the last output, of no sample."""
        trainer = self._trainer
        trainer.skipped_batches += 1
        if trainer.skipped_batches == 1:
            report_skipped(self._lacking, trainer.state.iteration)
        found: Any = trainer.state.output
        nothing = StepOutput(torch.zeros((), device=self.device), {}, 0)
        last = found if isinstance(found, StepOutput) else nothing
        return last._replace(batch_size=0)

    def transformed(self, batch: Any) -> Any:
        """Apply the trainer's transform to a batch on the device."""
        transform, state = self._trainer.transform, self._trainer.state
        if transform is None:
            return batch
        seed = self._trainer.settings.seed
        return apply_transform(
            transform, batch, self.device, seed=seed, epoch=state.epoch, iteration=state.iteration
        )

    def clear_gradients(self) -> None:
        """Clear all gradients, also those outside of the optimizer, which would add up."""
        optimizer = self.optimizer
        if type(optimizer).zero_grad is not Optimizer.zero_grad or "zero_grad" in vars(optimizer):
            optimizer.zero_grad(set_to_none=True)  # a subclass may do more
        for parameter in self.parameters():
            parameter.grad = None

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of model, loss and optimizer, each once."""
        held = [*chain.from_iterable(map(PARAMETERS, self.optimizer.param_groups))]
        return self._known.of(self.model, self.loss, others=held)

    def last_backward(self) -> AbstractContextManager[None]:
        """Return a context for the last backward pass of an update."""
        return self.average.last_backward() if self._ranks > 1 else NOTHING

    def between_pieces(self) -> None:
        """Copy gradients that the next piece would overwrite (with CUDA graphs)."""
        if self.cuda_graphs:
            keep_gradients(self.parameters())

    def gradients(self, trainer: Any, batch: Any) -> tuple[Terms, Tensor]:
        """Compute the gradients of the parameters; return the detached terms and loss."""
        if self.microbatch_size is None:
            return self.coupled(trainer, batch, [batch])
        # Choose by the loss alone: if a batch fits in one micro-batch on some ranks only, choosing
        # by size would make the ranks run different collectives.
        pieces = cut_batch(
            batch, self._piece_counter.count(batch_size(batch), self.microbatch_size)
        )
        if couples_samples(self.loss):
            return self.coupled(trainer, batch, pieces)
        return self.accumulated(trainer, pieces, self.microbatch_size)

    @waits_at("the forward pass")
    def forward(self, batch: Any) -> Outputs:
        """Return the task's outputs for a batch or a piece of it."""
        with self.autocast():
            try:
                outputs = call_on(self.task, self.model, batch)
            except Exception as error:
                raise_likely_cause(error, self.model, batch)
                raise
        if type(outputs) is not dict:
            check_outputs(outputs)
        return outputs

    def announced(self, batch: Any) -> AbstractContextManager[None]:
        """Start to exchange batch sizes, so that the loss, called inside, waits for no host."""
        announce = optional(self.loss, "announce") if self._ranks > 1 else None
        if announce is None:
            return NOTHING
        exchange: AbstractContextManager[None] = announce(batch_size(batch), batch_kind(batch))
        return exchange

    def _announced_early(self, batch: Any) -> AbstractContextManager[None]:
        """Start to exchange batch sizes before the forward pass, for a loss with a minimum."""
        self._early = self.announced(batch)
        return self._early

    @waits_at("the backward pass")
    def coupled(self, trainer: Any, batch: Any, pieces: list[Any]) -> tuple[Terms, Tensor]:
        """Compute the loss of all samples at once, with cached gradients if there are pieces."""
        cache = None
        exchange, self._early = self._early or self.announced(batch), None
        # Over several ranks, cache a single piece too: others may have more pieces, and gradients
        # must be averaged after the loss's collectives on all ranks.
        if len(pieces) == 1 and (self.microbatch_size is None or self._ranks == 1):
            outputs = self.forward(batch)
        else:
            cache = GradientCache(self.model, self.device, self.last_backward, self.between_pieces)
            outputs = cache.outputs(self.forward, pieces)
        trainer.outputs = outputs
        trainer.fire_event(StepEvents.FORWARD_COMPLETED)
        with self.autocast(), exchange:
            terms = loss_terms(self.loss, outputs)
            value = sum_of_terms(terms)
        trainer.terms = terms = {name: apart_from_weights(term) for name, term in terms.items()}
        trainer.fire_event(StepEvents.LOSS_COMPUTED)
        with self.last_backward() if cache is None else NOTHING:
            self.scaled(value).backward()
        if cache is not None:
            cache.backward(self.forward, pieces, outputs)
        return terms, apart_from_weights(value) if len(terms) > 1 else next(iter(terms.values()))

    @waits_at("the loss and the backward pass")
    def accumulated(self, trainer: Any, pieces: list[Any], divisor: int) -> tuple[Terms, Tensor]:
        """Accumulate the gradients of a mean over samples, each piece with its weight.

        The divisor is the same on all ranks and removed at the end; it keeps fp16 in range.
        """
        parts: list[Outputs] = []
        sums: list[Terms] = []
        weights: list[Tensor] = []
        for index, piece in enumerate(pieces):
            last = index == len(pieces) - 1
            outputs = self.forward(piece)
            with self.autocast():
                terms, weight = self.totals_and_weight(outputs, batch_size(piece))
                value = sum_of_terms(terms)
            with self.last_backward() if last else NOTHING:
                self.scaled(value / divisor).backward()
            if not last:
                self.between_pieces()
            parts.append({name: tensor.detach() for name, tensor in outputs.items()})
            sums.append({name: term.detach() for name, term in terms.items()})
            weights.append(weight.detach())
        trainer.outputs = join_outputs(parts, pieces)
        trainer.fire_event(StepEvents.FORWARD_COMPLETED)
        # Weights may be integers.
        dtype = torch.promote_types(next(iter(sums[0].values())).dtype, torch.float32)
        weight = all_reduce_sum(torch.stack(weights).sum(dtype=dtype))
        inverse = torch.where(weight > 0, world_size() / weight, 0)
        trainer.terms = terms = {
            name: torch.stack([each[name] for each in sums]).sum(dtype=dtype) * inverse
            for name in sums[0]
        }
        trainer.fire_event(StepEvents.LOSS_COMPUTED)
        self.average.receive()
        self._rescale(inverse * divisor)
        return terms, sum_of_terms(terms)

    def totals_and_weight(self, outputs: Outputs, size: int) -> tuple[Terms, Tensor]:
        """Return the sums of a piece's terms over its samples, and the weight of the piece."""
        loss = sample_mean_of(self.loss)
        if loss is not None:
            value, weight = call_with(loss.total_and_weight, outputs)
            return {"loss": value}, weight
        terms = {name: term * size for name, term in loss_terms(self.loss, outputs).items()}
        value = next(iter(terms.values()))
        return terms, torch.full_like(value.detach(), size, dtype=torch.float32)

    def finish_gradients(self) -> None:
        """Receive the averages over ranks, and divide them by the loss scale."""
        if self._ranks > 1:
            self.average.receive()
        if self.scaler is not None:
            held = chain.from_iterable(map(PARAMETERS, self.optimizer.param_groups))
            self._unscaled = any(p.grad is not None for p in held)
            if self._unscaled:
                self.scaler.unscale_(self.optimizer)

    def update(self) -> None:
        """Step the optimizer, then clamp the loss's parameters to their bounds."""
        if self.scaler is None or not self._unscaled:  # a scaler needs at least one gradient
            with mixed_tensors_allowed(self.model):
                self._step_optimizer()
        else:
            before = _loss_scale(self.scaler)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.skipped_steps += _loss_scale(self.scaler) < before
        self._constrain()

    def _step_optimizer(self) -> None:
        try:
            self.optimizer.step()
        except Exception as error:
            for optimizer in getattr(self.optimizer, "members", (self.optimizer,)):
                check_needs_no_closure(optimizer, error)
            raise

    def _constrain(self) -> None:
        for part in self._constrained.of(self.loss):
            part.constrain()

    def keep_update(self) -> bool:
        """Let the next call continue behind the update; return whether it can.

        It cannot in a subclass whose own `__call__` makes the update.
        """
        if self.unfinished is None:  # `update` has raised after the optimizer's step
            self.unfinished, self._is_cut = self._output, True
        return self.unfinished is not None

    def _finish_update(self) -> None:
        """Do what an exception in `update` left to do after the optimizer's step."""
        if self.scaler is not None and self._unscaled and has_found_overflows(self.scaler):
            self.scaler.update()
        self._constrain()
        self._is_cut = False

    def scaled(self, value: Tensor) -> Tensor:
        """Return the value for the backward pass: multiplied by the loss scale in fp16.

        Raises:
            ValueError: if no trainable parameter has a part in it.
        """
        if not value.requires_grad:
            raise ValueError(
                "the loss must depend on a trainable parameter, got one without a gradient: "
                "everything is frozen, or the outputs were computed without a graph. Set "
                "requires_grad_(True) on what is to be trained"
            )
        return value if self.scaler is None else self.scaler.scale(value)

    def autocast(self) -> Any:
        """Return a new autocast context, so that casts cached without a graph are not reused."""
        if self.autocast_dtype is None:
            return NOTHING
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def _rescale(self, factor: Tensor) -> None:
        for gradient in (p.grad for p in self.parameters() if p.grad is not None):
            local_part(gradient).mul_(factor)


def apart_from_weights(value: Tensor) -> Tensor:
    """Return a value detached; copied if it may be a parameter, a buffer or a view of one."""
    source = value if value._base is None else value._base  # noqa: SLF001 - of a view
    computed = source.requires_grad and not source.is_leaf
    return value.detach() if computed else value.detach().clone()


def tagged_scalars(output: StepOutput) -> dict[str, Tensor]:
    """Return the scalars of an update by tag; a single term is the loss itself."""
    loss = {"train/loss": output.loss}
    if len(output.terms) == 1:
        return loss
    # The loss comes last, so that a term of the same name does not hide it.
    return {**{f"train/{name}": term for name, term in output.terms.items()}, **loss}


def _loss_scale(scaler: torch.amp.GradScaler) -> Tensor:
    # The public get_scale() waits for the device.
    scale = scaler._get_scale_async()  # noqa: SLF001
    return torch.zeros(()) if scale is None else scale.clone()


def has_found_overflows(scaler: torch.amp.GradScaler) -> bool:
    """Return whether a scaler has looked for overflows since its last `update`."""
    states = scaler._per_optimizer_states.values()  # noqa: SLF001 - update() raises without any
    return any(state["found_inf_per_device"] for state in states)


def check_fp16(device: torch.device) -> None:
    """Check that a device can run a convolution forward and backward in fp16; some CPUs cannot.

    Raises:
        ValueError: if the device cannot.
    """
    layer = nn.Conv2d(1, 1, 3).to(device)
    try:
        with torch.autocast(device.type, dtype=torch.float16):
            layer(torch.zeros(1, 1, 4, 4, device=device)).sum().backward()
    except RuntimeError as error:
        raise ValueError(
            f"precision must be fp32 or bf16 on this {device.type} device, which cannot compute "
            "fp16, got 'fp16'"
        ) from error
