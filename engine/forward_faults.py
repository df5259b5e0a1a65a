"""The likely causes of a failed forward pass: a batch that is not what the model takes.

Only an exception leads here, so that a forward pass that works is not checked at all.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from diptych.engine.errors import BatchError, LostRankError

EXPLAINED = (TypeError, AttributeError, RuntimeError, ValueError, IndexError)
LEFT = (BatchError, LostRankError, torch.OutOfMemoryError)
"""Exceptions that name their cause, and those that others handle."""


class ForwardError(BatchError, RuntimeError, TypeError, IndexError):
    """A failed forward pass with its likely cause.

    Code that expects what torch raises for such a batch catches this too.
    """


class SingleSampleError(ForwardError):
    """A batch of one sample, which batch normalisation cannot normalise in training."""


WORDS = {str: "strings", Tensor: "tensors", dict: "dicts", list: "lists", int: "numbers"}


@attrs.frozen
class FailedCall:
    """The innermost call of a module that an exception has left.

    Attributes:
        error: the exception.
        model: the model.
        module: the module that was called.
        positional: its positional arguments.
        named: its named arguments.
        batch: the batch of the forward pass.
    """

    error: Exception
    model: nn.Module
    module: nn.Module
    positional: tuple[Any, ...]
    named: Mapping[str, Any]
    batch: Any

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Its arguments, the positional ones first."""
        return (*self.positional, *self.named.values())

    @property
    def part(self) -> str:
        """The path of the module, and its class."""
        paths = [path for path, module in self.model.named_modules() if module is self.module]
        kind = type(self.module).__name__
        return f"{paths[0]} ({kind})" if paths and paths[0] else f"the model ({kind})"

    @property
    def input(self) -> Any:
        """The first input; None if there is none."""
        return self.inputs[0] if self.inputs else None

    @property
    def weight(self) -> Tensor | None:
        """The first parameter of the module itself, unless its input is of another type."""
        if isinstance(self.module, (nn.Embedding, nn.EmbeddingBag)):
            return None
        return next(self.module.parameters(recurse=False), None)

    def is_about(self, pattern: str) -> bool:
        """Return whether a layer of torch has failed, or else the error's text has a pattern.

        A module of the user does more with its input than a layer does, and fails for many reasons.
        """
        is_torchs = type(self.module).__module__.startswith("torch.")
        return is_torchs or re.search(pattern, str(self.error)) is not None

    def name_of(self, value: Any) -> str:
        """Return the name of an input: that of a part of the batch, if it is one."""
        parts: Any = enumerate(self.batch) if isinstance(self.batch, (tuple, list)) else ()
        if isinstance(self.batch, Mapping):
            parts = self.batch.items()
        named = [f"batch[{key!r}]" for key, part in parts if part is value]
        return named[0] if named else f"the input of {self.part}"


def raise_likely_cause(error: Exception, model: nn.Module, batch: Any) -> None:
    """Raise a `ForwardError` that names the likely cause of a failed forward pass, if one is found.

    Else a note is added to the exception (from Python 3.11 on), and the caller raises it again.
    """
    if not isinstance(error, EXPLAINED) or isinstance(error, LEFT):
        return
    call = _failed_call(error, model, batch)
    if call is None:
        return
    is_usual = type(error).__module__ in {"builtins", "torch"}  # others' classes are meant
    likely = _likely_cause(call) if is_usual else None
    if likely is not None:
        raise likely from error
    if hasattr(error, "add_note"):
        got = ", ".join(map(described, call.inputs)) or "nothing"
        error.add_note(f"{call.part} was called with {got}. The batch: {described(batch)}.")


def _likely_cause(call: FailedCall) -> ForwardError | None:
    for cause in CAUSES:
        try:
            message = cause(call)
        except Exception:  # noqa: BLE001, S112 - the search must not hide the error
            continue
        if message is not None:
            return (SingleSampleError if cause is _single_sample else ForwardError)(message)
    return None


def described(value: Any) -> str:
    """Return a short description of a value, or of the parts of a batch, without its numbers."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {described(one)}' for key, one in value.items())}}}"
    if isinstance(value, (list, tuple)):
        kinds = sorted({WORDS.get(type(one), type(one).__name__) for one in value})
        return f"a {type(value).__name__} of {len(value)} {' and '.join(kinds) or 'elements'}"
    return f"a {type(value).__name__}"


def _failed_call(error: Exception, model: nn.Module, batch: Any) -> FailedCall | None:
    found = None
    for frame in _frames(error.__traceback__):
        called = frame.get("self")
        if isinstance(called, nn.Module) and "args" in frame and "kwargs" in frame:
            found = FailedCall(error, model, called, frame["args"], frame["kwargs"], batch)
    return found


def _frames(traceback: TracebackType | None) -> Iterator[dict[str, Any]]:
    """Yield the local variables of each call of a module."""
    while traceback is not None:
        if traceback.tb_frame.f_code.co_name == "_call_impl":
            yield traceback.tb_frame.f_locals
        traceback = traceback.tb_next


def _other_inputs(call: FailedCall) -> str | None:
    """A model that takes other inputs than the task passes."""
    if call.module is not call.model or not isinstance(call.error, TypeError):
        return None
    signature = inspect.signature(call.model.forward)
    try:
        signature.bind(*call.positional, **call.named)
    except TypeError:
        return (
            f"model must take the {len(call.inputs)} inputs that the task passes, got "
            f"{type(call.model).__name__}.forward{signature}. Choose the task that fits the "
            "model, or write one"
        )
    return None


def _no_tensor(call: FailedCall) -> str | None:
    value = call.input
    if value is None or isinstance(value, Tensor) or isinstance(call.error, RuntimeError):
        return None
    if not call.is_about(_mention_of(type(value).__name__)):
        return None
    got = described(value)
    return f"{call.name_of(value)} must be a tensor for {call.part}, got {got}. {_way(call, value)}"


def _way(call: FailedCall, value: Any) -> str:
    """Return the way out for an input that is no tensor."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    if isinstance(first, str):
        return "Tokenize captions in the data set, or in the loader's collate function"
    if isinstance(call.batch, list) and isinstance(value, Mapping):
        return "A list of samples must be collated: torch.utils.data.default_collate"
    if type(first).__module__.startswith("PIL."):
        return "Convert images to tensors in the data set"
    return "Convert it in the loader's collate function, or unpack it in a task of your own"


