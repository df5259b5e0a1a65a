"""The description of a trainer that must be the same on all ranks, compared before each run."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import attrs
import ignite
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, DistributedSampler

from diptych.engine.data.loader_contract import length_of
from diptych.engine.data.seeded_loader import SeededLoader
from diptych.engine.distributed.agreement import wait_for_all_ranks
from diptych.engine.distributed.comparison import check_equal_over_ranks
from diptych.engine.handler import Handler, contract_of
from diptych.engine.state.description import DEPTH, Describer, class_name, settings_of
from diptych.engine.state.handler_states import attached, numbered
from diptych.engine.state.run_identity import (
    module_settings,
    modules_of,
    optimizer_settings,
    requires_grad_of,
)
from diptych.engine.state.run_parts import RunParts

DATA = "data"
"""The description of data: each rank has its own."""
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
DEVICE = re.compile(r"(cuda|xpu|hip|mps|cpu)(:\d+)?")
ORDER = ("batch_size", "seed", "shuffle", "drop_last", "num_replicas")
"""Attributes that decide how a loader or sampler divides the samples among the ranks."""


def check_ranks_agree(trainer: RunParts, limits: Mapping[str, Any]) -> None:
    """Check that the trainer is the same on all ranks, with one exchange.

    Handlers that neither change nor communicate anything, functions at events, and the ranks' data
    may differ.

    Raises:
        RuntimeError: on all ranks, if something differs; it names each difference.
    """
    wait_for_all_ranks("the start of a run")
    check_equal_over_ranks(
        "the training",
        rank_identity(trainer, limits),
        "Build and run the trainer alike on every rank: of the handlers, only those that neither "
        "change nor communicate anything may exist on some ranks",
        unless_others="order",
    )


def rank_identity(trainer: RunParts, limits: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a trainer that all ranks must share, as plain values."""
    describer = _WithoutData()
    parts = {"task": trainer.task, "transform": trainer.transform, "step": trainer.step}
    handlers = _handlers(trainer, describer)
    return {
        "run": dict(limits),
        "trainer": {**attrs.asdict(trainer.settings), "device": trainer.device.type},
        **{name: describer.describe(part, name) for name, part in parts.items()},
        "modules": _modules(trainer),
        "requires_grad": requires_grad_of(trainer),
        "training": _training(trainer),
        "optimizer": _without_addresses(optimizer_settings(trainer.optimizer)),
        "loader": shared_order(trainer.state.dataloader),
        "handlers": handlers,
        "order": list(handlers),
        "versions": {
            "torch": str(torch.__version__),
            "ignite": str(ignite.__version__),
            "python": ".".join(platform.python_version_tuple()[:2]),
        },
    }


class _WithoutData(Describer):
    """Describes settings; tensors, data sets, loaders, generators and paths are only `DATA`."""

    def describe(self, value: Any, path: str, depth: int = DEPTH) -> Any:
        """Return a value as plain data; see `Describer`."""
        return DATA if _is_data(value) else super().describe(value, path, depth)


def _is_data(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray, torch.Generator, PurePath, Dataset)):
        return True
    if isinstance(value, Mapping):
        return any(map(_is_data, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(map(_is_data, list(value)[:1]))  # the items of a data set are alike
    plain = isinstance(value, (str, bytes, type, nn.Module)) or callable(value)
    return isinstance(value, Iterable) and not plain


def _modules(trainer: RunParts) -> dict[str, Any]:
    """Return the classes of all modules, before the first iteration with their plain attributes.

    Later an attribute may count what a rank has seen. One that holds the rank, or its device, is
    left out; so is a dictionary of the model, which may hold both, as a map of devices does.
    """
    modules = modules_of(trainer)
    if trainer.state.iteration:
        return {path: class_name(type(module)) for path, module in modules.items()}
    return {path: _own_settings(path, module) for path, module in modules.items()}


def _own_settings(path: str, module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in module_settings(module).items()
        if "rank" not in name
        and not (isinstance(value, str) and DEVICE.fullmatch(value))
        and (path.startswith("loss") or not isinstance(value, dict))
    }


def _training(trainer: RunParts) -> dict[str, bool]:
    """Return the mode of each module. The trainer puts a root in eval mode into training mode."""
    modules = modules_of(trainer)
    return {
        path: part.training or not modules[path.partition(".")[0]].training
        for path, part in modules.items()
    }


def _handlers(trainer: RunParts, describer: Describer) -> dict[str, Any]:
    """Return the settings of the handlers that every rank must have, by key, in their order."""
    owners = [owner for owner in attached(trainer) if _is_needed_everywhere(owner)]
    keys = numbered(contract_of(owner).key for owner in owners)
    return {
        key: {
            "class": class_name(type(owner)),
            **{name: describer.describe(value, name) for name, value in _settings(owner).items()},
        }
        for key, owner in zip(keys, owners, strict=True)
    }


def _settings(owner: object) -> Mapping[str, Any]:
    """Return a handler's settings; none for an object of another kind, which may count calls."""
    return (settings_of(owner)[0] or {}) if isinstance(owner, Handler) else {}


def _is_needed_everywhere(owner: object) -> bool:
    collective = getattr(owner, "collective", False) is True
    return collective or bool(contract_of(owner).changes)


def shared_order(loader: Any) -> dict[str, Any]:
    """Return what ranks that share the samples of a data set must have in common.

    They do so with a `SeededLoader` or a `DistributedSampler`. The data of other loaders are each
    rank's own.
    """
    found: dict[str, Any] = {}
    if isinstance(loader, SeededLoader):
        found = {"class": class_name(type(loader)), **_attributes(loader)}
        found["samples"] = length_of(loader.dataset)
    sampler, inner = getattr(loader, "sampler", None), getattr(loader, "loader", None)
    if isinstance(sampler, DistributedSampler):
        found["sampler"] = {"class": class_name(type(sampler)), **_attributes(sampler)}
    if inner is not None and inner is not loader and (own := shared_order(inner)):
        found["loader"] = {**own, "count": getattr(loader, "count", None)}
    return found


def _attributes(part: Any) -> dict[str, Any]:
    given = {name: getattr(part, name, getattr(part, f"_{name}", None)) for name in ORDER}
    return {name: value for name, value in given.items() if isinstance(value, (bool, int))}


def _without_addresses(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_addresses(item) for key, item in value.items()}
    return ADDRESS.sub("", value) if isinstance(value, str) else value
