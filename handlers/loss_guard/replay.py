"""Repeating an update that a `LossGuard` recorded, up to its gradients.

The command line is `diptych replay RECORD --factory module:function`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
from ignite.engine import Events
from torch import Tensor

from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.errors import CheckpointError
from diptych.engine.events import StepEvents
from diptych.engine.random_state import preserved_random_state, set_random_state
from diptych.engine.state.run_state import fingerprint
from diptych.engine.trainer import Trainer
from diptych.handlers.loss_guard.fault_records import load_update_state, read_record, record_path
from diptych.handlers.loss_guard.guard import norms_by_name
from diptych.handlers.optimization.gradient_norms import shared_norms

TOLERANCE = 1e-5


@attrs.frozen
class Replay:
    """What an update gave when it was recorded, and what it gives now.

    Attributes:
        record: the record, without weights.
        reproduced: terms ("terms/...") and norms ("norms/...") of the replay.
        settings: settings in which the trainer differs from the recorded one, by name: then, now.
    """

    record: Mapping[str, Any]
    reproduced: Mapping[str, float]
    settings: Mapping[str, tuple[Any, Any]]

    @property
    def recorded(self) -> dict[str, float]:
        """Terms and norms of the record, named as in `reproduced`."""
        return _flat(self.record["terms"], self.record["norms"])

    def differing(self, tolerance: float = TOLERANCE) -> list[str]:
        """Return the names of the values that do not agree; NaN agrees with NaN.

        Args:
            tolerance: largest difference relative to the larger of two values, >= 0.
        """
        recorded = self.recorded
        names = [*recorded, *(name for name in self.reproduced if name not in recorded)]
        return [
            name
            for name in names
            if not _agree(recorded.get(name), self.reproduced.get(name), tolerance)
        ]


def replay(path: Path | str, factory: Callable[[], Any]) -> Replay:
    """Repeat the update of a record, up to its gradients.

    Random generators keep their states.

    Args:
        path: the record; of several ranks, any of theirs.
        factory: builds the trainer, or a tuple that begins with it.

    Raises:
        CheckpointError: if the record cannot be read, is of another model or loss, or of
            another number of ranks.
        TypeError: if the factory returns no trainer.
    """
    path = Path(path)
    own, of_first = _read(path)
    with preserved_random_state():
        trainer = _built(factory)
        load_update_state(trainer, of_first)
        reproduced = _update(trainer, own)
    then, now = own["fingerprint"]["settings"], fingerprint(trainer)["settings"]
    settings = {k: (then.get(k), now[k]) for k in now if then.get(k) != now[k]}
    return Replay(
        {k: v for k, v in own.items() if k not in {"model", "loss"}}, reproduced, settings
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return this rank's record, and rank 0's."""
    record = read_record(path)
    if record["ranks"] != world_size():
        raise CheckpointError(
            f"record {path} is of {record['ranks']} ranks, got {world_size()}: replay it with "
            f"torchrun --nproc-per-node {record['ranks']} -m diptych replay"
        )
    return tuple(  # type: ignore[return-value]
        record
        if record["rank"] == of_rank
        else read_record(record_path(path.parent, record["iteration"], of_rank))
        for of_rank in (rank(), 0)
    )


def _built(factory: Callable[[], Any]) -> Trainer:
    built = factory()
    trainer = built[0] if isinstance(built, tuple) and built else built
    if not isinstance(trainer, Trainer):
        raise TypeError(
            "the factory must return a Trainer, or a tuple that begins with one, got "
            f"{type(trainer).__name__}"
        )
    # Nothing that was attached may save, log or judge this update.
    for entries in trainer._event_handlers.values():  # noqa: SLF001 - Ignite removes one by one only
        entries.clear()
    for module in (trainer.model, trainer.loss):
        module.train()
    return trainer


def _update(trainer: Trainer, record: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}

    def read() -> None:
        measured = shared_norms(trainer).measure_anew(trainer)
        found.update(_flat(trainer.terms, norms_by_name(trainer, measured)))

    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: _go_to(trainer, record))
    trainer.add_event_handler(StepEvents.GRADIENTS_READY, read)
    trainer.run([record["batch"]], max_iters=1)
    return found


def _go_to(trainer: Trainer, record: Mapping[str, Any]) -> None:
    """Draw what was drawn: the model from the random state, a transform by epoch and iteration."""
    trainer.state.epoch, trainer.state.iteration = record["epoch"], record["iteration"]
    set_random_state(record["random"])


def _flat(terms: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> dict[str, float]:
    parts = {"terms": terms, "norms": norms}
    return {f"{part}/{k}": float(v) for part, values in parts.items() for k, v in values.items()}


def _agree(recorded: float | None, reproduced: float | None, tolerance: float) -> bool:
    if recorded is None or reproduced is None:
        return False
    if math.isnan(recorded) or math.isnan(reproduced):
        return math.isnan(recorded) and math.isnan(reproduced)
    return math.isclose(recorded, reproduced, rel_tol=tolerance)


def report(replayed: Replay, tolerance: float) -> Iterator[str]:
    """Yield the lines that the command prints."""
    record = replayed.record
    yield f"iteration {record['iteration']}, epoch {record['epoch']}, rank {record['rank']}"
    if record["ids"] is not None:
        yield f"samples: {', '.join(map(str, record['ids']))}"
    yield f"latest checkpoint: {record['checkpoint'] or 'none'}"
    for name, (then, now) in replayed.settings.items():
        yield f"other {name}: {then} recorded, {now} here"
    yield from _table(replayed.recorded, replayed.reproduced, set(replayed.differing(tolerance)))


def _table(
    recorded: Mapping[str, float], reproduced: Mapping[str, float], differing: set[str]
) -> Iterator[str]:
    """Give all terms, the norm of all gradients, and single parameters that are worth a line."""
    names = list(dict.fromkeys([*recorded, *reproduced]))
    shown = [n for n in names if _is_summary(n)]
    shown += [n for n in names if n not in shown and (n in differing or not _sound(recorded, n))]
    width = max(len(name) for name in shown)
    yield f"{'':{width}}  {'recorded':>16}  {'reproduced':>16}"
    for name in shown:
        columns = "  ".join(f"{_number(values, name):>16}" for values in (recorded, reproduced))
        yield f"{name:{width}}  {columns}{'  differs' if name in differing else ''}"
    yield f"{len(names) - len(shown)} finite norms of single parameters agree besides"
    yield f"{len(differing)} values differ"


def _is_summary(name: str) -> bool:
    return name.startswith("terms/") or name == "norms/total"


def _sound(values: Mapping[str, float], name: str) -> bool:
    return math.isfinite(values.get(name, math.nan))


def _number(values: Mapping[str, float], name: str) -> str:
    return f"{values[name]:.8g}" if name in values else "missing"
