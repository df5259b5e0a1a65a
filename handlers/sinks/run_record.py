"""The settings and versions of a run, in `settings.json`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import ignite
import torch
from ignite.engine import Events
from torch.optim import Optimizer

from diptych.engine.distributed.collectives import world_size
from diptych.engine.events import MetricsEvents, RunEvents
from diptych.engine.state.differences import as_lines, differences
from diptych.engine.state.run_identity import RunIdentity
from diptych.handlers.components import model_and_loss_sizes, total_size
from diptych.handlers.files import make_folder, write_atomically
from diptych.handlers.output.output_handler import OutputHandler
from diptych.handlers.output.records import read_identity
from diptych.handlers.output.sealed_json import read_sealed, sealed
from diptych.handlers.run_directory import RunDirectory
from diptych.handlers.sinks.json_values import as_json, class_name

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer


@attrs.define(eq=False)
class RunRecord(OutputHandler):
    """Writes the settings of a run into `settings.json`, and its identity into `identity.json`.

    `run_settings` describes the settings, `RunIdentity` what decides the run's result. A resumed
    run replaces the files, atomically. `settings.json` lists under `starts` when the run was
    started and resumed, and what had changed in its identity since the start before. If a file
    cannot be written (a full disk), it is tried again at each log point and at the end.

    Event: `STARTED`, `MetricsEvents.LOGGED`, `RunEvents.ENDED`. Writes on rank 0 only.
    Cost: a few milliseconds, once.

    Args:
        directory: the run directory; created if missing.
    """

    directory: RunDirectory = attrs.field(converter=RunDirectory)
    _unwritten: dict[Path, str] = attrs.field(factory=dict, init=False, repr=False)

    def listen(self, trainer: Trainer) -> None:
        """Write the record when the trainer starts; called on rank 0 only."""
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.add_event_handler(MetricsEvents.LOGGED, self._write)
        trainer.add_event_handler(RunEvents.ENDED, self._write_now)

    @property
    def unwritten(self) -> dict[str, int]:
        """The files that are not written yet."""
        return {str(path): 1 for path in self._unwritten}

    def _start(self, trainer: Trainer) -> None:
        identity = trainer.identity.as_json()
        settings = {**run_settings(trainer), "starts": self._starts(trainer, identity)}
        text = json.dumps(settings, indent=2, allow_nan=False) + "\n"
        texts = {self.directory.settings: text, self.directory.identity: identity}
        self._unwritten = {path: sealed(text, path.name) for path, text in texts.items()}
        with self.tolerated(str(self.directory), starting=True):
            make_folder(self.directory.path)
        self._write()

    def _starts(self, trainer: Trainer, identity: str) -> list[dict[str, Any]]:
        """Return the starts of the run so far, and this one."""
        state = trainer.state
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        now: dict[str, Any] = {
            "started": started,
            "iteration": state.iteration,
            "epoch": state.epoch,
        }
        if state.iteration == 0:
            return [now]
        try:
            before = read_identity(self.directory.identity)
            earlier = read_sealed(self.directory.settings, without="it is written again")
            starts = list(earlier.get("starts", [{"started": earlier["started"]}]))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return [now]  # missing, or damaged: this start writes new ones
        if before is not None:
            changes = differences(before, RunIdentity.from_json(identity))
            now["changes"] = as_lines(changes)
        return [*starts, now]

    def _write(self) -> None:
        if all(self.may_retry(str(path)) for path in self._unwritten):
            self._write_now()

    def _write_now(self) -> None:
        for path, text in list(self._unwritten.items()):
            with self.tolerated(str(path)):
                make_folder(path.parent)
                write_atomically(path, text)
                del self._unwritten[path]


def run_settings(trainer: Trainer) -> dict[str, Any]:
    """Return the settings of a run as JSON values.

    They are the trainer's resolved settings, the number of parameters of model and loss, the
    optimizer and its groups, the settings of the attached handlers, versions, the command line, the
    time in UTC, and the iteration at which the run starts or resumes.
    """
    state = trainer.state
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "iteration": state.iteration,
        "command": list(sys.argv),
        "trainer": {
            **as_json(attrs.asdict(trainer.settings)),
            "device": str(trainer.device),
            "ranks": world_size(),
            "max_epochs": state.max_epochs,
            "max_iters": state.max_iters,
            "epoch_length": state.epoch_length,
        },
        **_parameter_counts(trainer),
        "optimizer": _optimizer_settings(trainer.optimizer),
        "handlers": [_handler_settings(handler) for handler in trainer.handlers],
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of everything that the values of a run depend on."""
    try:
        diptych = importlib.metadata.version("diptych")
    except importlib.metadata.PackageNotFoundError:  # used from a checkout without an installation
        diptych = None
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "ignite": ignite.__version__,
        "diptych": diptych,
        "platform": platform.platform(),
    }


def _parameter_counts(trainer: Trainer) -> dict[str, Any]:
    """Return class and numbers of parameters of model and loss; a shared one is the model's."""
    sizes, loss = model_and_loss_sizes(trainer.model, trainer.loss)
    components = {name: size.parameters for name, size in sizes.items()}
    return {
        "model": {
            "class": class_name(trainer.model),
            **total_size(sizes)._asdict(),
            "components": components,
        },
        "loss": {
            "class": class_name(trainer.loss),
            **loss._asdict(),
            "settings": repr(trainer.loss),
        },
    }


def _optimizer_settings(optimizer: Optimizer) -> dict[str, Any]:
    groups = [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "parameters": sum(p.numel() for p in group["params"]),
        }
        for group in optimizer.param_groups
    ]
    return {"class": class_name(optimizer), "groups": as_json(groups)}


def _handler_settings(handler: object) -> dict[str, Any]:
    kind: type[Any] = type(handler)
    settings = {
        field.name: as_json(getattr(handler, field.name))
        for field in (attrs.fields(kind) if attrs.has(kind) else ())
        if field.init and not field.name.startswith("_")
    }
    return {"class": class_name(handler), **settings}
