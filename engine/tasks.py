"""Tasks: functions that call the model on a batch and name the inputs of the loss, in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeVar

import attrs
import torch
from torch import Tensor, nn

from diptych.engine.errors import BatchError
from diptych.engine.forward_faults import described

Outputs = dict[str, Tensor]
"""Named tensors [B, ...], in the order in which the loss takes them; a 0-dim tensor is shared by
all samples."""

NO_LABEL = -100
"""The label, or the group id, of a sample without one: torch's `ignore_index`."""

Key = str | int
T = TypeVar("T", bound="KeyedTask")


class Task(Protocol):
    """A function from model and batch to the inputs of the loss; your own is a few lines.

    ```python
    def image_text(model, batch):
        image, text = model(batch["image"], batch["text"])
        return {"image_features": image, "text_features": text}
    ```

    Ignite's classification metrics take `y_pred` and `y`, which are the outputs `logits` and
    `labels`. A task with other outputs may declare a method `prediction(outputs)` that returns
    both; `prediction = None` says that it has none.
    """

    def __call__(self, model: nn.Module, batch: Any, /) -> Outputs:
        """Return the named tensors of the batch."""


def look_up(batch: Any, key: Key, position: int | None = None) -> Any:
    """Return one part of a batch, or None if it has no such part.

    Args:
        batch: a mapping (by key), an object with attributes (by name), or a tuple or list (by
            index).
        key: the key, name or index.
        position: the index of the part in a tuple or list if `key` is a name; None: it has none.
    """
    if isinstance(batch, Mapping):
        return batch.get(key)
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        index = key if isinstance(key, int) else position
        return None if index is None or index >= len(batch) else batch[index]
    return getattr(batch, str(key), None)


def names_of(batch: Any) -> str:
    """Return the names of the parts of a batch, for an error message."""
    if isinstance(batch, Mapping):
        return ", ".join(repr(key) for key in batch) or "nothing"
    if hasattr(batch, "_fields"):
        return ", ".join(repr(name) for name in batch._fields)
    if isinstance(batch, (tuple, list)):
        return f"{len(batch)} parts without names"
    names = [*getattr(batch, "__dict__", ()), *getattr(type(batch), "__slots__", ())]
    public = [repr(name) for name in names if not name.startswith("_")]
    return ", ".join(public) or f"a {type(batch).__name__}"


def _without(batch: Any, key: Key, name: str) -> str:
    """Return what a batch has instead of a part, and the way out."""
    if isinstance(batch, Mapping) and key in batch:
        return f"None for it. Leave out samples without {key!r}, in the data set or the loader"
    samples = (Mapping, tuple, list)
    if isinstance(batch, (tuple, list)) and batch and all(isinstance(b, samples) for b in batch):
        return f"a list of {len(batch)} samples. Collate them: torch.utils.data.default_collate"
    return f"{names_of(batch)}. For other keys use with_keys({name}=...)"


@attrs.frozen(kw_only=True)
class KeyedTask:
    """A task that reads the parts of a batch by keys; `with_keys` renames them."""

    def with_keys(self: T, **keys: Key) -> T:
        """Return this task for batches with other keys.

        Args:
            keys: for each part with another name, the batch's key (or its index, for tuples).

        Raises:
            TypeError: if this task has no such part.
        """
        parts = [field.name for field in attrs.fields(type(self))]
        unknown = sorted(set(keys) - set(parts))
        if unknown:
            raise TypeError(
                f"with_keys must name parts of {type(self).__name__}, which are "
                f"{', '.join(parts)}, got {', '.join(unknown)}"
            )
        return attrs.evolve(self, **keys)

    def part(self, batch: Any, name: str) -> Any:
        """Return the part of the batch that this task calls `name`.

        Raises:
            BatchError: if the batch lacks it; the message lists the keys of the batch.
        """
        key, names = getattr(self, name), [field.name for field in attrs.fields(type(self))]
        value = look_up(batch, key, names.index(name))
        if value is None:
            raise BatchError(f"batch must have {key!r}, got {_without(batch, key, name)}")
        return value

    def optional_part(self, batch: Any, name: str) -> Any:
        """Return the part of the batch that this task calls `name`, or None.

        In a tuple or list without names, an optional part exists only if `with_keys` gives its
        index: the third element of many loaders' tuples is a label, not a group id.
        """
        return look_up(batch, getattr(self, name))


