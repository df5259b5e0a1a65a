"""The states of attached objects: found, named, and matched with those of a checkpoint."""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ignite.handlers import Checkpoint, EarlyStopping
from ignite.metrics import Metric
from torch import Tensor, nn
from torch.optim import Optimizer

from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.errors import CheckpointError
from diptych.engine.handler import Stateful, contract_of
from diptych.engine.state.references import (
    SavedOptimizer,
    SavedScheduler,
    averages_behind,
    handlers_behind,
    is_scheduler,
    other_optimizers,
    report_unsaved,
    schedulers_behind,
)
from diptych.engine.state.run_parts import RunParts

logger = logging.getLogger(__name__)


def attached(trainer: RunParts) -> list[Any]:
    """Return every object whose functions the trainer's events call, each once, in order.

    Schedulers, optimizers and torch's averages of weights that only a plain function at an event
    refers to count too, and handlers with a state of an engine that it runs.
    """
    own = (trainer, trainer.model, trainer.loss, trainer.optimizer, trainer.metrics)
    owners = (listener.owner for listener in trainer.listeners)
    behind = (
        *schedulers_behind(trainer),
        *other_optimizers(trainer, of_stateless=True),
        *averages_behind(trainer),
        *handlers_behind(trainer),
    )
    every = (*trainer.handlers, *owners, *behind)
    found = {id(item): item for item in every}
    return [item for key, item in found.items() if key not in {id(part) for part in own}]


def was_stopped_early(trainer: RunParts) -> bool:
    """Return whether Ignite's `EarlyStopping` has ended the run, as its memory says; log it."""
    own: Any = trainer
    for one in attached(trainer):
        ends = isinstance(one, EarlyStopping) and one.trainer is own
        if ends and one.counter >= one.patience:
            logger.warning(
                "Ignite's EarlyStopping ends the run again: its score has not improved for %d "
                "values. To continue, raise its patience.",
                one.counter,
            )
            return True
    return False


def stateful_handlers(trainer: RunParts) -> dict[str, Stateful]:
    """Return every object with a state that is attached or added to an event, by key, in order.

    The second object of a key is called "key#2", the third "key#3".
    """
    keys: list[str] = []
    holders: list[Stateful] = []
    for candidate in attached(trainer):
        holder = candidate
        if not _has_state(candidate):
            holder = getattr(candidate, "ema_model", None)  # Ignite's EMAHandler has no state_dict
        if isinstance(holder, nn.Module) or _has_state(holder):
            keys.append(contract_of(candidate).key)
            holders.append(_plain_holder(holder))
    report_unsaved(trainer, holders)
    return dict(zip(numbered(keys), holders, strict=True))


def _plain_holder(holder: Any) -> Any:
    """Return what saves an object's state as plain values."""
    if isinstance(holder, Optimizer):
        return SavedOptimizer(holder)
    if isinstance(holder, Metric) and type(holder).load_state_dict is Metric.load_state_dict:
        return SavedMetric(holder)
    if isinstance(holder, Checkpoint):
        return SavedCheckpoint(holder)
    return SavedScheduler(holder) if is_scheduler(holder) else holder


class SavedMetric:
    """A metric of Ignite, whose own `load_state_dict` cannot load a list that has grown."""

    def __init__(self, source: Metric) -> None:
        self.source = source

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all ranks."""
        return dict(self.source.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from this rank's state, or start anew if the number of ranks has changed."""
        (states,) = state_dict.values()
        if len(states) == world_size():
            _load_metric(self.source, states[rank()])
        else:
            self.source.reset()


def _load_metric(metric: Metric, state: Mapping[str, Any]) -> None:
    device = metric._device  # noqa: SLF001 - where its state is
    for name, value in state.items():
        setattr(metric, name, _loaded(getattr(metric, name, None), value, device))


def _loaded(own: Any, saved: Any, device: Any) -> Any:
    """Return a saved attribute of a metric; metrics in it stay, and get their states."""
    if isinstance(own, Metric):
        _load_metric(own, saved)
        return own
    if isinstance(saved, Mapping):
        others = own if isinstance(own, Mapping) else {}
        return {key: _loaded(others.get(key), item, device) for key, item in saved.items()}
    if isinstance(saved, (list, tuple)):
        ours = own if isinstance(own, (list, tuple)) else ()
        pairs = itertools.zip_longest(ours[: len(saved)], saved)
        return type(saved)(_loaded(before, item, device) for before, item in pairs)
    return saved.to(device) if isinstance(saved, Tensor) else saved


