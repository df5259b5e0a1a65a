"""Where a run's health is read besides its features: contents, weights and temperatures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import attrs
import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn

from diptych.engine.distributed.collectives import sum_over_ranks
from diptych.engine.distributed.dtensor import norms
from diptych.engine.evaluator import Evaluator
from diptych.engine.tasks import ImageText, Outputs
from diptych.engine.trainer import Trainer


@runtime_checkable
class BoundedScale(Protocol):
    """A learned temperature: ln(1 / tau) as a parameter, and the bounds of 1 / tau."""

    logit_scale: Tensor | None
    min_scale: float | None
    max_scale: float | None


def bounded_scales(loss: nn.Module) -> dict[str, BoundedScale]:
    """Return the temperatures of a loss that are learned between two bounds, by what to call them.

    The only one is `temperature_position`; several have the names of their modules before it.
    """
    found: dict[str, BoundedScale] = {}
    for path, module in loss.named_modules():
        if not isinstance(module, BoundedScale) or module.logit_scale is None:
            continue
        if module.min_scale and module.max_scale:
            found[path] = module
    if len(found) == 1:
        return {"temperature_position": next(iter(found.values()))}
    return {f"{path}/temperature_position": module for path, module in found.items()}


def position(scale: BoundedScale) -> Tensor:
    """Return where ln(1 / tau) stands between its bounds, from 0 to 1."""
    assert scale.logit_scale is not None
    assert scale.min_scale is not None
    assert scale.max_scale is not None
    low, high = math.log(scale.min_scale), math.log(scale.max_scale)
    return (scale.logit_scale.detach().float() - low) / (high - low)


def components(model: nn.Module) -> dict[str, nn.Module]:
    """Return the children of a model that have parameters; of a mere wrapper, its only child's."""
    children = {n: c for n, c in model.named_children() if any(True for _ in c.parameters())}
    if len(children) == 1 and not any(True for _ in model.parameters(recurse=False)):
        ((name, child),) = children.items()
        return components(child) or {name: child}
    return children


class Moving:
    """Says which share of a module's parameters have changed since it was last asked.

    A parameter has changed where its norm has: one number is kept for each.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters: list[Tensor] = list(module.parameters())
        self._norms: Tensor | None = None

    @property
    def frozen(self) -> bool:
        """Whether no parameter wants a gradient."""
        return not any(parameter.requires_grad for parameter in self._parameters)

    def start(self, kept: Sequence[float] | None = None) -> None:
        """Compare with these norms next; None: with those of now."""
        now = self._now()
        self._norms = now if kept is None else now.new_tensor(kept)

    def state(self) -> list[float] | None:
        """Return the norms that are compared with next."""
        return None if self._norms is None else self._norms.tolist()

    def __call__(self) -> Tensor:
        """Return the share, a scalar on the parameters' device."""
        now = self._now()
        before = now if self._norms is None else self._norms
        self._norms = now
        return (now != before).float().mean()

    @torch.no_grad()
    def _now(self) -> Tensor:
        # Rounding to the type of half-precision weights would hide what changes in them.
        wide = any(parameter.dtype == torch.float64 for parameter in self._parameters)
        found = norms(self._parameters, None if wide else torch.float32)
        return torch.stack([norm.float() for norm in found])


def contents(trainer: Trainer, samples: int) -> list[Tensor]:
    """Return numbers [n] that are equal where the batch's texts are, or nothing where it has none.

    Args:
        trainer: its task says where the texts are; they may be tokens [B, L] or strings.
        samples: rows to look at, at most.
    """
    if not isinstance(trainer.task, ImageText):
        return []
    text: Any = trainer.task.optional_part(trainer.state.batch, "text")
    if isinstance(text, (list, tuple)) and all(isinstance(one, str) for one in text):
        numbers: dict[str, int] = {}
        ids = [numbers.setdefault(one, len(numbers)) for one in text[:samples]]
        return [torch.tensor(ids).to(trainer.device, non_blocking=True)]
    if isinstance(text, Tensor) and text.ndim == 2 and not text.is_floating_point():
        return [_hashes(text[:samples]).to(trainer.device, non_blocking=True)]
    return []


def _hashes(tokens: Tensor) -> Tensor:
    """Return a number for each row [n, L] of tokens: equal for equal rows, else hardly ever."""
    places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    factors = places * 0x9E3779B97F4A7C1 + (places * 0x2545F491) ** 2  # wrap around
    mixed = (tokens.long() + 1) * factors
    return (mixed ^ (mixed >> 29)).sum(1)


@attrs.define(eq=False)
class HeldOutPairs:
    """Takes the AUROC of the pairs that an evaluator sees, and gives its mean over their batches.

    Attributes:
        statistics: returns the statistics of a batch's pairs, or None where it has none.
        publish: called with the mean at the end of an evaluation that has pairs, on every rank.
    """

    statistics: Callable[[Outputs], dict[str, Tensor] | None]
    publish: Callable[[float], None]
    _values: list[Tensor] = attrs.field(factory=list, init=False)

    def attach(self, evaluator: Evaluator) -> None:
        """Look at the evaluator's batches."""
        evaluator.add_event_handler(Events.STARTED, self._start)
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._look)
        evaluator.add_event_handler(Events.COMPLETED, self._end, evaluator.device)

    def _start(self, _: Engine) -> None:
        self._values = []

    @torch.no_grad()
    def _look(self, evaluator: Engine) -> None:
        found = self.statistics(evaluator.state.output)  # type: ignore[arg-type]
        if found is not None:
            self._values.append(found["auroc"].double())

    def _end(self, device: torch.device) -> None:
        values = torch.stack(self._values) if self._values else torch.zeros(0, device=device)
        # A batch of one pair has no strangers.
        valid = values.isfinite()
        sums = torch.stack([values.nan_to_num().sum().double(), valid.sum().double()])
        total, count = sum_over_ranks(sums).tolist()
        if count:
            self.publish(total / count)