@attrs.frozen(kw_only=True)
class ImageText(KeyedTask):
    """Calls `model(image, text)` and returns `image_features` and `text_features` [B, D].

    The outputs include `groups` [B] if the batch has them. The model returns a tuple that starts
    with the two features, or a mapping or object with `image_features` and `text_features`
    (open_clip's names) or `image_embeds` and `text_embeds` (Hugging Face's).
    """

    image: Key = "image"
    text: Key = "text"
    group: Key = "group"

    prediction: ClassVar[None] = None
    NAMES: ClassVar[tuple[tuple[str, str], ...]] = (
        ("image_features", "text_features"),
        ("image_embeds", "text_embeds"),
    )

    def __call__(self, model: nn.Module, batch: Any, /) -> Outputs:
        """Return the features of both sides."""
        image, text = self._features(model(self.part(batch, "image"), self.part(batch, "text")))
        outputs = {"image_features": image, "text_features": text}
        return _with_groups(outputs, self.optional_part(batch, "group"))

    def _features(self, output: Any) -> tuple[Tensor, Tensor]:
        for names in self.NAMES:
            found = [look_up(output, name, index) for index, name in enumerate(names)]
            if all(isinstance(value, Tensor) for value in found):
                return found[0], found[1]
        raise BatchError(
            "model must return (image_features, text_features), or a mapping with these or with "
            f"image_embeds and text_embeds, got {described(output)}. For another model write a "
            "task of your own"
        )


@attrs.frozen(kw_only=True)
class HuggingFace(ImageText):
    """`ImageText` for models that are called by keywords, such as those of `transformers`.

    Calls `model(pixel_values=..., input_ids=..., attention_mask=...)`, with the mask if the batch
    has one. The model's own loss and logits are not used.
    """

    # All fields again: attrs moves an overridden field behind the others.
    image: Key = "pixel_values"
    text: Key = "input_ids"
    mask: Key = "attention_mask"
    group: Key = "group"

    def __call__(self, model: nn.Module, batch: Any, /) -> Outputs:
        """Return the features of both sides."""
        inputs = {"pixel_values": self.part(batch, "image"), "input_ids": self.part(batch, "text")}
        mask = self.optional_part(batch, "mask")
        image, text = self._features(
            model(**inputs) if mask is None else model(**inputs, attention_mask=mask)
        )
        outputs = {"image_features": image, "text_features": text}
        return _with_groups(outputs, self.optional_part(batch, "group"))


@attrs.frozen(kw_only=True)
class TwoViews(KeyedTask):
    """Calls `model(view)` for two views; returns `first_features` and `second_features` [B, D].

    Views of the same shape go through the model together, as one batch of 2 B.
    """

    first: Key = "first"
    second: Key = "second"
    group: Key = "group"

    prediction: ClassVar[None] = None

    def __call__(self, model: nn.Module, batch: Any, /) -> Outputs:
        """Return the features of both views."""
        first, second = (_view(self.part(batch, name), name) for name in ("first", "second"))
        if first.shape == second.shape:
            a, b = _output(model, torch.cat([first, second]), "two_views").chunk(2)
        else:
            a, b = _output(model, first, "two_views"), _output(model, second, "two_views")
        outputs = {"first_features": a, "second_features": b}
        return _with_groups(outputs, self.optional_part(batch, "group"))


@attrs.frozen(kw_only=True)
class MultiCrop(KeyedTask):
    """Calls `model(crops)` for large and for small crops; returns `features` [B, V, D].

    `large` is [B, G, ...] and `small`, which a batch may lack, [B, V - G, ...]; all crops of a size
    go through the model together, as one batch. The outputs include `groups` [B] if the batch has
    them. If the model has a part `target`, the default of `MomentumEncoder`, the outputs are
    `student` [B, V, D] and `teacher` [B, G, D]: the target's results for the large crops, without
    gradient.
    """

    large: Key = "large"
    small: Key = "small"
    group: Key = "group"

    prediction: ClassVar[None] = None

    def __call__(self, model: nn.Module, batch: Any, /) -> Outputs:
        """Return the features of all crops, the large ones first."""
        large, small = self.part(batch, "large"), self.optional_part(batch, "small")
        sizes = [large] if small is None else [large, small]
        features = torch.cat([_each_crop(model, crops) for crops in sizes], dim=1)
        target = getattr(model, "target", None)
        if target is None:
            return _with_groups({"features": features}, self.optional_part(batch, "group"))
        with torch.no_grad():
            return {"student": features, "teacher": _each_crop(target, large)}


@attrs.frozen(kw_only=True)
class Classification(KeyedTask):
    """Calls `model(image)`; returns `logits` [B, C] (or features) and the integer `labels` [B]."""

    image: Key = "image"
    label: Key = "label"

    def __call__(self, model: nn.Module, batch: Any, /) -> Outputs:
        """Return logits and labels."""
        logits = _output(model, self.part(batch, "image"), "classification")
        return {"logits": logits, "labels": _numbers(self.part(batch, "label"), "labels")}


