"""Replay: repeats an update that a `LossGuard` recorded, up to its gradients.

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

from diptych.engine.distributed.agreement import on_all_ranks
from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.errors import CheckpointError
from diptych.engine.events import StepEvents
from diptych.engine.random_state import preserved_random_state, set_random_state
from diptych.engine.trainer import Trainer
from diptych.handlers.contained_paths import contained_path
from diptych.handlers.loss_guard.fault_records import (
    NAME,
    load_update_state,
    read_record,
    record_path,
)
from diptych.handlers.optimization.gradient_norms import shared_norms

TOLERANCE = 1e-5
"""Largest relative difference at which two values agree."""
PARTS: dict[str, type] = {
    "iteration": int,
    "epoch": int,
    "rank": int,
    "ranks": int,
    "terms": dict,
    "norms": dict,
    "random": dict,
    "trained": dict,
}
"""The parts that a replay needs of a record, with their types."""
PARTS_OF_RANK_0: dict[str, type] = {"model": dict, "loss": dict}


@attrs.frozen
class Replay:
    """The values of an update when it was recorded, and when it was replayed.

    Attributes:
        record: the record, without weights.
        reproduced: terms ("terms/...") and norms ("norms/...") of the replay.
        settings: the settings that differ, by name: the recorded value and the current one.
    """

    record: Mapping[str, Any]
    reproduced: Mapping[str, float]
    settings: Mapping[str, tuple[Any, Any]]

    @property
    def recorded(self) -> dict[str, float]:
        """Terms and norms of the record, with the names of `reproduced`."""
        return _flat(self.record["terms"], self.record["norms"])

    def differing(self, tolerance: float = TOLERANCE) -> list[str]:
        """Return the names of the values that differ; NaN equals NaN.

        Args:
            tolerance: largest accepted difference relative to the larger value, >= 0.
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

    The states of the random generators are restored afterwards.

    Args:
        path: the record; if there are several ranks, that of any of them.
        factory: returns the trainer, or a tuple whose first element it is. Its handlers are not
            called.

    Raises:
        CheckpointError: if the record cannot be read, or belongs to another model or loss, or to
            another number of ranks; on all ranks, if one of them cannot read its own.
        TypeError: if the factory returns no trainer.
    """
    path = Path(path)
    own, of_first = on_all_ranks(lambda: _read(path))
    with preserved_random_state():
        trainer = _built(factory)
        load_update_state(trainer, of_first)
        reproduced = _update(trainer, own)
    then, now = own.get("settings", {}), trainer.identity.values["trainer"]
    settings = {k: (then.get(k), now[k]) for k in now if then.get(k, now[k]) != now[k]}
    return Replay(
        {k: v for k, v in own.items() if k not in {"model", "loss"}}, reproduced, settings
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the records of this rank and of rank 0."""
    record = _checked(path)
    if record["ranks"] != world_size():
        raise CheckpointError(
            f"record {path} is of {record['ranks']} ranks, got {world_size()}. Replay it with "
            f"torchrun --nproc-per-node {record['ranks']} -m diptych replay"
        )
    return tuple(  # type: ignore[return-value]
        record
        if record["rank"] == of_rank
        else _checked(_record_beside(path, record["iteration"], of_rank))
        for of_rank in (rank(), 0)
    )


def _record_beside(path: Path, iteration: int, of_rank: int) -> Path:
    """Return the path of another rank's record."""
    try:
        return contained_path(path.parent, record_path(Path(), iteration, of_rank).name, NAME)
    except ValueError as error:
        raise CheckpointError(f"the records beside {path} cannot be read: {error}") from error


def _checked(path: Path) -> dict[str, Any]:
    """Read a record, and check the parts that a replay needs."""
    record = read_record(path)
    parts = {**PARTS, **(PARTS_OF_RANK_0 if record.get("rank") == 0 else {})}
    for part, kind in parts.items():
        if not isinstance(record.get(part), kind) or isinstance(record[part], bool):
            raise CheckpointError(
                f"record {path} must hold {part} as a {kind.__name__}, got a "
                f"{type(record.get(part)).__name__}. Restore it from a copy, or replay another one."
            )
    return record


def _built(factory: Callable[[], Any]) -> Trainer:
    built = factory()
    trainer = built[0] if isinstance(built, tuple) and built else built
    if not isinstance(trainer, Trainer):
        raise TypeError(
            "the factory must return a Trainer, or a tuple that begins with one, got "
            f"{type(trainer).__name__}"
        )
    return trainer.replica()  # without handlers, which may save, log or judge the update


def _update(trainer: Trainer, record: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}

    def read() -> None:
        norms = shared_norms(trainer).measure_again(trainer).by_name(trainer)
        found.update(_flat(trainer.terms, norms))

    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: _restore_place(trainer, record))
    trainer.add_event_handler(StepEvents.GRADIENTS_READY, read)
    trainer.run([record["batch"]], max_iters=1)
    return found


def _restore_place(trainer: Trainer, record: Mapping[str, Any]) -> None:
    """Restore the random state, and epoch and iteration, from which a transform draws."""
    trainer.state.epoch, trainer.state.iteration = record["epoch"], record["iteration"]
    try:
        set_random_state(record["random"])
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"the record's random state cannot be restored: {error}. Replay another record."
        ) from error


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
    """Yield the lines of the report that the command prints."""
    record = replayed.record
    yield f"iteration {record['iteration']}, epoch {record['epoch']}, rank {record['rank']}"
    if record["ids"] is not None:
        yield f"samples: {', '.join(map(str, record['ids']))}"
    yield f"latest checkpoint: {record['checkpoint'] or 'none'}"
    for name, (then, now) in replayed.settings.items():
        yield f"{name} differs: {then} recorded, {now} now"
    yield from _table(replayed.recorded, replayed.reproduced, set(replayed.differing(tolerance)))


def _table(
    recorded: Mapping[str, float], reproduced: Mapping[str, float], differing: set[str]
) -> Iterator[str]:
    """Yield a table of all terms, the total norm, and norms that differ or are not finite."""
    names = list(dict.fromkeys([*recorded, *reproduced]))
    shown = [n for n in names if n.startswith("terms/") or n == "norms/total"]
    shown += [n for n in names if n not in shown and (n in differing or not _finite(recorded, n))]
    width = max(len(name) for name in shown)
    yield f"{'':{width}}  {'recorded':>16}  {'reproduced':>16}"
    for name in shown:
        columns = "  ".join(f"{_number(values, name):>16}" for values in (recorded, reproduced))
        yield f"{name:{width}}  {columns}{'  differs' if name in differing else ''}"
    yield f"{len(names) - len(shown)} further norms of single parameters are finite and agree"
    yield f"{len(differing)} values differ"


def _finite(values: Mapping[str, float], name: str) -> bool:
    return math.isfinite(values.get(name, math.nan))


def _number(values: Mapping[str, float], name: str) -> str:
    return f"{values[name]:.8g}" if name in values else "missing"
