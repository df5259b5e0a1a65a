"""The `LossGuard`, and the command that makes an update again that it caught.

    python -m diptych.handlers.loss_guard.replay replay RECORD --factory module:function

`function()` builds the trainer of the run, or a tuple that begins with it, with the same model,
loss, task, optimizer and settings; what it attaches takes no part. The weights, buffers, random
state and batch are those of the record. The command prints each term of the loss and the norms,
recorded and reproduced, and exits with 0 where they agree, with 1 where they do not and with 2
where it cannot be tried. A record of several ranks is replayed by as many, each with the file of
its own rank: `torchrun --nproc-per-node N -m diptych.handlers.loss_guard.replay replay ...`.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
from ignite.engine import Events
from torch import Tensor

from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.errors import CheckpointError
from diptych.engine.events import StepEvents
from diptych.engine.random_state import preserved_random_state, set_random_state
from diptych.engine.state.run_state import fingerprint
from diptych.engine.trainer import Trainer
from diptych.handlers.loss_guard.fault_records import (
    NAME,
    load_update_state,
    read_record,
    record_path,
)
from diptych.handlers.loss_guard.guard import FaultError, LossGuard, norms_by_name
from diptych.handlers.optimization.gradient_norms import shared_norms

__all__ = ["FaultError", "LossGuard", "Replay", "replay"]

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
    """Make the update of a record again, up to its gradients.

    Random generators are left as they were.

    Args:
        path: of the record; of several ranks', any of them.
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
            f"torchrun --nproc-per-node {record['ranks']} -m diptych.handlers.loss_guard.replay"
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
    """Give the lines in which the command tells what came out."""
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


def find_factory(text: str) -> Callable[[], Any]:
    """Return the function that `module:function` names.

    Raises:
        ValueError: if it does not have this form, or names no function of a module that there is.
    """
    module, separator, name = text.partition(":")
    if not separator or not module or not name:
        raise ValueError(f"a factory must be given as module:function, got {text!r}")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the factory's module must be one that can be imported from here, got {module!r}: "
            f"{error}"
        ) from error
    factory = getattr(found, name, None)
    if not callable(factory):
        raise ValueError(  # noqa: TRY004 - the text is at fault
            f"module {module!r} must have a function {name!r}, got {factory!r}"
        )
    return factory  # type: ignore[no-any-return]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m diptych.handlers.loss_guard.replay",
        description="Make an update again that a LossGuard caught.",
    )
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "replay", help="compare the terms and norms of a record with those of a new try"
    )
    command.add_argument("record", type=Path, help=f"a file {NAME.pattern}")
    command.add_argument("--factory", required=True, help="module:function, builds the trainer")
    command.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="largest relative difference"
    )
    flags = parser.parse_args(arguments)
    try:
        joined = _join_ranks()
        try:
            replayed = replay(flags.record, find_factory(flags.factory))
        finally:
            if joined:
                dist.destroy_process_group()
    except (CheckpointError, TypeError, ValueError) as error:
        sys.stderr.write(f"{parser.prog}: error: {error}\n")
        return 2
    sys.stdout.write("\n".join(report(replayed, flags.tolerance)) + "\n")
    return 1 if replayed.differing(flags.tolerance) else 0


def _join_ranks() -> bool:
    """Join the group that a launcher has prepared; say whether there was one to join."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return True


if __name__ == "__main__":
    sys.exit(main())