@attrs.frozen(kw_only=True)
class NextToken(KeyedTask):
    """Calls `model(tokens)`; returns `logits` [B, T - 1, C] and `labels` [B, T - 1].

    The model takes tokens [B, T] and returns logits [B, T, C]; the last position has no next token.
    """

    tokens: Key = "tokens"

    def __call__(self, model: nn.Module, batch: Any, /) -> Outputs:
        """Return the logits of all positions except the last, and the tokens after them."""
        tokens = self.part(batch, "tokens")
        logits = _output(model, tokens, "next_token")
        return {"logits": logits[:, :-1], "labels": tokens[:, 1:]}

    def prediction(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Return the logits as [B, C, T - 1], as Ignite's metrics take them, and the labels."""
        return outputs["logits"].transpose(1, 2), outputs["labels"]


def check_outputs(outputs: object) -> None:
    """Check that a task has returned a mapping.

    Raises:
        BatchError: if it has not.
    """
    if not isinstance(outputs, Mapping):
        raise BatchError(
            f"task must return a mapping of named tensors, got {described(outputs)}. Return "
            "{'image_features': ..., 'text_features': ...}, in the order of the loss's arguments"
        )


def check_not_logits(outputs: Mapping[str, Tensor]) -> None:
    """Check that the first two outputs are not logits of all pairs, or their probabilities.

    Raises:
        BatchError: if they are, as those of OpenAI's CLIP: `logits_per_image`, `logits_per_text`.
    """
    names = list(outputs)[:2]
    if len(names) < 2 or not _are_square(one := outputs[names[0]], other := outputs[names[1]]):
        return
    are_named = all(name.endswith("_features") for name in names)
    how = "each the transpose of the other"
    if are_named and _are_shares(one, other):
        how = "whose rows add up to 1"
    elif not _are_turned(one, other, named=are_named):
        return
    size = one.shape[1]
    raise BatchError(
        f"{' and '.join(names)} must be features [B, D], got logits [{size}, {size}], {how}. Let "
        "the model return features, such as (encode_image(image), encode_text(text)), in its "
        "forward or in a task of your own"
    )


def _are_turned(one: Tensor, other: Tensor, *, named: bool) -> bool:
    """Return whether two outputs begin with a matrix and its transpose.

    With micro-batches, each holds its matrices one after the other. They are `named` if both should
    be features.
    """
    size = one.shape[1]
    one, other = (one[:size], other[:size]) if size > 1 else (one, other)
    near = 0.01 * one.abs().max()  # products of half precision, in another order
    equal = bool((one - other).abs().max() <= near)
    if size > 1:
        return not equal and bool((one - other.T).abs().max() <= near)
    return equal and len(one) > 1 and named  # micro-batches of one sample


def _are_shares(one: Tensor, other: Tensor) -> bool:
    """Return whether two outputs are a square matrix and its transpose after a softmax of rows.

    Their logarithms then differ, one transposed, by a number for each row and one for each column.
    """
    if not 1 < one.shape[1] == len(one):
        return False
    logs = one.float().log() - other.float().log().T
    rest = logs - logs[:1] - logs[:, :1] + logs[0, 0]  # NaN where one is 0 or negative
    sums = torch.cat([one.float().sum(1), other.float().sum(1)])
    # In bfloat16 too.
    return bool((rest.abs() < 0.1).all()) and bool(((sums - 1).abs() < 0.02).all())


def _are_square(one: Tensor, other: Tensor) -> bool:
    """Return whether two outputs of one shape begin with a square matrix of real numbers."""
    alike = one.shape == other.shape and one.dtype == other.dtype and one.is_floating_point()
    return alike and one.ndim == 2 and 1 <= one.shape[1] <= len(one)


def _with_groups(outputs: Outputs, groups: Any) -> Outputs:
    return outputs if groups is None else {**outputs, "groups": _numbers(groups, "groups")}


def _numbers(value: Any, name: str) -> Tensor:
    rule = f"{name} must be a tensor with an integer for each sample"
    return _tensor(value, rule, f"Number the {name}, and pass torch.tensor(numbers)")


def _view(value: Any, name: str) -> Tensor:
    way_out = "Let the loader collate {'first': ..., 'second': ...}, or write a task of your own"
    return _tensor(value, f"{name} must be a tensor with a view of each sample", way_out)


def _output(model: nn.Module, inputs: Any, task: str) -> Tensor:
    rule = f"model must return one tensor for the task {task}"
    return _tensor(model(inputs), rule, "For another model write a task of your own")


def _tensor(value: Any, rule: str, way_out: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise BatchError(f"{rule}, got {described(value)}. {way_out}")
    return value


def _each_crop(model: nn.Module, crops: Any) -> Tensor:
    """Return the features [B, V, D] of crops [B, V, ...]."""
    if not isinstance(crops, Tensor) or crops.ndim < 3:
        raise BatchError(
            "large and small must be tensors [batch, crops, ...], got "
            f"{described(crops)}. Stack the crops of a sample"
        )
    features = _output(model, crops.flatten(0, 1), "multi_crop")
    return features.view(*crops.shape[:2], *features.shape[1:])


image_text = ImageText()
huggingface = HuggingFace()
two_views = TwoViews()
multi_crop = MultiCrop()
classification = Classification()
next_token = NextToken()
