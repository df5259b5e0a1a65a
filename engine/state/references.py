"""The optimizers, schedulers, averages and engines behind functions at events: found, and saved."""

from __future__ import annotations

import dis
import functools
import gc
import itertools
import logging
import sys
import types
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from ignite.engine import Engine
from ignite.handlers.param_scheduler import BaseParamScheduler
from ignite.metrics import Metric
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from diptych.engine.handler import Stateful
from diptych.engine.modules import named_parameters
from diptych.engine.state.run_parts import RunParts

logger = logging.getLogger(__name__)

DEPTH = 6
"""References from a function at an event to an object: closure, attribute, list, ..."""

OBJECTS = 5_000
"""Objects that one search visits at most, so that a data set in a closure costs little."""

ITEMS = 64
"""Items of a container that are visited."""

SKIPPED = (
    *(str, bytes, int, float, complex, type(None), type, types.ModuleType, types.BuiltinMethodType),
    *(Tensor, np.ndarray, nn.Module, Engine, torch.Generator, logging.Logger),
)

LIBRARIES = sys.stdlib_module_names | {"torch", "ignite", "diptych", "numpy", "attr", "attrs"}
"""The packages whose functions and classes are not looked into."""

WRAPPED = "_lr_scheduler"
"""The scheduler in Ignite's wrapper of torch's warm restarts, which has no `state_dict`."""

_REPORTED: WeakSet[Any] = WeakSet()
_DECLARED: WeakKeyDictionary[Optimizer, list[dict[str, Any]]] = WeakKeyDictionary()


def is_scheduler(candidate: object) -> bool:
    """Return whether an object is a scheduler of torch or Ignite."""
    return isinstance(candidate, (LRScheduler, BaseParamScheduler))


def _is_found(candidate: object) -> bool:
    """Return whether an object is one that a search looks for among others, which it skips."""
    return is_scheduler(candidate) or isinstance(candidate, AveragedModel) or _is_engine(candidate)


def _is_engine(candidate: object) -> bool:
    """Return whether an object is an engine that a function may run, such as an evaluator."""
    return isinstance(candidate, Engine) and not hasattr(candidate, "optimizer")  # no trainer


def behind_events(trainer: RunParts, *, of_stateless: bool = False) -> list[Any]:
    """Return the objects that the functions at a trainer's events refer to, in order.

    A function refers to what is in its closure, its defaults, its arguments, the globals that it
    names, and the attributes and methods of these objects; to an engine's step and the functions at
    its events, if it runs an engine. The step, schedulers and averages that are attributes of the
    trainer, and evaluators of handlers count too. With `of_stateless`, what objects with a state of
    their own refer to is left out.
    """
    roots: list[Any] = []
    for listener in trainer.listeners:
        if not (of_stateless and isinstance(listener.owner, Stateful)):
            roots += [listener.added, listener.owner]
            roots += [*listener.arguments, *listener.keywords.values()]
    own = vars(trainer)
    roots += [trainer.step, own.get("_process_function"), *filter(_is_found, own.values())]
    evaluators = (getattr(handler, "evaluator", None) for handler in trainer.handlers)
    return reachable([*roots, *filter(_is_engine, evaluators)])


def variables_of_functions(
    trainer: RunParts, *, assigned: bool = False
) -> Iterator[tuple[str, Any]]:
    """Yield the closure variables of users' functions behind a trainer's events, with their names.

    Those with more than `ITEMS` items are left out.

    Args:
        trainer: the trainer.
        assigned: whether to yield only those that are `nonlocal`, and assigned.
    """
    for function in behind_events(trainer, of_stateless=True):
        if isinstance(function, types.FunctionType) and _is_written_by_user(function):
            code, cells = function.__code__, function.__closure__ or ()
            names = _assigned(code) if assigned else code.co_freevars
            for name, value in zip(code.co_freevars, map(_content, cells), strict=True):
                if name in names and not (isinstance(value, (list, dict)) and len(value) > ITEMS):
                    yield f"{function.__qualname__.rpartition('<locals>.')[2]}.{name}", value


