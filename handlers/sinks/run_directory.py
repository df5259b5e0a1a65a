"""Where a run puts its files, and the record of what it was run with."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import ignite
import torch
import torch.distributed as dist
from ignite.engine import Events
from torch import Tensor, nn
from torch.optim import Optimizer

from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.distributed.hang_report import waits_at
from diptych.handlers.files import make_folder
from diptych.handlers.sinks.jsonl import json_number

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer


def new_run(root: Path | str, name: str) -> Path:
    """Make the folder of a new run, `root/name/2026-01-31_09-30-00Z`, in UTC.

    A second run of the same second gets a number. Over several ranks, whose process group must
    stand by now, all get the same folder.

    Raises:
        ValueError: if the name is not that of one folder.
    """
    parent = _parent(root, name)
    return Path(_from_rank_zero(str(_make(parent)) if rank() == 0 else ""))


def latest_run(root: Path | str, name: str) -> Path | None:
    """Return the folder of the last run that `new_run` made, or None where there is none yet.

    Raises:
        ValueError: if the name is not that of one folder.
    """
    parent = _parent(root, name)
    runs = sorted(path for path in parent.glob("*_*Z*") if path.is_dir())
    latest = _from_rank_zero(str(runs[-1]) if runs else "")
    return Path(latest) if latest else None


@attrs.define(eq=False)
class RunRecord:
    """Writes what a run was run with into `settings.json`; `run_settings` says what that is.

    A resumed run writes it again. The file is replaced in one step.

    Event: `STARTED`. Rank 0 alone writes.
    Cost: a few milliseconds, once.

    Args:
        directory: the run's folder; made if it is not there.
    """

    directory: Path = attrs.field(converter=Path)

    def attach(self, trainer: Trainer) -> None:
        """Write the record when the trainer starts."""
        if rank() == 0:
            trainer.add_event_handler(Events.STARTED, self._write)

    def _write(self, trainer: Trainer) -> None:
        make_folder(self.directory)
        path = self.directory / "settings.json"
        unfinished = path.with_suffix(".json.unfinished")
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(json.dumps(run_settings(trainer), indent=2, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)


def run_settings(trainer: Trainer) -> dict[str, Any]:
    """Return what a run is run with, as JSON holds it.

    The trainer's settings as resolved, the number of parameters of model and loss, the optimizer
    and its groups, the settings of the attached handlers, versions, the command line, the time in
    UTC and the iteration from which the run goes on.
    """
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "iteration": trainer.state.iteration,
        "command": list(sys.argv),
        "trainer": {
            **_as_json(attrs.asdict(trainer.settings)),
            "device": str(trainer.device),
            "ranks": world_size(),
            "max_epochs": trainer.state.max_epochs,
            "max_iters": trainer.state.max_iters,
            "epoch_length": trainer.state.epoch_length,
        },
        "model": parameter_counts(trainer.model),
        "loss": {**parameter_counts(trainer.loss), "settings": repr(trainer.loss)},
        "optimizer": _optimizer_settings(trainer.optimizer),
        "handlers": [_handler_settings(handler) for handler in trainer.handlers],
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of what a run's numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "ignite": ignite.__version__,
        "diptych": _own_version(),
        "platform": platform.platform(),
    }


def _own_version() -> str | None:
    try:
        return importlib.metadata.version("diptych")
    except importlib.metadata.PackageNotFoundError:  # its folders are on the path, not installed
        return None


def parameter_counts(module: nn.Module) -> dict[str, Any]:
    """Return the number of parameters of a module: all, those that train, and by component."""
    parameters = list(module.parameters())
    return {
        "class": _name(module),
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "components": {
            name: sum(p.numel() for p in child.parameters())
            for name, child in module.named_children()
        },
    }


def _parent(root: Path | str, name: str) -> Path:
    if name in {"", ".", ".."} or Path(name).name != name:
        raise ValueError(f"the name of a run must be that of one folder, got {name!r}")
    return Path(root) / name


def _make(parent: Path) -> Path:
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%d_%H-%M-%SZ")
    number = 1
    while True:
        # Zero-padded, so that sorting by name is sorting by time.
        path = parent / (stamp if number == 1 else f"{stamp}-{number:03}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return path


@waits_at("taking the run's folder from the first rank")
def _from_rank_zero(text: str) -> str:
    if world_size() == 1:
        return text
    texts = [text]
    dist.broadcast_object_list(texts, src=0)
    return texts[0]


def _optimizer_settings(optimizer: Optimizer) -> dict[str, Any]:
    groups = [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "parameters": sum(p.numel() for p in group["params"]),
        }
        for group in optimizer.param_groups
    ]
    return {"class": _name(optimizer), "groups": _as_json(groups)}


def _handler_settings(handler: object) -> dict[str, Any]:
    kind: type[Any] = type(handler)
    settings = {
        field.name: _as_json(getattr(handler, field.name))
        for field in (attrs.fields(kind) if attrs.has(kind) else ())
        if field.init and not field.name.startswith("_")
    }
    return {"class": _name(handler), **settings}


def _as_json(value: Any) -> Any:
    """Return a value as JSON holds it; of an object that it cannot hold, the name of its class."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return _as_json(value.item())
    return json_number(value) if isinstance(value, float) else _as_word(value)


def _as_word(value: Any) -> Any:
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, (Path, torch.device, torch.dtype)):
        return str(value)
    return getattr(value, "__qualname__", None) or _name(value)


def _name(instance: object) -> str:
    kind = type(instance)
    return f"{kind.__module__}.{kind.__qualname__}"
