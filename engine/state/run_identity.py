"""The identity of a run: everything in the script that decides its result, as plain data."""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import attrs
import ignite
import torch
from ignite.engine.events import EventsList
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import BatchSampler

from diptych.engine.data.loader_contract import length_of
from diptych.engine.distributed.collectives import world_size
from diptych.engine.distributed.dtensor import is_sharded
from diptych.engine.handler import Handler, Stateful, contract_of
from diptych.engine.loop.listener import Listener
from diptych.engine.modules import named_parameters, unwrapped
from diptych.engine.state.description import (
    SCALARS,
    Describer,
    class_name,
    finite,
    is_of_user,
    plain_attributes,
    private_settings,
    settings_of,
    tensor_digest,
)
from diptych.engine.state.handler_states import attached, numbered
from diptych.engine.state.references import variables_of_functions
from diptych.engine.state.run_parts import RunParts

ORDER = ("class", "batch_size", "seed", "shuffle", "drop_last", "samples", "sampler", "count")
"""The settings of a loader that determine the order of its samples."""

BY_RANK = ("rank", "num_replicas", "num_samples", "total_size", "epoch")
"""Attributes of a distributed sampler that another number of ranks, or another epoch, changes."""

STATE = (
    *("iteration", "epoch", "epoch_length", "max_epochs", "max_iters", "seed", "times"),
    *("output", "batch", "metrics", "dataloader"),
)
"""The attributes of an engine's state that Ignite and the run loop set."""

PARTS = ("task", "transform", "step")
"""The arguments of a trainer that are functions or objects, and that handlers may replace."""

MODULE = frozenset(vars(nn.Module()))
"""The attributes that torch keeps in each module."""

_NOWHERE = object()

WEIGHTED = (nn.CrossEntropyLoss, nn.NLLLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.MultiMarginLoss)
"""Losses of torch whose buffers are arguments, and never change during a run."""


