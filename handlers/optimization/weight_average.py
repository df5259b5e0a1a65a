"""Exponential moving average (EMA) of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import attrs
import torch
from ignite.engine import Events
from torch import Tensor

from diptych.engine.distributed.collectives import broadcast_buffers, rank
from diptych.engine.distributed.dtensor import full_state, shard_of
from diptych.engine.errors import CheckpointError
from diptych.engine.events import StepEvents
from diptych.engine.handler import Handler
from diptych.engine.modules import unwrapped
from diptych.engine.trainer import Trainer
from diptych.handlers.argument_checks import one_of, share_below_one
from diptych.handlers.checkpointing.export import export_weights
from diptych.handlers.extras import check_extra
from diptych.handlers.optimization.moving_average import (
    ModuleTensor,
    UpdateObserver,
    can_be_averaged,
    differing_keys,
    module_tensors,
    move_towards,
    tensors_of,
)


@attrs.define(kw_only=True, eq=False)
class WeightAverage(Handler):
    """Keeps an exponential moving average (EMA) of the model's weights.

    After update n, counted from 0: average = d average + (1 - d) weights. With warm-up
    d = min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten; without it
    d = decay. The average has the weights' type; that of half-precision weights is in float32,
    because half precision would round small steps to 0. If fp16's scaler or a guard skips the
    update, the average does not change. The loss's own parameters (a temperature) are not averaged.

    ```python
    average = WeightAverage(decay=0.999)
    trainer.attach(average, Evaluation(held_out))
    trainer.run(loader, max_epochs=20)
    with average.averaged():
        ...  # trainer.model holds the averages here, and the trained weights again afterwards
    average.export("model.safetensors")
    ```

    Attach it after handlers that change weights once an update is made.

    Each rank keeps the same average of the weights, and averages the buffers of rank 0, because
    buffers may differ between ranks. With a sharded model each rank averages its shard.

    Source: Polyak and Juditsky 1992 for averaging; TensorFlow's `ExponentialMovingAverage`
    (arXiv:1603.04467) for the warm-up.

    Event: `StepEvents.OPTIMIZER_STEPPED`; `Events.STARTED` initialises the average.
    Cost: one pass over weights and average for each update, with one kernel for each type, and the
        memory of the weights once more; no synchronisation. In fp16, and with a `LossGuard` that
        decides on the device, two more passes and temporarily a second copy. `averaged` copies the
        weights twice and holds one more copy while it is active.

    Args:
        decay: of the average for each update, in [0, 1); 0.999 averages about 1000 updates.
        warmup: whether the decay grows up to that.
        buffers: "average" averages the floating-point buffers (a batch norm's statistics) like the
            weights; "copy" uses the model's current buffers. Buffers of other types are never
            averaged.

    Attributes:
        updates: updates since the average was initialised, including those that the device skipped.

    Raises:
        ValueError: if an argument is out of range; when attached, if the trainer has one already.
    """

    collective: ClassVar[bool] = True
    makes_weights: ClassVar[bool] = True

    decay: float = attrs.field(default=0.999, validator=share_below_one)
    warmup: bool = True
    buffers: Literal["average", "copy"] = attrs.field(
        default="average", validator=one_of(Literal["average", "copy"])
    )
    # Set in each iteration, so without attrs' validators.
    updates: int = attrs.field(default=0, init=False, on_setattr=attrs.setters.NO_OP)
    _skipped: Tensor | float = attrs.field(default=0.0, init=False, repr=False)
    _average: dict[str, Tensor] = attrs.field(factory=dict, init=False, repr=False)
    _tensors: dict[str, ModuleTensor] = attrs.field(factory=dict, init=False, repr=False)
    _observer: UpdateObserver = attrs.field(factory=UpdateObserver, init=False, repr=False)
    _trainer: Trainer | None = attrs.field(default=None, init=False, repr=False)
    _in_use: bool = attrs.field(default=False, init=False, repr=False)

    def attach(self, trainer: Trainer) -> None:
        """Average the weights of the trainer's model after each of its updates."""
        if trainer.handlers_of(WeightAverage):
            raise ValueError("a trainer must have one WeightAverage, got a second one")
        self._trainer = trainer
        self._observer.attach(trainer)
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(StepEvents.OPTIMIZER_STEPPED, self._update)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averages into the trainer's model, and restore the trained weights afterwards.

        The weights are restored bit for bit, also after an error. A nested call changes nothing.
        All ranks must enter it.
        """
        if self._in_use:
            yield
            return
        model = unwrapped(self._begun().model)
        inside = {key: entry.tensor for key, entry in self._tensors.items()}
        trained = [(tensor, tensor.detach().clone()) for tensor in inside.values()]
        trained += [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        self._in_use = True
        try:
            with torch.no_grad():
                for key, tensor in inside.items():
                    tensor.copy_(self._average[key])
                broadcast_buffers(model.buffers())
            yield
        finally:
            with torch.no_grad():
                for tensor, value in trained:
                    tensor.copy_(value)
            self._in_use = False

    def average_state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the model's state dict with the averages in it.

        Keys have no prefixes of wrappers. Averages of half-precision weights are in float32, and
        sharded tensors stay sharded.
        """
        model = unwrapped(self._begun().model)
        averages = {id(entry.tensor): self._average[key] for key, entry in self._tensors.items()}
        return {
            key.replace("_orig_mod.", ""): averages.get(id(value), value).detach().clone()
            if isinstance(value, Tensor)
            else value
            for key, value in model.state_dict(keep_vars=True).items()
        }

    def export(self, path: Path | str) -> None:
        """Write the averaged weights to a safetensors file, for other programs.

        With a sharded model all ranks must call it; rank 0 writes.

        Raises:
            ImportError: if the extra `safetensors` is not installed.
            CheckpointError: if the file cannot be written; an earlier file is kept.
        """
        check_extra("safetensors", "safetensors", needed_by="WeightAverage.export")
        weights = full_state(self.average_state_dict())
        if weights or rank() == 0:
            export_weights(weights, Path(path))

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, not copied, and the number of updates.

        Raises:
            CheckpointError: within `averaged()`, where the model does not hold the trained weights.
        """
        if self._in_use:
            raise CheckpointError(
                "a run must be saved with its trained weights, got the averaged ones in the model. "
                "Save it after averaged()"
            )
        self._begun()
        return {
            "updates": self.updates,
            "missed": self._skipped,
            "average": dict(self._average),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned.

        Raises:
            CheckpointError: if it holds averages of other weights.
        """
        trainer = self._begun()
        saved, here = state_dict["average"], self._average
        if other := differing_keys(here, saved):
            raise CheckpointError(
                "the saved averages must be of this model's weights, with buffers="
                f"{self.buffers!r}, got a difference in {other}"
            )
        for key, average in here.items():
            average.copy_(shard_of(saved[key], average))
        self.updates, self._skipped = state_dict["updates"], state_dict["missed"]
        if isinstance(self._skipped, Tensor):
            self._skipped = self._skipped.to(trainer.device)

    def _begun(self) -> Trainer:
        """Return the trainer; initialise the average if there is none yet."""
        if self._trainer is None:
            raise RuntimeError("a WeightAverage must be attached to a trainer, got none")
        if not self._tensors:
            self._begin(self._trainer)
        return self._trainer

    def _begin(self, trainer: Trainer) -> None:
        """Initialise the average with the current weights."""
        self._tensors = {
            key: entry
            for key, entry in module_tensors(trainer.model).items()
            if can_be_averaged(entry.tensor) and not (entry.is_buffer and self.buffers == "copy")
        }
        self._average, self.updates, self._skipped = {}, 0, 0.0
        for key, entry in self._tensors.items():
            value = entry.tensor.detach()
            wide = torch.promote_types(value.dtype, torch.float32)
            self._average[key] = value.to(wide, copy=True)

    def _start(self, trainer: Trainer) -> None:
        if trainer.state.iteration == 0 or not self._tensors:
            self._begin(trainer)

    def _update(self, _: Trainer) -> None:
        made = self._observer.made()
        if made is False:
            return
        weight = 1 - self._decay_after(self.updates - self._skipped)
        if made is not True:
            weight = weight * made
            self._skipped = self._skipped + 1 - made
        move_towards([*self._average.values()], tensors_of(self._tensors.values()), weight)
        self.updates += 1

    def _decay_after(self, updates: Tensor | float) -> Tensor | float:
        if not self.warmup:
            return self.decay
        grown = (1 + updates) / (10 + updates)
        return grown.clamp(max=self.decay) if isinstance(grown, Tensor) else min(grown, self.decay)
