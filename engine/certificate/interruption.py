"""A run that is interrupted and resumed, compared with an uninterrupted one."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import attrs
import torch
from ignite.engine import Engine, Events
from torch import nn

from diptych.engine.certificate.differences import Difference, find_differences
from diptych.engine.certificate.training_copy import check_not_sharded
from diptych.engine.errors import ResumeError
from diptych.engine.random_state import (
    preserved_random_state,
    random_state,
    set_random_state,
)
from diptych.engine.state.handler_states import attached
from diptych.engine.state.run_state import load_run_state, run_state
from diptych.engine.trainer import Trainer

Build = Callable[[], tuple[Trainer, Iterable[Any]]]
"""Returns a new trainer with its handlers attached, and its loader."""


@attrs.frozen
class InterruptionReport:
    """The differences between a resumed run and an uninterrupted one.

    Attributes:
        steps: iterations of the whole run.
        at: iterations before the interruption.
        differences: values of the final state that differ.
        forgotten: attributes that the resumed run did not get back: the likely cause.
    """

    steps: int
    at: int
    differences: tuple[Difference, ...]
    forgotten: tuple[Difference, ...]

    @property
    def passed(self) -> bool:
        """Whether the resumed run ended exactly like the uninterrupted one."""
        return not self.differences

    def __str__(self) -> str:
        head = f"interrupted after {self.at} of {self.steps} iterations: "
        if self.passed:
            return head + "nothing changes"
        lines = [head + f"{len(self.differences)} values of the final state change"]
        lines += [f"  {difference}" for difference in self.differences[:8]]
        if self.forgotten:
            lines.append("not saved, or not restored (add them to a state_dict):")
            lines += [f"  {difference}" for difference in self.forgotten]
        return "\n".join(lines)


def check_interruption(build: Build, steps: int, at: int) -> InterruptionReport:
    """Run a training uninterrupted and resumed; see `Certificate.interruption`."""
    if not 1 <= at < steps:
        raise ValueError(
            f"at must lie in [1, {steps - 1}], inside a run of {steps} steps, got {at}"
        )
    with preserved_random_state():
        start = random_state()
        whole, loader = build()
        check_not_sharded(whole)
        whole.run(loader, max_iters=steps)
        cut, saved = _interrupted(build, start, steps, at)
        set_random_state(start)
        resumed, loader = build()
        resumed.state.dataloader = loader
        load_run_state(resumed, saved)
        forgotten = tuple(_forgotten(cut, resumed))
        resumed.run(loader, max_iters=steps)
        differences = (
            *find_differences("", run_state(whole), run_state(resumed)),
            *_differences_of_modules(whole, resumed),
        )
    return InterruptionReport(steps, at, differences, forgotten)


def _interrupted(
    build: Build, start: Mapping[str, Any], steps: int, at: int
) -> tuple[Trainer, dict[str, Any]]:
    """Run a training up to an interruption; return it and its state, as read from a file."""
    set_random_state(start)
    trainer, loader = build()

    def stop(_: Engine) -> None:
        if trainer.state.iteration == at:
            trainer.terminate()

    def stop_inside_an_epoch(engine: Engine) -> None:
        if trainer.epoch_iteration != trainer.state.epoch_length:
            stop(engine)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, stop_inside_an_epoch)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, stop)
    trainer.run(loader, max_iters=steps)
    if trainer.epoch_iteration and trainer.batches.position() is None:
        raise ResumeError(
            "an interruption inside an epoch needs a loader with state_dict() and "
            f"load_state_dict(), got {type(loader).__name__}. Use a SeededLoader, or interrupt at "
            "the end of an epoch."
        )
    file = io.BytesIO()
    torch.save(run_state(trainer), file)
    file.seek(0)
    return trainer, torch.load(file, weights_only=True)


def _forgotten(cut: Trainer, resumed: Trainer) -> Iterator[Difference]:
    """Yield the attributes that differ between the interrupted run and the one that resumed it."""
    for name, before, after in _parts(cut, resumed):
        mine, other = _attributes(before), _attributes(after)
        for key in sorted(mine.keys() & other.keys()):
            yield from find_differences(f"{name}.{key}", mine[key], other[key])


def _differences_of_modules(whole: Trainer, resumed: Trainer) -> Iterator[Difference]:
    """Yield the weights that differ in modules that handlers own: an average, a teacher."""
    for name, before, after in _handlers(whole, resumed):
        others = _attributes(after)
        for key, module in _attributes(before).items():
            if isinstance(module, nn.Module) and isinstance(others.get(key), nn.Module):
                yield from find_differences(f"{name}.{key}", module, others[key])


def _handlers(cut: Trainer, resumed: Trainer) -> Iterator[tuple[str, Any, Any]]:
    for before, after in zip(attached(cut), attached(resumed), strict=False):
        if type(before) is type(after):
            yield type(before).__name__, before, after


def _parts(cut: Trainer, resumed: Trainer) -> Iterator[tuple[str, Any, Any]]:
    yield from _handlers(cut, resumed)
    for part in ("model", "loss"):
        modules = dict(getattr(resumed, part).named_modules())
        for path, module in getattr(cut, part).named_modules():
            yield f"{part}.{path}".rstrip("."), module, modules[path]
    yield "task", cut.task, resumed.task
    yield "transform", cut.transform, resumed.transform
    yield "optimizer", cut.optimizer, resumed.optimizer


def _attributes(owner: Any) -> dict[str, Any]:
    slots = [name for kind in type(owner).__mro__ for name in getattr(kind, "__slots__", ())]
    values = {name: getattr(owner, name) for name in slots if hasattr(owner, name)}
    values.update(getattr(owner, "__dict__", {}))
    buffers = values.pop("_buffers", {})
    values.pop("_modules", None)
    return {**values, **buffers}
