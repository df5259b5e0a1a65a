"""The moving average of a model's weights, which often generalises better than the last ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from ignite.engine import Events
from torch import Tensor

from diptych.engine.distributed.collectives import rank, share_buffers
from diptych.engine.distributed.dtensor import shard_of, whole_state
from diptych.engine.errors import CheckpointError
from diptych.engine.events import StepEvents
from diptych.engine.modules import unwrapped
from diptych.engine.trainer import Trainer
from diptych.handlers.checkpointing.export import check_can_export, export_weights
from diptych.handlers.optimization.moving_average import (
    MadeUpdates,
    Place,
    follow,
    is_continuous,
    places,
)


def check_share(_: Any, attribute: attrs.Attribute[float], value: float) -> None:
    """Raise ValueError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{attribute.name} must lie in [0, 1), got {value!r}")


@attrs.define(kw_only=True, eq=False)
class WeightAverage:
    """Keeps an exponential moving average of the model's weights.

    After update n, counted from 0: average = d average + (1 - d) weights, with
    d = min(decay, (1 + n) / (10 + n)) in warm-up, so that the start is soon forgotten, and
    d = decay without. The average is kept in the weights' own type, half precision in float32,
    where a thousandth is not rounded away. An update that was left out, by fp16's scaler or a
    guard, leaves the average as it is. The loss's own parameters (a temperature) are not averaged.

    ```python
    average = WeightAverage(decay=0.999)
    trainer.attach(average, Evaluation(held_out))
    trainer.run(loader, max_epochs=20)
    with average.averaged():
        ...  # trainer.model holds the averages here, and the trained weights again after it
    average.export("model.safetensors")
    ```

    Attach it after whatever changes weights once an update is made.

    Over several ranks each keeps the same average of the weights; of buffers, which ranks may
    differ in, rank 0's counts, as it does in training. Of a sharded model each has its share.

    Source: Polyak and Juditsky 1992 for averaging; TensorFlow's `ExponentialMovingAverage`
    (arXiv:1603.04467) for the warm-up.

    Event: `StepEvents.OPTIMIZER_STEPPED`; `Events.STARTED` begins the average.
    Cost: one pass over weights and average for each update, in one kernel a type, and the weights'
        memory once more; no synchronisation. In fp16 and beside a `LossGuard` that decides on the
        device, two passes more and the memory of a second copy while they last. `averaged` copies
        the weights twice and holds them once more while it lasts.

    Args:
        decay: of the average for each update, in [0, 1); 0.999 looks back about 1000 updates.
        warmup: whether the decay grows up to that.
        buffers: "average" averages the floating-point buffers (a batch norm's statistics) like the
            weights; "copy" goes with the buffers that the model has. What is no floating-point
            number is always the model's.

    Attributes:
        updates: updates since it began, those that the device left out included.

    Raises:
        ValueError: if an argument is out of range; when attached, if the trainer has one already.
    """

    decay: float = attrs.field(default=0.999, validator=check_share)
    warmup: bool = True
    buffers: Literal["average", "copy"] = attrs.field(
        default="average", validator=attrs.validators.in_(("average", "copy"))
    )
    updates: int = attrs.field(default=0, init=False)
    _missed: Tensor | float = attrs.field(default=0.0, init=False, repr=False)
    _average: dict[str, Tensor] = attrs.field(factory=dict, init=False, repr=False)
    _places: dict[str, Place] = attrs.field(factory=dict, init=False, repr=False)
    _made: MadeUpdates = attrs.field(factory=MadeUpdates, init=False, repr=False)
    _trainer: Trainer | None = attrs.field(default=None, init=False, repr=False)
    _in_use: bool = attrs.field(default=False, init=False, repr=False)

    def attach(self, trainer: Trainer) -> None:
        """Average the weights of the trainer's model after each of its updates."""
        if any(isinstance(other, WeightAverage) for other in trainer.handlers):
            raise ValueError("a trainer must have one WeightAverage, got a second one")
        self._trainer = trainer
        self._made.attach(trainer)
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(StepEvents.OPTIMIZER_STEPPED, self._update)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averages into the trainer's model, and the trained weights back afterwards.

        They come back bit for bit, after an error too. Inside itself it changes nothing. Over
        several ranks all have to enter it.
        """
        if self._in_use:
            yield
            return
        model = unwrapped(self._begun().model)
        inside = {key: place.tensor for key, place in self._places.items()}
        trained = [(tensor, tensor.detach().clone()) for tensor in inside.values()]
        trained += [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        self._in_use = True
        try:
            with torch.no_grad():
                for key, tensor in inside.items():
                    tensor.copy_(self._average[key])
                share_buffers(model)
            yield
        finally:
            with torch.no_grad():
                for tensor, value in trained:
                    tensor.copy_(value)
            self._in_use = False

    def average_state_dict(self) -> dict[str, Tensor]:
        """Return a state of the model with the averages in it: copies, under the plain keys.

        A weight in half precision has its average in float32 here too, and what is sharded is so
        here.
        """
        model = unwrapped(self._begun().model)
        averages = {id(place.tensor): self._average[key] for key, place in self._places.items()}
        return {
            key.replace("_orig_mod.", ""): averages.get(id(value), value).detach().clone()
            if isinstance(value, Tensor)
            else value
            for key, value in model.state_dict(keep_vars=True).items()
        }

    def export(self, path: Path | str) -> None:
        """Write the averaged weights as a safetensors file, for other programs to read.

        Of a sharded model all ranks call it, and rank 0 writes.

        Raises:
            ImportError: without the extra `safetensors`.
            CheckpointError: if the file cannot be written; an earlier one stands.
        """
        check_can_export()
        weights = whole_state(self.average_state_dict())
        if weights or rank() == 0:
            export_weights(weights, Path(path))

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, the live ones, and the number of updates.

        Raises:
            CheckpointError: while the averages are in the model, whose weights are not the trained
                ones then.
        """
        if self._in_use:
            raise CheckpointError(
                "a run must be saved with its trained weights, got the averaged ones in the model: "
                "save it after averaged()"
            )
        self._begun()
        return {
            "updates": self.updates,
            "missed": self._missed,
            "average": dict(self._average),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` returned.

        Raises:
            CheckpointError: if it holds averages of other weights.
        """
        trainer = self._begun()
        saved, here = state_dict["average"], self._average
        other = [k for k in here if k in saved and saved[k].shape != here[k].shape]
        other += [*(saved.keys() ^ here.keys())]
        if other:
            raise CheckpointError(
                "the averages must be of this model's weights, with buffers="
                f"{self.buffers!r}, got others of {', '.join(sorted(other)[:8])}"
            )
        for key, average in here.items():
            average.copy_(shard_of(saved[key], average))
        self.updates, self._missed = state_dict["updates"], state_dict["missed"]
        if isinstance(self._missed, Tensor):
            self._missed = self._missed.to(trainer.device)

    def _begun(self) -> Trainer:
        """Return the trainer, with an average to work on."""
        if self._trainer is None:
            raise RuntimeError("a WeightAverage must be attached to a trainer first, got none")
        if not self._places:
            self._begin(self._trainer)
        return self._trainer

    def _begin(self, trainer: Trainer) -> None:
        """Take the weights as they are for the average."""
        self._places = {
            key: place
            for key, place in places(trainer.model).items()
            if is_continuous(place.tensor) and not (place.is_buffer and self.buffers == "copy")
        }
        self._average, self.updates, self._missed = {}, 0, 0.0
        for key, place in self._places.items():
            value = place.tensor.detach()
            wide = torch.promote_types(value.dtype, torch.float32)
            self._average[key] = value.to(wide, copy=True)

    def _start(self, trainer: Trainer) -> None:
        if trainer.state.iteration == 0 or not self._places:
            self._begin(trainer)

    def _update(self, _: Trainer) -> None:
        made = self._made.last()
        if made is False:
            return
        seen = self.updates - self._missed
        weight = 1 - self._decay_after(seen)
        if made is not True:
            weight = weight * made
            self._missed = self._missed + 1 - made
        values = [place.tensor for place in self._places.values()]
        follow([*self._average.values()], values, weight)
        self.updates += 1

    def _decay_after(self, updates: Tensor | float) -> Tensor | float:
        if not self.warmup:
            return self.decay
        grown = (1 + updates) / (10 + updates)
        return grown.clamp(max=self.decay) if isinstance(grown, Tensor) else min(grown, self.decay)
