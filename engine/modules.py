"""Modules behind their wrappers, the names of their parameters, and their training modes."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from diptych.engine.name_patterns import listed

logger = logging.getLogger(__name__)

T = TypeVar("T")


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside of data-parallel and compiled wrappers."""
    while True:
        if isinstance(module, (DistributedDataParallel, DataParallel)):
            module = module.module
        elif "_orig_mod" in dict(module.named_children()):
            module = module.get_submodule("_orig_mod")
        else:
            return module


def named_parameters(model: nn.Module, loss: nn.Module | None) -> dict[str, nn.Parameter]:
    """Return the model's parameters by name, then the loss's with the prefix "loss.", each once."""
    pairs = list(unwrapped(model).named_parameters())
    if loss is not None:
        pairs += [(f"loss.{name}", p) for name, p in unwrapped(loss).named_parameters()]
    named: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, parameter in pairs:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            named[name.replace("_orig_mod.", "")] = parameter
    return named


def parts_of(*roots: nn.Module) -> list[nn.Module]:
    """Return modules and all of their parts, each once, in the order of `Module.modules`.

    `Module.modules` makes several calls in Python for each part, which a short update would notice.
    """
    found: list[nn.Module] = []
    seen: set[int] = set()
    waiting = [*reversed(roots)]
    while waiting:
        part = waiting.pop()
        if id(part) not in seen:
            seen.add(id(part))
            found.append(part)
            if children := part._modules:  # noqa: SLF001 - as above
                waiting += [one for one in reversed([*children.values()]) if one is not None]
    return found


class KnownParts(Generic[T]):
    """What was found in modules, found again if what they hold has come, gone or moved.

    What the modules' dictionaries hold is compared with what they held: a tenth of a walk.

    Args:
        find: returns what is looked for in some modules and all of their parts.
        kind: the dictionary of a part, beside that of its modules, that is compared.
    """

    def __init__(self, find: Callable[[list[nn.Module]], list[T]], kind: str = "_modules") -> None:
        self._find, self._kind = find, kind
        self._held: list[Any] = []  # living views of the dictionaries of all parts
        self._content: list[Any] = []  # what they held, and what was not theirs
        self._found: list[T] = []

    def of(self, *roots: nn.Module, others: Sequence[T] = ()) -> list[T]:
        """Return what is found in modules, in the order of `Module.modules`, and others.

        Each is returned once.
        """
        now = [*roots, *others, *chain.from_iterable(self._held)]
        if len(now) != len(self._content) or not all(map(operator.is_, now, self._content)):
            self._search(roots, others)
        return self._found

    def _search(self, roots: Sequence[nn.Module], others: Sequence[T]) -> None:
        parts = parts_of(*roots)
        self._found = [*{id(one): one for one in (*self._find(parts), *others)}.values()]
        held = [vars(part).get(kind) for part in parts for kind in {self._kind, "_modules"}]
        living = all(isinstance(one, dict) for one in held)  # a scripted module's are copies
        self._held = [one.values() for one in held if one is not None]
        self._content = [*roots, *others, *chain.from_iterable(self._held)] if living else []


def known_parameters() -> KnownParts[nn.Parameter]:
    """Return a cache of the parameters of modules."""
    return KnownParts(partial(_held, "_parameters"), "_parameters")


def known_buffers() -> KnownParts[Tensor]:
    """Return a cache of the buffers of modules."""
    return KnownParts(partial(_held, "_buffers"), "_buffers")


def _held(kind: str, parts: list[nn.Module]) -> list[Any]:
    return [one for part in parts for one in getattr(part, kind).values() if one is not None]


class SavedBuffers:
    """Copies of all buffers of modules, to restore them once: for two passes over one batch.

    Torch does not show which ones a forward pass changes: batch norm's changes raise no version.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._held = [(p._buffers, dict(p._buffers)) for p in parts_of(*modules)]  # noqa: SLF001 - torch's own
        buffers = {id(b): b for _, held in self._held for b in held.values() if b is not None}
        self._copies = [(buffer, buffer.detach().clone()) for buffer in buffers.values()]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the buffers, also those that a module has replaced."""
        for held, before in self._held:
            held.update(before)
        for buffer, copy in self._copies:
            buffer.copy_(copy)


class TrainingModes:
    """The modes of a trainer's modules: what the user has put into eval mode stays there.

    Code that evaluates, and is not this library's, often leaves the whole model in eval mode. It is
    put into train mode again, without the parts that were in eval mode before.
    """

    def __init__(self, roots: Callable[[], Mapping[str, nn.Module]]) -> None:
        self._roots = roots
        # The parts that were in eval mode while their root was in train mode.
        self._resting: dict[nn.Module, list[nn.Module]] = {}
        self._told: set[str] = set()

    @property
    def resting(self) -> list[nn.Module]:
        """The parts that are in eval mode in the next step, whoever evaluates meanwhile."""
        return [
            part
            for root in self._roots().values()
            for part in (_in_eval_mode(root) if root.training else self._resting.get(root, ()))
        ]

    def remember(self) -> None:
        """Remember which parts are in eval mode while their root is in train mode."""
        for root in self._roots().values():
            if root.training:
                self._resting[root] = _in_eval_mode(root)

    def train(self) -> None:
        """Put roots in eval mode into train mode, without the parts that rested before."""
        for name, root in self._roots().items():
            if root.training:
                continue
            root.train()
            for part in self._resting.get(root, ()):
                part.training = False
            if name not in self._told:
                self._told.add(name)
                logger.warning(
                    "The %s was in eval mode and is put into train mode. To keep parts in eval "
                    "mode, call eval() on those parts alone.",
                    name,
                )

    def report_resting(self) -> None:
        """Log, once, the parts in eval mode whose parameters are trained."""
        names = [found for name, root in self._roots().items() for found in _resting(name, root)]
        if names and "parts" not in self._told:
            self._told.add("parts")
            logger.warning(
                "In eval mode (dropout is off), but with trainable parameters: %s.\n"
                "Call train() on them, as after from_pretrained(), or requires_grad_(False).",
                listed(names),
            )


def _in_eval_mode(root: nn.Module) -> list[nn.Module]:
    return [part for part in root.modules() if not part.training]


def _resting(name: str, module: nn.Module) -> Iterator[str]:
    """Yield the names of the uppermost parts in eval mode that have trainable parameters."""
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}"
        if child.training:
            yield from _resting(path, child)
        elif any(parameter.requires_grad for parameter in child.parameters()):
            yield path
