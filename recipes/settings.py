"""The settings of a training: flags of the command, and the file that repeats a run."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs

from diptych.engine.checks import whole_number
from diptych.engine.settings import Precision
from diptych.handlers.argument_checks import not_negative, one_of, share_below_one
from diptych.handlers.files import write_atomically
from diptych.recipes.data.rows import DataError
from diptych.recipes.towers.registry import SMALL

RECIPE = "recipe.yaml"
"""The file of the settings in a run's directory."""

TaskName = Literal["image_text", "two_views", "classification"]
Check = Literal["decode", "names"]
LOSSES: Mapping[TaskName, str] = {
    "image_text": "clip",
    "two_views": "simclr",
    "classification": "cross_entropy",
}
"""The loss of each task if none is named."""
AUGMENT: Mapping[TaskName, tuple[str, ...]] = {
    "image_text": ("crop:0.7",),
    "two_views": ("crop:0.2", "flip", "color:0.4", "gray:0.2", "blur"),
    "classification": ("crop:0.5", "flip"),
}
"""The augmentations of each task if none are named."""


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value).absolute()


def _pattern(value: str | None) -> str | None:
    return None if value is None else str(Path(value).absolute())  # a run is repeated from anywhere


def _weights(value: str | None) -> str | None:
    """Return the absolute path of a file of weights; another value as it is."""
    is_file = isinstance(value, str) and Path(value).is_file()
    return str(Path(value).absolute()) if is_file else value  # type: ignore[arg-type]


def _names(value: Sequence[str] | None) -> tuple[str, ...] | None:
    return tuple(value) if isinstance(value, (list, tuple)) else value  # type: ignore[return-value]


_optional = attrs.validators.optional
_text = attrs.validators.instance_of(str)
_flag = attrs.validators.instance_of(bool)


