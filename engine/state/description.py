"""The description of a value as plain data, by which two runs are compared."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import logging
import math
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import PurePath
from typing import Any

import attrs
import numpy as np
import torch
from ignite.engine import Engine
from torch import Tensor, nn
from torch.optim import Optimizer

SCALARS = (bool, int, float, str, type(None))
NOT_COMPARED = "not compared"
_NOTHING = object()
DEPTH = 9
LONG = 64
"""Items of a container from which on it is described by a digest."""
SAMPLE = 2**20
"""Elements of a tensor that enter its digest; of a larger one, as many at equal distances."""


class Describer:
    """Describes values by types, names, settings and digests: never by an address.

    Args:
        known: names of objects that are described elsewhere.

    Attributes:
        not_compared: the paths of values that have no description, each with its type.
    """

    def __init__(self, known: Mapping[str, object] | None = None) -> None:
        self.not_compared: dict[str, str] = {}
        self._known = {id(part): name for name, part in (known or {}).items() if part is not None}

    def describe(self, value: Any, path: str, depth: int = DEPTH) -> Any:
        """Return a value as nested dictionaries and lists of numbers and strings.

        A tensor is described by type, shape and digest; a function by its name, a digest of its
        code, and its plain defaults and closure values; an attrs class or data class by its
        settings; a module by its attributes, parts and buffers; any other object by its public
        attributes. The path names the value in `not_compared`. A plain object takes three levels of
        `depth`.
        """
        simple = self._known.get(id(value)) or _simple(value)
        if simple is not _NOTHING:
            return simple
        if depth <= 0:
            return self._skip(value, path)
        if isinstance(value, (Mapping, list, tuple, Set)):
            return self._container(value, path, depth)
        return self._object(value, path, depth)

    def _container(self, value: Any, path: str, depth: int) -> Any:
        if len(value) > LONG:
            items = list(value.items()) if isinstance(value, Mapping) else list(value)
            if not all(map(_is_plain, items)):
                return self._skip(value, path)
            items = sorted(items, key=repr) if isinstance(value, Set) else items
            return f"{type(value).__name__} of {len(value)} {_digest(repr(items))}"
        if isinstance(value, Mapping):
            return self._each(value, path, depth - 1)
        if isinstance(value, Set):
            return sorted(str(self.describe(item, path, depth - 1)) for item in value)
        return [self.describe(v, f"{path}.{i}", depth - 1) for i, v in enumerate(value)]

    def _each(self, named: Mapping[Any, Any], path: str, depth: int) -> dict[str, Any]:
        return {str(k): self.describe(v, f"{path}.{k}", depth) for k, v in named.items()}

    def _object(self, value: Any, path: str, depth: int) -> Any:
        if isinstance(value, functools.partial):
            held = {"args": value.args, "keywords": value.keywords}
            inner = self.describe(value.func, path, depth - 1)
            return {"partial": inner, **self._each(held, path, depth - 1)}
        if isinstance(value, types.MethodType):
            owner = self.describe(value.__self__, path, depth - 1)
            return {"method": name_of(value.__func__), "of": owner}
        if isinstance(value, types.FunctionType):
            return self._function(value, path, depth)
        if isinstance(value, types.BuiltinFunctionType):
            return name_of(value)
        settings, cost = settings_of(value)
        if settings is None:
            return self._skip(value, path)
        return {"class": class_name(type(value)), **self._each(settings, path, depth - cost)}

    def _function(self, function: types.FunctionType, path: str, depth: int) -> dict[str, Any]:
        closure = inspect.getclosurevars(function).nonlocals
        held = {
            "defaults": list(function.__defaults__ or ()),
            "keywords": function.__kwdefaults__ or {},
            "closure": {k: v for k, v in closure.items() if _is_constant(v)},
        }
        found = self._each({key: v for key, v in held.items() if v}, path, depth - 1)
        return {"function": name_of(function), "code": code_digest(function.__code__), **found}

    def _skip(self, value: Any, path: str) -> str:
        self.not_compared[path] = class_name(type(value))
        return f"{class_name(type(value))} ({NOT_COMPARED})"


def finite(value: Any) -> Any:
    """Return a number as JSON can hold it: NaN and infinity as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _simple(value: Any) -> Any:
    """Return the description of a value without parts; `_NOTHING` if it has parts."""
    return next((way(value) for kinds, way in _WAYS if isinstance(value, kinds)), _NOTHING)


def _array_digest(array: np.ndarray[Any, Any]) -> str:
    if array.dtype.kind not in "biufc":
        return f"{array.dtype} {array.shape}"
    return tensor_digest(torch.from_numpy(np.ascontiguousarray(array)))


def _is_constant(value: Any) -> bool:
    """Return whether a closure value stays as it is during a run."""
    plain = isinstance(value, (*SCALARS, types.FunctionType, enum.Enum, torch.dtype))
    return plain or (isinstance(value, tuple) and all(map(_is_constant, value)))


def class_name(kind: type) -> str:
    """Return the qualified name of a class; of a sharded module's class, the one without shards."""
    names = [each.__name__ for each in kind.__mro__]
    if "FSDPModule" in names[1:]:  # torch makes a class FSDPLinear(FSDPModule, Linear)
        kind = kind.__mro__[names.index("FSDPModule") + 1]
    return name_of(kind)