class SavedCheckpoint:
    """A `Checkpoint` of Ignite; a killed run may have removed files that its state lists."""

    def __init__(self, source: Checkpoint) -> None:
        self.source = source

    def state_dict(self) -> dict[str, Any]:
        """Return the names and priorities of the files."""
        return dict(self.source.state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue with the files that exist: Ignite fails to remove any other."""
        self.source.load_state_dict(state_dict)
        folder = getattr(self.source.save_handler, "dirname", None)
        if folder is not None:
            listed = self.source._saved  # noqa: SLF001 - it has no other way
            listed[:] = [item for item in listed if Path(folder, item.filename).exists()]


def numbered(keys: Iterable[str]) -> list[str]:
    """Return keys that are all different: the second "key" becomes "key#2", the third "key#3"."""
    counts: Counter[str] = Counter()
    different: list[str] = []
    for key in keys:
        counts[key] += 1
        different.append(key if counts[key] == 1 else f"{key}#{counts[key]}")
    return different


def _has_state(candidate: object) -> bool:
    return isinstance(candidate, Stateful) and not isinstance(candidate, type)


def match_states(
    saved: Mapping[str, Any],
    here: Iterable[str],
    pairs: Mapping[str, str] | None = None,
    *,
    by_class: bool = False,
) -> dict[str, Any]:
    """Return the saved state of each key that has one.

    With `by_class`, the names are those of format 1: the class, numbered from the second on.

    Raises:
        CheckpointError: if several handlers share a key and their number has changed, so that
            their states cannot be told apart.
    """
    there, own = _grouped(saved, by_class=by_class), _grouped(here, by_class=by_class)
    matched: dict[str, Any] = {}
    for name in there.keys() & own.keys():
        known = {key: pairs[key] for key in own[name] if pairs and key in pairs}
        if known:
            matched.update((key, saved[other]) for key, other in known.items() if other in saved)
        elif len(there[name]) != len(own[name]):
            raise CheckpointError(
                f"the number of {name} handlers must be the checkpoint's, "
                f"{len(there[name])}, got {len(own[name])}, so that their states cannot be told "
                "apart. Attach as many, in the same order"
            )
        else:
            matched.update((k, saved[s]) for k, s in zip(own[name], there[name], strict=True))
    return matched


def paired_by_settings(saved: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, str]:
    """Return the saved key of each handler here, where several share a key and differ otherwise.

    Handlers with equal settings belong together; of the others, the first here to the first there,
    if there are as many, or none if all on one side are paired.
    """
    there, own = _grouped(saved, by_class=False), _grouped(here, by_class=False)
    pairs: dict[str, str] = {}
    for name in there.keys() & own.keys():
        sides = [(saved[key] for key in there[name]), (here[key] for key in own[name])]
        if len(there[name]) + len(own[name]) > 2 and all(map(_all_differ, sides)):
            pairs.update(_pairs(saved, here, there[name], own[name]))
    return pairs


def _pairs(
    saved: Mapping[str, Any], here: Mapping[str, Any], there: Iterable[str], own: Iterable[str]
) -> dict[str, str]:
    left, found = list(there), dict[str, str]()
    for key in own:
        equal = [other for other in left if saved[other] == here[key]]
        if equal:
            found[key] = equal[0]
            left.remove(equal[0])
    rest = [key for key in own if key not in found]
    if rest and left:
        return found | dict(zip(rest, left, strict=True)) if len(rest) == len(left) else {}
    return found


def _all_differ(settings: Iterable[Any]) -> bool:
    held = list(settings)
    return all(one not in held[:index] for index, one in enumerate(held))


def _grouped(names: Iterable[str], *, by_class: bool) -> dict[str, list[str]]:
    """Return the names that differ in their numbers only, under what they have in common."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        base = re.sub(r"#\d+$", "", name)
        groups[re.sub(r"(\[.*\]|_\d+)$", "", base) if by_class else base].append(name)
    return groups
