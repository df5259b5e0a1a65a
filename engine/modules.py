"""Modules behind their wrappers, the names of their parameters, and their training modes."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

logger = logging.getLogger(__name__)

TRAINING = attrgetter("training")


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


class KnownParameters:
    """The parameters of modules, found again if a module or a parameter has come, gone or moved.

    What the modules' dictionaries hold is compared with what they held: a tenth of a walk.
    """

    def __init__(self) -> None:
        self._held: list[Any] = []  # living views of the dictionaries of all parts
        self._content: list[Any] = []  # what they held, and what was not theirs
        self._parameters: list[nn.Parameter] = []

    def of(self, *roots: nn.Module, others: Sequence[nn.Parameter] = ()) -> list[nn.Parameter]:
        """Return the parameters of modules, in the order of `Module.parameters`, and others.

        Each is returned once.
        """
        now = [*roots, *others, *chain.from_iterable(self._held)]
        if len(now) != len(self._content) or not all(map(operator.is_, now, self._content)):
            self._find(roots, others)
        return self._parameters

    def _find(self, roots: Sequence[nn.Module], others: Sequence[nn.Parameter]) -> None:
        parts = parts_of(*roots)
        own = [one for part in parts for one in part._parameters.values() if one is not None]  # noqa: SLF001
        self._parameters = [*{id(one): one for one in (*own, *others)}.values()]
        held: list[Any] = [p._parameters for p in parts] + [p._modules for p in parts]  # noqa: SLF001
        living = all(isinstance(one, dict) for one in held)  # a scripted module's are copies
        self._held = [one.values() for one in held]
        self._content = [*roots, *others, *chain.from_iterable(self._held)] if living else []


class SavedBuffers:
    """Copies of all buffers of modules, to restore them once: for two passes over one batch.

    Torch does not show which ones a forward pass changes: batch norm's changes raise no version.

    Args:
        modules: the modules, those of their parts included.
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

    Args:
        roots: returns the modules with their names.
    """

    def __init__(self, roots: Callable[[], Mapping[str, nn.Module]]) -> None:
        self._roots = roots
        # The parts that were in eval mode while their root was in train mode.
        self._resting: dict[nn.Module, list[nn.Module]] = {}
        self._told: set[str] = set()

    @property
    def are_for_training(self) -> bool:
        """Whether all roots are in train mode."""
        return all(map(TRAINING, self._roots().values()))

    def remember(self) -> None:
        """Remember which parts are in eval mode while their root is in train mode."""
        for root in self._roots().values():
            if root.training:
                self._resting[root] = [part for part in root.modules() if not part.training]

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
                    "The %s was in eval mode and is put into train mode. Parts that are to stay in "
                    "eval mode must be put there with the whole %s in train mode.",
                    name,
                    name,
                )

    def report_resting(self) -> None:
        """Log, once, the parts in eval mode whose parameters are trained."""
        names = [found for name, root in self._roots().items() for found in _resting(name, root)]
        if names and "parts" not in self._told:
            self._told.add("parts")
            logger.warning(
                "In eval mode, and yet with trainable parameters: %s. Dropout is off there, and "
                "batch norm uses its running statistics. Models from from_pretrained() are so; "
                "call train() on them, or freeze them with requires_grad_(False).",
                ", ".join(names[:8]) + (", ..." if len(names) > 8 else ""),
            )


def _resting(name: str, module: nn.Module) -> Iterator[str]:
    """Yield the names of the uppermost parts in eval mode that have trainable parameters."""
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}"
        if child.training:
            yield from _resting(path, child)
        elif any(parameter.requires_grad for parameter in child.parameters()):
            yield path