def name_of(named: Any) -> str:
    """Return module and qualified name of a class or function."""
    module = getattr(named, "__module__", None)
    name = getattr(named, "__qualname__", type(named).__qualname__)
    return name if module in {None, "builtins", "__main__"} else f"{module}.{name}"


def settings_of(value: Any) -> tuple[dict[str, Any] | None, int]:
    """Return the settings of an object by name, and how many levels of depth they cost.

    They are the arguments of an attrs class or data class, the attributes, parts and tensors of a
    module, else the public attributes. None: the object shows nothing.
    """
    arguments = _arguments(value)
    if arguments is not None:
        return arguments, 1
    if isinstance(value, nn.Module):
        own = dict(value.named_children()) | dict(value.named_parameters(recurse=False))
        return plain_attributes(value) | own | dict(value.named_buffers(recurse=False)), 1
    found = getattr(value, "__dict__", None)
    if found is None:
        return None, 0
    public = {name: item for name, item in found.items() if not name.startswith("_")}
    return (public, 3) if public or not found else (None, 0)


def _arguments(value: Any) -> dict[str, Any] | None:
    """Return the arguments of an attrs class or data class by name; None for others."""
    if attrs.has(type(value)):
        fields = [field for field in attrs.fields(type(value)) if field.init]
        return {field.alias or field.name: getattr(value, field.name) for field in fields}
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return {name: getattr(value, name) for name in names}
    return None


def plain_attributes(value: Any) -> dict[str, Any]:
    """Return the public attributes of an object that are numbers, strings or tuples of them.

    A short dictionary of these counts too, and is copied; so does what a property sets: that of
    `alpha` is kept in `_alpha`.
    """
    found = getattr(value, "__dict__", {})
    named = {_public_name(type(value), name): item for name, item in found.items()}
    return {
        name: {str(key): one for key, one in item.items()} if type(item) is dict else item
        for name, item in named.items()
        if name not in {None, "training"} and _is_setting(item)
    }


def _public_name(kind: type, name: str) -> str | None:
    if not name.startswith("_"):
        return name
    behind = getattr(kind, name[1:], None)
    return name[1:] if isinstance(behind, property) and behind.fset is not None else None


def private_settings(value: Any) -> dict[str, Any]:
    """Return the private attributes of an object of a user's class that are numbers or strings."""
    if not is_of_user(type(value)) or _arguments(value) is not None:
        return {}
    internal = vars(nn.Module()) if isinstance(value, nn.Module) else {}
    return {
        name: finite(item)
        for name, item in getattr(value, "__dict__", {}).items()
        if name.startswith("_") and name not in internal and type(item) in SCALARS
    }


def is_of_user(kind: type) -> bool:
    """Return whether a class is the user's own, and of no library."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    is_installed = any(name in file for name in ("site-packages", "dist-packages"))
    library = kind.__module__.partition(".")[0] in {"diptych", *sys.stdlib_module_names}
    return not (is_installed or library)


def _is_plain(value: Any) -> bool:
    if type(value) in {tuple, list}:
        return all(map(_is_plain, value))
    return type(value) in SCALARS


def _is_setting(value: Any) -> bool:
    if type(value) is dict:
        return len(value) <= LONG and all(map(_is_setting, value.values()))
    return type(value) is not list and _is_plain(value)


def tensor_digest(tensor: Tensor) -> str:
    """Return type, shape and digest of a tensor, the same on every device."""
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return kind
    flat = tensor.detach().flatten()
    if flat.numel() > SAMPLE:
        flat = flat[:: flat.numel() // SAMPLE]
    raw = flat.cpu().contiguous().view(torch.uint8) if flat.numel() else torch.empty(0)
    digest = _digest(raw.numpy().tobytes())
    return f"{kind} {digest}"


def _digest(content: str | bytes) -> str:
    raw = content.encode() if isinstance(content, str) else content
    return hashlib.blake2b(raw, digest_size=8).hexdigest()


def code_digest(code: types.CodeType) -> str:
    """Return a digest of a function's code that does not depend on its file or line."""
    return _digest("\0".join(_parts_of(code)))


def _parts_of(code: types.CodeType) -> Iterable[str]:
    yield code.co_code.hex()
    yield from (*code.co_names, *code.co_varnames, *code.co_freevars)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _parts_of(constant)
        elif isinstance(constant, frozenset):  # its order depends on the process
            yield repr(sorted(map(repr, constant)))
        else:
            yield repr(constant)


_WAYS: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (enum.Enum, lambda member: f"{type(member).__name__}.{member.name}"),
    (SCALARS, finite),
    (nn.Parameter, lambda learned: f"parameter {learned.dtype} {tuple(learned.shape)}"),
    (Tensor, tensor_digest),
    (np.generic, lambda number: finite(number.item())),
    (np.ndarray, _array_digest),
    ((torch.dtype, torch.device, complex, bytes, range, slice), str),
    (torch.Generator, lambda generator: f"generator with seed {generator.initial_seed()}"),
    (PurePath, lambda _: "path"),  # where files are decides no result
    (type, class_name),
    ((Optimizer, Engine, logging.Logger), lambda part: class_name(type(part))),
)
"""The types of values without parts, and how each is described."""