def _mention_of(kind: str) -> str:
    """Return the pattern of an error about a type: no attribute, not a tensor, no such overload."""
    return rf"'{re.escape(kind)}'|not {re.escape(kind)}\b|got \(.*\b{re.escape(kind)}\b"


def _ids(call: FailedCall) -> str | None:
    value, table = call.input, call.module
    if not isinstance(table, (nn.Embedding, nn.EmbeddingBag)) or not isinstance(value, Tensor):
        return None
    name, rows = call.name_of(value), table.num_embeddings
    if value.ndim == 1 and isinstance(table, nn.EmbeddingBag) and len(call.inputs) == 1:
        return (
            f"{name} must be token ids [batch, tokens] for {call.part}, got {described(value)}, "
            "one number a sample, as labels are. For labels use tasks.classification"
        )
    if value.is_floating_point():
        return f"{name} must be integers for {call.part}, got {described(value)}. Pass token ids"
    if value.device.type != "cpu" or not value.numel() or 0 <= value.min() <= value.max() < rows:
        return None
    return (
        f"{name} must lie in [0, {rows}) for {call.part}, got ids from {int(value.min())} to "
        f"{int(value.max())}. Model and tokenizer must have the same vocabulary"
    )


def _other_device(call: FailedCall) -> str | None:
    """A tensor that a module holds as a plain attribute stays where it was made."""
    if "device" not in str(call.error) or "CUDA error" in str(call.error):
        return None
    device = next((p.device for p in call.model.parameters()), torch.device("cpu"))
    for path, module in call.model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.device != device:
                where = f"{path}.{name}" if path else name
                return (
                    f"model must be on one device, got {where} on {value.device} and parameters on "
                    f"{device}. Let it move with the model: self.register_buffer({name!r}, ...)"
                )
    return None


def _other_type(call: FailedCall) -> str | None:
    value, weight = call.input, call.weight
    if not isinstance(value, Tensor) or weight is None or not weight.is_floating_point():
        return None
    if value.dtype == weight.dtype:
        return None
    is_about_types = call.is_about(r"dtype|scalar type|[Ii]nput type|not implemented for")
    if torch.is_autocast_enabled(value.device.type) or not is_about_types:
        return None
    way_out = ". Convert it with .float(), in the data set or in the trainer's transform"
    if value.dtype == torch.uint8:
        way_out = ", as images of 0 to 255 are. Pass image.float() / 255"
    elif value.is_floating_point() and weight.dtype.itemsize == 2:
        way_out = ". Keep the model in float32; precision='bf16' computes in half precision"
    got = described(value)
    return f"{call.name_of(value)} must be {weight.dtype} for {call.part}, got {got}{way_out}"


def _channels(call: FailedCall) -> str | None:
    value, layer = call.input, call.module
    if not isinstance(layer, _ConvNd) or isinstance(layer, _ConvTransposeNd):
        return None
    dims = len(layer.kernel_size) + 2
    if not isinstance(value, Tensor) or value.ndim == dims - 1:  # one image without a batch
        return None
    if value.ndim == dims and value.shape[1] == layer.in_channels:
        return None
    start = (
        f"{call.name_of(value)} must be [batch, {layer.in_channels} channels, ...] for "
        f"{call.part}, got {described(value)}. "
    )
    if value.ndim != dims:
        return f"{start}Is another part of the batch meant? with_keys(image=...) names it"
    if value.shape[-1] == layer.in_channels:
        return f"{start}Put the channels first: images.movedim(-1, 1)"
    return f"{start}Convert the images, or the model's first layer"


def _width(call: FailedCall) -> str | None:
    value, layer = call.input, call.module
    if not isinstance(layer, nn.Linear) or not isinstance(value, Tensor):
        return None
    if value.ndim and value.shape[-1] == layer.in_features:
        return None
    return (
        f"{call.name_of(value)} must have {layer.in_features} numbers in its last dimension for "
        f"{call.part}, got {described(value)}. Flatten it, or build the model for this size"
    )


def _single_sample(call: FailedCall) -> str | None:
    value, layer = call.input, call.module
    if not isinstance(layer, _BatchNorm) or not layer.training or not isinstance(value, Tensor):
        return None
    if value.numel() != value.shape[1]:
        return None
    return (
        f"a batch must have 2 samples or more for {call.part}, got {described(value)}. Raise "
        "batch_size or microbatch_size, or set drop_last=True"
    )


CAUSES: tuple[Callable[[FailedCall], str | None], ...] = (
    _other_inputs,
    _no_tensor,
    _other_device,
    _ids,
    _channels,
    _other_type,
    _width,
    _single_sample,
)
"""The causes, each of which returns its message if it is the one."""