def _assigned(code: types.CodeType) -> set[str]:
    """Return the variables of closures that code assigns, that of functions inside it included."""
    found = {one.argval for one in dis.get_instructions(code) if one.opname == "STORE_DEREF"}
    inner = (one for one in code.co_consts if isinstance(one, types.CodeType))
    return found.union(*map(_assigned, inner))


def other_optimizers(trainer: RunParts, *, of_stateless: bool = False) -> list[Optimizer]:
    """Return the optimizers behind events that hold parameters which the trainer's own lacks.

    Only parameters of the model or the loss count. With `of_stateless`, those of objects with a
    state of their own are left out.
    """
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    named = named_parameters(trainer.model, trainer.loss)
    rest = {id(parameter) for parameter in named.values()} - held
    if not rest:
        return []
    found = behind_events(trainer, of_stateless=of_stateless)
    scheduled = [getattr(one, "optimizer", None) for one in found if is_scheduler(one)]
    optimizers = [one for one in (*found, *scheduled) if isinstance(one, Optimizer)]
    return [
        one
        for one in dict.fromkeys(optimizers)
        if any(id(p) in rest for group in one.param_groups for p in group["params"])
    ]


def averages_behind(trainer: RunParts) -> list[AveragedModel]:
    """Return torch's averages of weights that functions at events refer to, in order."""
    found = behind_events(trainer, of_stateless=True)
    return [one for one in found if isinstance(one, AveragedModel)]


def handlers_behind(trainer: RunParts) -> list[Any]:
    """Return the objects with a state at the events of engines that the trainer's functions run.

    An Ignite handler that a function at an event calls counts too. Metrics of such an engine do
    not: each of its runs starts them anew.
    """
    found: list[Any] = []
    for one in behind_events(trainer, of_stateless=True):
        if _is_engine(one):
            found += map(_owner, _functions_at(one))
        elif type(one).__module__.startswith("ignite.handlers."):
            found.append(one)
    others = (Metric, Engine, nn.Module, Optimizer, type)
    return [one for one in found if isinstance(one, Stateful) and not isinstance(one, others)]


def _functions_at(engine: Engine) -> list[Any]:
    """Return the functions at an engine's events, without Ignite's wrappers for filters."""
    entries = itertools.chain.from_iterable(engine._event_handlers.values())  # noqa: SLF001
    return [getattr(entry[0], "_parent", lambda own=entry[0]: own)() for entry in entries]


def _owner(function: Any) -> Any:
    return getattr(function, "__self__", function)


def reachable(roots: Iterable[Any], *, everything: bool = False) -> list[Any]:
    """Return the objects that roots refer to, roots included, each once, in a stable order.

    With `everything`, objects of this library and schedulers are looked into as well.
    """
    found: dict[int, Any] = {}

    def visit(item: Any, depth: int) -> None:
        if id(item) in found or len(found) >= OBJECTS or _is_skipped(item):
            return
        found[id(item)] = item
        if depth and not isinstance(item, Optimizer) and (everything or _is_users(item)):
            for inner in _references(item):
                visit(inner, depth - 1)

    for root in roots:
        visit(root, DEPTH)
    return list(found.values())


def _is_skipped(item: Any) -> bool:
    return isinstance(item, SKIPPED) and not _is_found(item)


def _is_users(item: Any) -> bool:
    is_users = type(item).__module__.partition(".")[0] != "diptych" or _is_engine(item)
    return is_users and not is_scheduler(item)


def _references(item: Any) -> Iterator[Any]:
    if isinstance(item, types.FunctionType):
        return _of_function(item)
    if isinstance(item, types.MethodType):
        return iter((item.__self__, item.__func__))
    if isinstance(item, functools.partial):
        return iter((item.func, *item.args, *item.keywords.values()))
    if isinstance(item, Mapping):
        return itertools.islice(list(item.values()), ITEMS)
    if isinstance(item, (list, tuple, set, frozenset, deque)):
        return itertools.islice(list(item), ITEMS)
    return _of_engine(item) if isinstance(item, Engine) else _attributes(item)


def _of_engine(engine: Engine) -> Iterator[Any]:
    yield engine._process_function  # noqa: SLF001
    yield from _functions_at(engine)