@attrs.frozen(kw_only=True)
class Settings:
    """What a training is made of.

    ```python
    train(Settings(images="photos", captions="captions.json", epochs=20))
    ```

    Attributes:
        images: folder of the images.
        captions: file of captions, or folder of text files; none: metadata or text files in the
            folder of the images, or its subfolders as classes.
        shards: tar files of images and captions instead, such as "cc3m/{00000..00331}.tar".
        shard_samples: samples of an epoch of shards.
        task: image_text trains on captions, two_views on images alone, classification on folders
            by class.
        image_column: column of the image names; none: recognised.
        caption_column: column of the captions; none: recognised.
        allow_outside: read images outside the folder, too.
        skip_broken: leave out rows that cannot be used, instead of stopping.
        check: decode every image before training, or look up the names alone.
        held_out: share of the images to evaluate on, if the data have no split of their own.
        image_tower: small, timm:NAME, open_clip:NAME or hf:NAME.
        text_tower: small, open_clip:NAME or hf:NAME; none: the one that the image tower comes with,
            else small.
        pretrained: weights of the towers: default, a tag of open_clip, or a file of the image
            tower's; none: random ones.
        dim: dimension of the features; none: the towers' own, else 256.
        image_size: side of the images in pixels; none: the tower's own.
        lock_image: keep the image tower as it is (LiT).
        lock_text: keep the text tower as it is.
        lora: rank of low-rank updates to both towers, instead of training their weights.
        gradient_checkpointing: recompute activations, to use less memory.
        augment: crop, flip, color, gray, blur or rotate, with a number: crop:0.5; none: as suits
            the task.
        loss: name of a loss; none: clip, simclr or cross_entropy.
        epochs: passes over the training data.
        batch_size: samples of an update.
        microbatch_size: samples that go through the model at once; none: all.
        learning_rate: after the warm-up.
        weight_decay: of AdamW.
        warmup: share of the updates in which the learning rate rises.
        precision: fp32, bf16 or fp16.
        workers: processes that read images.
        seed: of weights, order and augmentation.
        log_every: updates between two log points.
    """

    images: Path | None = attrs.field(default=None, converter=_path)
    captions: Path | None = attrs.field(default=None, converter=_path)
    shards: str | None = attrs.field(default=None, converter=_pattern)
    shard_samples: int | None = attrs.field(
        default=None, validator=_optional(whole_number(of="samples"))
    )
    task: TaskName = attrs.field(default="image_text", validator=one_of(TaskName))
    image_column: str | None = attrs.field(default=None, validator=_optional(_text))
    caption_column: str | None = attrs.field(default=None, validator=_optional(_text))
    allow_outside: bool = attrs.field(default=False, validator=_flag)
    skip_broken: bool = attrs.field(default=False, validator=_flag)
    check: Check = attrs.field(default="decode", validator=one_of(Check))
    held_out: float = attrs.field(default=0.1, validator=share_below_one)
    image_tower: str = attrs.field(default=SMALL, validator=_text)
    text_tower: str | None = attrs.field(default=None, validator=_optional(_text))
    pretrained: str | None = attrs.field(
        default=None, converter=_weights, validator=_optional(_text)
    )
    dim: int | None = attrs.field(default=None, validator=_optional(whole_number(of="features")))
    image_size: int | None = attrs.field(
        default=None, validator=_optional(whole_number(of="pixels"))
    )
    lock_image: bool = attrs.field(default=False, validator=_flag)
    lock_text: bool = attrs.field(default=False, validator=_flag)
    lora: int | None = attrs.field(default=None, validator=_optional(whole_number(of="ranks")))
    gradient_checkpointing: bool = attrs.field(default=False, validator=_flag)
    augment: tuple[str, ...] | None = attrs.field(default=None, converter=_names)
    loss: str | None = attrs.field(default=None, validator=_optional(_text))
    epochs: int = attrs.field(default=30, validator=whole_number(of="passes"))
    batch_size: int = attrs.field(default=256, validator=whole_number(of="samples"))
    microbatch_size: int | None = attrs.field(
        default=None, validator=_optional(whole_number(of="samples"))
    )
    learning_rate: float = attrs.field(default=1e-3, validator=not_negative)
    weight_decay: float = attrs.field(default=0.01, validator=not_negative)
    warmup: float = attrs.field(default=0.1, validator=share_below_one)
    precision: Precision = attrs.field(default="fp32", validator=one_of(Precision))
    workers: int = attrs.field(default=0, validator=whole_number(least=0, of="processes"))
    seed: int = attrs.field(default=0, validator=whole_number(least=0, of="seeds"))
    log_every: int = attrs.field(default=50, validator=whole_number(of="updates"))

    @property
    def loss_name(self) -> str:
        """The name of the loss."""
        return self.loss or LOSSES[self.task]

    @property
    def augmentations(self) -> tuple[str, ...]:
        """The names of the augmentations."""
        return AUGMENT[self.task] if self.augment is None else self.augment


def write_settings(settings: Settings, run_dir: Path) -> None:
    """Write the settings into a run's directory, as `recipe.yaml`."""
    import yaml  # noqa: PLC0415 - an extra

    plain = attrs.asdict(settings, value_serializer=_plain)
    write_atomically(run_dir / RECIPE, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def read_settings(path: Path) -> Settings:
    """Return the settings in a file, which may come from somebody else: they are checked.

    Raises:
        DataError: if the file cannot be read, or a setting is unknown or out of range.
    """
    import yaml  # noqa: PLC0415 - an extra

    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(
            f"{path} must be a file of settings, got an error: {reason:.300}"
        ) from error
    if not isinstance(values, Mapping):
        raise DataError(f"{path} must be a mapping of settings, got a {type(values).__name__}")
    known = [field.name for field in attrs.fields(Settings)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"It may set {', '.join(known[:8])}, ..."
            raise DataError(f"{path} must have known settings, got {str(name)!r:.80}. {hint}")
    try:
        return Settings(**values)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} has a setting that cannot be used: {error.args[0]}") from error


def _plain(_: Any, __: Any, value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