@attrs.frozen
class RunIdentity:
    """The script's side of a run: what decides its result, apart from the progress.

    Two runs with equal identities on equal machines, from equal data, have equal results. Handlers
    that only report are left out.

    Attributes:
        values: nested dictionaries of plain values: `trainer` (settings), `task`, `transform`,
            `step`, `modules` (class and plain attributes of each module), `held` (lists,
            dictionaries and private attributes of a user's modules), `tensors` (digests of those
            that the script alone sets), `initial` (initial values of the loss's scalar
            parameters and buffers), `requires_grad`, `training`, `optimizer`, `handlers`
            (settings by key) and their `order`, `functions` at events, `loader`, `versions`,
            `ranks`; `state`, the numbers and strings that were added to `trainer.state`, if any.
        not_compared: the values that have no description, with their types.
        closures: the plain closure variables of functions at events, which are not compared.
    """

    values: Mapping[str, Any]
    not_compared: Mapping[str, str] = attrs.field(factory=dict)
    closures: Mapping[str, Any] = attrs.field(factory=dict)

    @classmethod
    def of(cls, trainer: RunParts) -> RunIdentity:
        """Describe a trainer as it is now."""
        describer = _describer_of(trainer)
        settings = {**attrs.asdict(trainer.settings), "device": trainer.device.type}
        modules = {path: module_settings(part) for path, part in modules_of(trainer).items()}
        named = {f"{path}.{name}" for path, found in modules.items() for name in found}
        held = held_settings(held_of(trainer))
        values = {
            "trainer": describer.describe(settings, "trainer"),
            **_described_parts(trainer, describer),
            "modules": modules,
            "held": {k: v for k, v in held.items() if k not in named},
            "tensors": {name: tensor_digest(held) for name, held in tensors_of(trainer).items()},
            "initial": dict(_initial_values(trainer.loss)),
            "requires_grad": requires_grad_of(trainer),
            "training": training_of(trainer),
            "optimizer": optimizer_settings(trainer.optimizer),
            **_handlers(trainer, describer),
            "loader": loader_settings(trainer.state.dataloader, describer),
            "versions": {
                "torch": str(torch.__version__),
                "ignite": str(ignite.__version__),
                "python": platform.python_version(),
            },
            "ranks": world_size(),
        }
        added = {k: finite(v) for k, v in added_to_state(trainer).items() if type(v) in SCALARS}
        if added:
            values["state"] = added
        return cls(values, describer.not_compared, closures_of(trainer))

    def continued(self, earlier: RunIdentity, *, same_loader: bool) -> RunIdentity:
        """Return this identity with what was declared when the trainer first ran.

        During a run, handlers and functions change rates, modes, attributes and their own:
        of these, only parts that are new are taken from this identity.

        Args:
            earlier: the identity when the trainer first ran.
            same_loader: whether the loader is the one of then, whose batch size a stage may have
                set.
        """
        values = dict(self.values)
        kept = ("modules", "tensors", "initial", "requires_grad", "training", "optimizer", *PARTS)
        for name in (*kept, "loader") if same_loader else kept:
            values[name] = earlier.values[name]
        for name in ("handlers", "functions"):
            values[name] = {
                key: earlier.values[name].get(key, own) for key, own in values[name].items()
            }
        for name in ("state", "held"):  # handlers have added to them since
            values.pop(name, None)
            if name in earlier.values:
                values[name] = earlier.values[name]
        return RunIdentity(values, self.not_compared, {**self.closures, **earlier.closures})

    def with_keys(self, pairs: Mapping[str, str]) -> RunIdentity:
        """Return this identity with other keys of handlers.

        Args:
            pairs: the key here of each new key.
        """
        if not pairs:
            return self
        names = {earlier: key for key, earlier in pairs.items()}
        for key in (key for key in self.values["handlers"] if key not in names):
            numbers = itertools.count(2)
            name = key
            while name in names.values():
                name = f"{key.partition('#')[0]}#{next(numbers)}"
            names[key] = name
        handlers = {names[key]: own for key, own in self.values["handlers"].items()}
        order = [names.get(key, key) for key in self.values["order"]]
        return RunIdentity({**self.values, "handlers": handlers, "order": order})

    def as_json(self) -> str:
        """Return the content of `identity.json`."""
        content = {"identity": self.values, "not_compared": self.not_compared}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RunIdentity:
        """Read what `as_json` returned.

        Raises:
            ValueError: if the text is no identity.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or not isinstance(content.get("identity"), dict):
            raise ValueError(  # noqa: TRY004 - the text has a wrong content
                "the identity of a run must be a dictionary under the key 'identity'"
            )
        return cls(content["identity"], content.get("not_compared", {}))

    def declared(self, section: str, name: str) -> Any:
        """Return a value of `held` or `tensors`, or of the attribute of a module; else None."""
        path, _, attribute = name.rpartition(".")
        plain = self.values["modules"].get(path, {}).get(attribute)
        return self.values.get(section, {}).get(name, plain)

    def flat(self) -> dict[str, Any]:
        """Return the values by dotted name."""
        return dict(_flat(self.values))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, list(value) if isinstance(value, tuple) else value


# -- the parts -----------------------------------------------------------------------------------


def modules_of(trainer: RunParts) -> dict[str, nn.Module]:
    """Return the modules of model and loss by path, without wrappers: "model.0", "loss"."""
    found: dict[str, nn.Module] = {}
    for root, module in (("model", trainer.model), ("loss", trainer.loss)):
        for path, part in unwrapped(module).named_modules(remove_duplicate=False):
            names = [name for name in path.split(".") if name and name != "_orig_mod"]
            found[".".join([root, *names])] = part
    return found


def module_settings(module: nn.Module) -> dict[str, Any]:
    """Return class and public plain attributes of a module, without its parts."""
    plain = {name: _listed(value) for name, value in plain_attributes(module).items()}
    return {"class": class_name(type(module)), **plain}


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else finite(value)


def held_of(trainer: RunParts) -> dict[str, Any]:
    """Return the lists, dictionaries and private attributes of a user's modules that are plain.

    By name: "model.config". A setter, of which `module_settings` knows, sets a private one.
    """
    return {
        f"{path}.{name}": value
        for path, module in modules_of(trainer).items()
        if _is_users(module)
        for name, value in vars(module).items()
        if (name.startswith("_") or type(value) in {list, dict}) and _is_held(value)
        if name not in MODULE and name.removeprefix("_") not in {*plain_attributes(module)} - {name}
    }


def _is_users(module: nn.Module) -> bool:
    return class_name(type(module)).partition(".")[0] not in {"torch", "diptych"}


def _is_held(value: Any) -> bool:
    if type(value) is dict:
        return all(map(_is_held, (*value, *value.values())))
    return all(map(_is_held, value)) if type(value) in {list, tuple} else type(value) in SCALARS


def held_settings(held: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description of what `held_of` returns."""
    return {name: Describer().describe(value, name) for name, value in held.items()}


def replaced_parts(trainer: RunParts, declared: RunIdentity) -> dict[str, Any]:
    """Return the descriptions of the trainer's functions, objects and loader, if others."""
    describer, loader = _describer_of(trainer), trainer.state.dataloader
    now = _described_parts(trainer, describer)
    if loader is not trainer.described_loader:
        now["loader"] = loader_settings(loader, describer)
    return {name: part for name, part in now.items() if part != declared.values[name]}


def _describer_of(trainer: RunParts) -> Describer:
    own = {"model": trainer.model, "loss": trainer.loss, "optimizer": trainer.optimizer}
    return Describer({"trainer": trainer, **own})