def _attributes(item: Any) -> Iterator[Any]:
    """Yield an object's attributes, and the methods of its class if a user wrote it."""
    yield from list(getattr(item, "__dict__", {}).values())
    for base in type(item).__mro__:
        for name in _slots(base):
            yield getattr(item, name, None)
        if _is_written_by_user(base):
            yield from (one for one in vars(base).values() if isinstance(one, types.FunctionType))


def _is_written_by_user(item: Any) -> bool:
    return str(item.__module__).partition(".")[0] not in LIBRARIES


def _slots(kind: type) -> tuple[str, ...]:
    names = vars(kind).get("__slots__", ())
    names = (names,) if isinstance(names, str) else tuple(names)
    return tuple(name for name in names if name not in {"__weakref__", "__dict__"})


def _of_function(function: types.FunctionType) -> Iterator[Any]:
    """Yield what a function written by a user refers to."""
    if not _is_written_by_user(function):
        return
    yield from map(_content, function.__closure__ or ())
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    names = list(_names(function.__code__))
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, types.ModuleType):
            inside = vars(value)
            yield from (inside[inner] for inner in names if is_scheduler(inside.get(inner)))
        elif value is not None:
            yield value


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names that a function's code uses, those of functions inside it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def checked_optimizers(trainer: RunParts, known: Iterable[Optimizer]) -> list[Optimizer]:
    """Return the trainer's optimizer, and others that functions at events may step; log those.

    Those that are `known` need no log line.

    Raises:
        ValueError: in fp16, if there are others: their gradients would keep the loss scale.
    """
    others = other_optimizers(trainer)
    names = ", ".join(type(one).__name__ for one in others)
    if others and trainer.settings.precision == "fp16":
        raise ValueError(
            f"precision must not be 'fp16' with an optimizer beside the trainer's, got {names}, "
            "whose gradients would keep the loss scale. Hold both in a CompositeOptimizer"
        )
    if {id(one) for one in others} - set(map(id, known)):
        logger.warning(
            "A function at an event uses another optimizer, %s, with parameters that the trainer's "
            "%s lacks.\nClipping, guards and LearningRate apply to both; CompositeOptimizer holds "
            "both as one.",
            names,
            type(trainer.optimizer).__name__,
        )
    for one in others:
        declared_options(one)
    return [trainer.optimizer, *others]


def declared_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the options of an optimizer's groups as they were when it was first seen here."""
    if optimizer not in _DECLARED:
        groups = optimizer.param_groups
        _DECLARED[optimizer] = [
            {key: _number(value) for key, value in group.items() if key != "params"}
            for group in groups
        ]
    return _DECLARED[optimizer]


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, Tensor) else value


def scaled_rate(rate: Any, before: Any, now: Any) -> Any:
    """Return a current rate whose base the script has changed: the rate times now / before."""
    value = float(rate)
    scaled = now if not before or value == before else value * (now / before)
    return torch.full_like(rate, scaled) if isinstance(rate, Tensor) else scaled