def _described_parts(trainer: RunParts, describer: Describer) -> dict[str, Any]:
    return {name: _described_part(getattr(trainer, name), name, describer) for name in PARTS}


def _described_part(part: Any, name: str, describer: Describer) -> Any:
    shown, private = describer.describe(part, name), private_settings(part)
    if not private:
        return shown
    return {**(shown if isinstance(shown, dict) else {"class": class_name(type(part))}), **private}


def requires_grad_of(trainer: RunParts) -> dict[str, bool]:
    """Return whether each parameter of model and loss is trainable, by name."""
    named = named_parameters(trainer.model, trainer.loss)
    return {name: parameter.requires_grad for name, parameter in named.items()}


def training_of(trainer: RunParts) -> dict[str, bool]:
    """Return whether each module of model and loss is in training mode, by path.

    The trainer itself puts the two roots into training mode.
    """
    roots = ("model", "loss")
    return {p: part.training for p, part in modules_of(trainer).items() if p not in roots}


def added_to_state(trainer: RunParts) -> dict[str, Any]:
    """Return what handlers and functions have added to `trainer.state`, by name.

    Without what Ignite and this library keep there, and what `state_dict_user_keys` saves.
    """
    own = {*STATE, *trainer.state_dict_user_keys}
    return {
        name: value
        for name, value in vars(trainer.state).items()
        if name not in own and not name.startswith("_")
    }


def tensors_of(trainer: RunParts) -> dict[str, Tensor]:
    """Return the tensors in modules that the script alone sets, by name: "loss.weight".

    They are plain attributes, buffers that are not in a checkpoint, and the weights of torch's
    losses, which are arguments.
    """
    return {
        f"{path}.{name}": held
        for path, module in modules_of(trainer).items()
        for name, held in _script_tensors(module)
        if not is_sharded(held)
    }


def _script_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = () if isinstance(module, WEIGHTED) else _saved_buffers(module)
    for name, held in (*vars(module).items(), *module.named_buffers(recurse=False)):
        is_shown = not name.startswith("_") or _is_users(module)
        if isinstance(held, Tensor) and is_shown and name not in saved:
            yield name, held


def _saved_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own buffers that its state dict contains."""
    left_out = module._non_persistent_buffers_set  # noqa: SLF001 - torch shows it nowhere else
    own = module.named_buffers(recurse=False)
    return {name: buffer for name, buffer in own if name not in left_out}


def _initial_values(loss: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, parameter in unwrapped(loss).named_parameters():
        if parameter.numel() == 1 and not is_sharded(parameter):
            yield name, finite(parameter.detach().item())
    for path, module in unwrapped(loss).named_modules():
        if not isinstance(module, WEIGHTED):
            for name, buffer in _saved_buffers(module).items():
                yield f"{path}.{name}".lstrip("."), tensor_digest(buffer)


def optimizer_settings(optimizer: Optimizer) -> dict[str, Any]:
    """Return class and groups of an optimizer: the options of each, and its number of parameters.

    The groups are named by their "name", else by their numbers.
    """
    groups = {}
    for number, group in enumerate(optimizer.param_groups):
        options = {key: value for key, value in group.items() if key not in {"params", "name"}}
        groups[str(group.get("name", number))] = {
            **{key: option_value(value) for key, value in options.items()},
            "parameters": len(group["params"]),
        }
    return {"class": class_name(type(optimizer)), "groups": groups}


def option_value(value: Any) -> Any:
    """Return an option of a parameter group as a plain value."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, (list, tuple)):
        return [option_value(item) for item in value]
    return finite(value) if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _handlers(trainer: RunParts, describer: Describer) -> dict[str, Any]:
    """Return the settings of handlers that may change the run, their order, and the functions.

    A handler of another library declares nothing; it counts as one that may change the run.
    """
    listeners = _functions(trainer)
    settings = {
        key: _handler_settings(owner, f"handlers.{key}", describer)
        for key, owner in _changing(trainer).items()
    }
    functions = {
        name: describer.describe(listener.owner, f"functions.{name}")
        for name, listener in zip(numbered(map(_name_of, listeners)), listeners, strict=True)
        if _may_change(trainer, listener.owner)
    }
    return {"handlers": settings, "order": list(settings), "functions": functions}


def _functions(trainer: RunParts) -> list[Listener]:
    return [one for one in trainer.listeners if _is_function(one.owner)]


def _changing(trainer: RunParts) -> dict[str, Any]:
    """Return the objects that may change the run, by key, in order."""
    functions = {id(listener.owner) for listener in _functions(trainer)}
    changing = filter(partial(_may_change, trainer), attached(trainer))
    owners = [owner for owner in changing if id(owner) not in functions]
    keys = numbered(contract_of(owner).key for owner in owners)
    return dict(zip(keys, owners, strict=True))


def lost_memory(trainer: RunParts, declared: RunIdentity) -> dict[str, Any]:
    """Return what handlers and functions keep that is not as declared and in no checkpoint.

    By name: the numbers and strings of a user's handler without `state_dict`, and what functions at
    events have in their closures.
    """
    found: dict[str, Any] = {}
    for key, owner in _changing(trainer).items():
        before = declared.values["handlers"].get(key)
        if before is not None and is_of_user(type(owner)) and not isinstance(owner, Stateful):
            for name, value in getattr(owner, "__dict__", {}).items():
                if type(value) in SCALARS and before.get(name, _NOWHERE) != finite(value):
                    found[f"{key}.{name}"] = value
    now, before = closures_of(trainer), declared.closures
    return found | {name: value for name, value in now.items() if before.get(name, value) != value}


def closures_of(trainer: RunParts, *, assigned: bool = False) -> dict[str, Any]:
    """Return the plain values in the closures of functions at events, by name.

    Args:
        trainer: the trainer.
        assigned: whether to return only those that the functions assign.
    """
    variables = variables_of_functions(trainer, assigned=assigned)
    held = [(name, value) for name, value in variables if _is_held(value)]
    names = numbered(name for name, _ in held)
    return held_settings(dict(zip(names, (value for _, value in held), strict=True)))


def _is_function(owner: Any) -> bool:
    return callable(owner) and not hasattr(owner, "attach")


def _may_change(trainer: RunParts, owner: Any) -> bool:
    """Return whether an attached object may change the run, or makes weights of its own.

    A part of a handler does not count.
    """
    if isinstance(owner, Handler):
        return bool(owner.changes) or owner.makes_weights
    return owner in trainer.handlers or not class_name(type(owner)).startswith("diptych.")


def _handler_settings(owner: Any, path: str, describer: Describer) -> dict[str, Any]:
    settings = _settings_of(owner)
    if settings is None:
        describer.not_compared[path] = class_name(type(owner))
    shown = {k: describer.describe(v, f"{path}.{k}") for k, v in (settings or {}).items()}
    return {"class": class_name(type(owner)), **shown}


def _name_of(listener: Listener) -> str:
    """Return the event, the cadence and the name of a function."""
    parts = (*_event_names(listener.event), listener.cadence, listener.name)
    return " ".join(part for part in parts if part)


def _event_names(event: Any) -> list[str]:
    """Return the name of an event; the names of several that are joined."""
    events = event if isinstance(event, EventsList) else [event]
    return [str(getattr(one, "name", one)) for one in events]


def _settings_of(owner: Any) -> dict[str, Any] | None:
    if isinstance(owner, Optimizer):  # one beside the trainer's
        return {"groups": optimizer_settings(owner)["groups"]}
    shown, private = settings_of(owner)[0], private_settings(owner)
    return {**(shown or {}), **private} if private else shown


def loader_settings(loader: Any, describer: Describer, wrappers: int = 3) -> dict[str, Any]:
    """Return class, length and settings of a loader; those in `ORDER` determine its order.

    At most `wrappers` loaders inside of it are described too: one may answer to any name.
    """
    if loader is None:
        return {}
    found: dict[str, Any] = {"class": class_name(type(loader)), "length": length_of(loader)}
    for name in ("batch_size", "seed", "shuffle", "drop_last", "count"):
        value = getattr(loader, name, None)
        if isinstance(value, (bool, int)):
            found[name] = value
    data_set, inner = getattr(loader, "dataset", None), getattr(loader, "loader", None)
    if data_set is not None:
        found["samples"] = length_of(data_set)
        found["dataset"] = describer.describe(data_set, "loader.dataset")
    if inner is not None and wrappers:
        found["loader"] = loader_settings(inner, describer, wrappers - 1)
    sampler = _sampler_of(loader)
    if sampler is not None:
        found["sampler"] = {
            "class": class_name(type(sampler)),
            **{k: _listed(v) for k, v in plain_attributes(sampler).items() if k not in BY_RANK},
        }
    collate = getattr(loader, "collate_fn", None)
    if collate is not None:
        found["collate"] = describer.describe(collate, "loader.collate")
    return found


def _sampler_of(loader: Any) -> Any:
    """Return the object that orders the samples of a torch loader; None for other loaders."""
    batches = getattr(loader, "batch_sampler", None)
    own = batches is not None and type(batches) is not BatchSampler
    return batches if own else getattr(loader, "sampler", None)


def order_settings(loader: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a loader's settings that determine the order of its samples."""
    return {name: loader[name] for name in ORDER if name in loader}