class SavedOptimizer:
    """An optimizer beside the trainer's; options that the script has changed apply on resume."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        declared_options(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, and the options that it was built with."""
        return {**self._optimizer.state_dict(), "declared": declared_options(self._optimizer)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        now = declared_options(self._optimizer)
        groups = [dict(group) for group in state_dict["param_groups"]]
        for group, own, then in zip(groups, now, state_dict.get("declared", now), strict=False):
            changed = {key: value for key, value in own.items() if then.get(key, value) != value}
            if "lr" in changed:
                base, changed["lr"] = changed["lr"], scaled_rate(group["lr"], then["lr"], own["lr"])
                if "initial_lr" in group:  # a schedule multiplies this one
                    changed["initial_lr"] = base
            group.update(changed)
        self._optimizer.load_state_dict({**state_dict, "param_groups": groups})


# -- schedulers ----------------------------------------------------------------------------------


class SavedScheduler:
    """A scheduler whose state consists of plain values; all other attributes are its own.

    torch's and Ignite's schedulers put counters, functions and methods into their states, which a
    checkpoint cannot hold. They are settings: a new scheduler has them already.
    """

    def __init__(self, scheduler: Any) -> None:
        object.__setattr__(self, "_scheduler", scheduler)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_scheduler"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._scheduler, name, value)

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's state without functions."""
        state: dict[str, Any] = _plain(self._scheduler.state_dict())
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        self._scheduler.load_state_dict(_restored(state_dict, self._scheduler.state_dict()))


def _plain(value: Any) -> Any:
    """Return a state with built-in containers, and None for each function in a list."""
    if hasattr(value, WRAPPED):
        return _plain(getattr(value, WRAPPED).state_dict())
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if not callable(item)}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        items = [None if callable(item) else _plain(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def _restored(saved: Any, own: Any) -> Any:
    """Return a saved state with the types and the functions of the scheduler's own state."""
    if callable(own):
        return own
    if hasattr(own, WRAPPED):
        SavedScheduler(getattr(own, WRAPPED)).load_state_dict(saved)
        return own
    if isinstance(saved, Mapping):
        return _restored_mapping(saved, own if isinstance(own, Mapping) else {})
    if isinstance(own, np.ndarray):
        return np.asarray(saved, dtype=own.dtype)
    if isinstance(saved, (list, tuple)):
        others = own if isinstance(own, (list, tuple)) else ()
        pairs = itertools.zip_longest(saved, others[: len(saved)])
        items = [_restored(item, other) for item, other in pairs]
        kind = type(own) if isinstance(own, (tuple, set, frozenset, deque)) else type(saved)
        return kind(items)
    return saved


def _restored_mapping(saved: Mapping[Any, Any], own: Mapping[Any, Any]) -> dict[Any, Any]:
    found = {key: _restored(item, own.get(key)) for key, item in saved.items()}
    found |= {key: item for key, item in own.items() if callable(item)}
    return Counter(found) if isinstance(own, Counter) else found


def schedulers_behind(trainer: RunParts, optimizer: Optimizer | None = None) -> list[Any]:
    """Return the schedulers of an optimizer that functions at events refer to, in order.

    See `behind_events` for what a function refers to. Without an optimizer: those of the trainer's,
    and of others that its functions refer to.
    """
    optimizers = [optimizer] if optimizer else [trainer.optimizer, *other_optimizers(trainer)]
    held = set().union(*map(_optimizers, optimizers))
    return [one for one in behind_events(trainer) if _schedules(one, held)]


def report_unsaved(trainer: RunParts, saved: Iterable[Any]) -> None:
    """Log, once for each trainer, the torch schedulers of its optimizer that are not saved."""
    if trainer in _REPORTED or not trainer.state.iteration:
        return
    _REPORTED.add(trainer)
    of_optimizer = _living_schedulers(trainer.optimizer)
    if not of_optimizer:
        return
    roots = [getattr(one, "_scheduler", one) for one in (*saved, *trainer.handlers)]
    known = {id(one) for one in reachable(roots, everything=True)}
    unsaved = sorted({type(one).__name__ for one in of_optimizer if id(one) not in known})
    if unsaved:
        logger.warning(
            "Checkpoints lack the state of the scheduler %s, so a resumed run starts its schedule "
            "again.\nAdd scheduler.step to an event, or save its state in a handler.",
            ", ".join(unsaved),
        )


def _living_schedulers(optimizer: Optimizer) -> list[Any]:
    """Return the torch schedulers of an optimizer that exist, wherever they are held."""
    found: dict[int, Any] = {}
    for holder in gc.get_referrers(optimizer, *getattr(optimizer, "members", ())):
        owners = [holder]
        if isinstance(holder, dict) and "last_epoch" in holder:  # the attributes of an object
            owners = gc.get_referrers(holder)
        found |= {id(one): one for one in owners if issubclass(type(one), LRScheduler)}
    held = _optimizers(optimizer)
    return [one for one in found.values() if id(getattr(one, "optimizer", None)) in held]


def _optimizers(optimizer: Optimizer) -> set[int]:
    return {id(optimizer), *map(id, getattr(optimizer, "members", ()))}


def _schedules(candidate: Any, held: set[int]) -> bool:
    optimizer = getattr(candidate, "__dict__", {}).get("optimizer")
    if isinstance(candidate, BaseParamScheduler) and optimizer is None:
        return True
    steps = is_scheduler(candidate) or callable(getattr(type(candidate), "step", None))
    return steps and id(optimizer) in held and isinstance(candidate, Stateful)
