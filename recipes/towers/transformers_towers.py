"""Towers of transformers, which is imported when a tower needs it.

As for other libraries, a tower of a saved run is built from the folder that the run wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diptych.handlers.files import write_atomically
from diptych.recipes.towers.libraries import library
from diptych.recipes.towers.parts import (
    HALF,
    ImageTower,
    TextTower,
    Tokens,
    TowerError,
    TowerOptions,
    Towers,
)
from diptych.recipes.towers.resize import Interpolation, Resize

PIXELS = "preprocessor.json"
"""The file with size, mean, deviation and resize of the images of a model."""
SIDE = 224
"""The side of the images if the model does not say."""
LONGEST = 128
"""The most tokens of a text if the model allows more."""
RESAMPLE: Mapping[int | None, Interpolation] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}
"""The interpolations by the numbers of Pillow, which transformers writes."""


def hf_image(name: str, options: TowerOptions) -> Towers:
    """Return an image model of transformers; with its text tower, if it is a CLIP."""
    transformers = library("transformers", "transformers", "hf", name)
    if options.pretrained not in (None, "default"):
        raise TowerError(
            f"pretrained must be default for hf:{name}, got {options.pretrained!r}. A folder with "
            "weights is named in the tower: hf:FOLDER."
        )
    model, source = _hf_model(transformers, name, options, "image")
    config = model.config
    pixels = _pixels(source, options)
    side = getattr(getattr(config, "vision_config", config), "image_size", pixels["size"])
    resize = _resize(pixels)
    if resize.size != side:
        raise TowerError(f"image_size must be {side} for hf:{name}, got {resize.size}")

    def save(folder: Path) -> None:
        config.save_pretrained(folder / "image")
        write_atomically(folder / "image" / PIXELS, json.dumps(pixels))

    shape = {
        "size": resize.size,
        "mean": pixels["mean"],
        "std": pixels["std"],
        "resize": resize,
        "save": save,
        "licence": _hf_licence(transformers, name, options),
    }
    if hasattr(config, "vision_config"):
        return _both_sides(
            model, shape, _hf_tokenizer(transformers, name, options, "image", config)
        )
    module = HFPooled(model).eval()
    with torch.no_grad():  # its configurations name the dimension in different ways
        width = module(torch.zeros(1, 3, resize.size, resize.size)).shape[-1]
    return Towers(image=ImageTower(module=module.train(), width=width, **shape))


def _both_sides(model: Any, shape: dict[str, Any], tokenizer: tuple[Any, Any]) -> Towers:
    """Return the towers of a CLIP.

    Args:
        model: the CLIP.
        shape: of the image tower.
        tokenizer: what `_hf_tokenizer` returns.

    Raises:
        TowerError: if it is another model of images and texts.
    """
    if not hasattr(model, "visual_projection"):
        raise TowerError(
            f"hf:NAME must be an image model or a CLIP, got a {type(model).__name__}. Use "
            "open_clip:NAME if open_clip has it."
        )
    width, (tokenize, save_tokenizer) = model.text_projection.out_features, tokenizer
    image = _HFSide(model.vision_model, model.visual_projection)
    text = TextTower(
        module=_HFSide(model.text_model, model.text_projection),
        width=width,
        tokenize=tokenize,
        projected=True,
        save=save_tokenizer,
        licence=shape["licence"],
    )
    return Towers(
        image=ImageTower(module=image, width=width, projected=True, **shape),
        text=text,
        logit_scale=model.logit_scale,
        whole=model,
    )


def hf_text(name: str, options: TowerOptions) -> TextTower:
    """Return a text model of transformers; its features are the mean over a text's tokens."""
    transformers = library("transformers", "transformers", "hf", name)
    model, _ = _hf_model(transformers, name, options, "text")
    tokenize, save_tokenizer = _hf_tokenizer(transformers, name, options, "text", model.config)

    def save(folder: Path) -> None:
        model.config.save_pretrained(folder / "text")
        save_tokenizer(folder)

    width = int(model.config.hidden_size)
    return TextTower(
        module=HFPooled(model),
        width=width,
        tokenize=tokenize,
        save=save,
        licence=_hf_licence(transformers, name, options),
    )


def _hf_licence(transformers: Any, name: str, options: TowerOptions) -> str:
    """Return the licence in the card of pretrained weights, if this machine has the card."""
    if options.pretrained is None or options.folder is not None:
        return ""
    try:
        card = transformers.utils.cached_file(name, "README.md", local_files_only=True)
        text = Path(card).read_text("utf-8")
    except (OSError, ValueError, TypeError):
        return ""
    head = text.partition("\n---")[0] if text.startswith("---") else ""
    found = re.search(r"^license:[ \t]*(.+)$", head, re.MULTILINE)
    return found[1].strip(" \t\r\"'") if found else ""


class HFPooled(nn.Module):
    """A model of transformers, and the mean of its last hidden states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        unused = getattr(model, "pooler", None)
        if unused is not None:  # its output is not used, so that it would have no gradient
            unused.requires_grad_(requires_grad=False)

    def forward(self, given: Tokens) -> Tensor:
        """Return features of tokens, or of images [B, 3, H, W]."""
        if isinstance(given, Tensor):
            hidden: Tensor = self.model(pixel_values=given).last_hidden_state
            return hidden.flatten(2).mean(dim=2) if hidden.ndim == 4 else hidden.mean(dim=1)
        hidden = self.model(**given).last_hidden_state
        mask = given["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations in the backward pass."""
        _checkpoint(self.model)


class _HFSide(nn.Module):
    """One side of a CLIP of transformers: an encoder and its projection."""

    def __init__(self, encoder: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projection = encoder, projection

    def forward(self, given: Tokens) -> Tensor:
        """Return features of tokens, or of images [B, 3, H, W]."""
        called = {"pixel_values": given} if isinstance(given, Tensor) else given
        features: Tensor = self.projection(self.encoder(**called).pooler_output)
        return features

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations in the backward pass."""
        _checkpoint(self.encoder)


def _checkpoint(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _hf_model(
    transformers: Any, name: str, options: TowerOptions, side: str
) -> tuple[Any, Path | str]:
    """Return a model and where its files are."""
    saved = options.folder is not None
    source = options.folder / side if options.folder is not None else name
    try:
        if options.pretrained and not saved:
            return transformers.AutoModel.from_pretrained(source, trust_remote_code=False), source
        config = transformers.AutoConfig.from_pretrained(
            source, trust_remote_code=False, local_files_only=saved
        )
        return transformers.AutoModel.from_config(config, trust_remote_code=False), source
    except (OSError, ValueError) as error:
        raise _not_there(side, source, error) from error


def _not_there(side: str, source: Path | str, error: Exception) -> TowerError:
    reason = str(error).strip().partition("\n")[0]
    return TowerError(
        f"{side}_tower must be a model of transformers that this machine has or can fetch, with "
        f"its tokenizer if it is one for texts, got {str(source)!r:.200}: {reason:.300}"
    )


def _hf_tokenizer(
    transformers: Any, name: str, options: TowerOptions, side: str, config: Any
) -> tuple[Any, Any]:
    """Return a function from texts to tokens, and one that saves the tokenizer."""
    saved = options.folder is not None
    source = options.folder / side if options.folder is not None else name
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, trust_remote_code=False, local_files_only=saved
        )
    except (OSError, ValueError) as error:
        raise _not_there("text", source, error) from error
    most = longest_text(getattr(config, "text_config", config))

    def tokenize(texts: Sequence[str]) -> dict[str, Tensor]:
        found: Mapping[str, Tensor] = tokenizer(
            list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt"
        )
        return {key: found[key] for key in ("input_ids", "attention_mask")}

    def save(folder: Path) -> None:
        tokenizer.save_pretrained(folder / side)

    return tokenize, save


def longest_text(config: Any) -> int:
    """Return the most tokens of a text."""
    return min(LONGEST, int(getattr(config, "max_position_embeddings", LONGEST)))


def _pixels(source: Path | str, options: TowerOptions) -> dict[str, Any]:
    """Return how a model takes its images, as its files say: plain values, to be saved."""
    if options.folder is not None:
        saved: dict[str, Any] = json.loads((Path(source) / PIXELS).read_text("utf-8"))
        return saved
    base = import_module("transformers.image_processing_base")
    try:
        config, _ = base.ImageProcessingMixin.get_image_processor_dict(str(source))
    except OSError:
        config = {}
    plain = config.get("do_normalize", True)
    return {
        "mean": list(config.get("image_mean") or HALF) if plain else [0.0] * 3,
        "std": list(config.get("image_std") or HALF) if plain else [1.0] * 3,
        **_shape(config, options.image_size),
    }


def _shape(config: Mapping[str, Any], asked: int | None) -> dict[str, Any]:
    """Return the fields of the resize in the settings of an image processor of transformers.

    A side that is asked for instead keeps the proportions of resize and crop.
    """
    crop = _side(config.get("crop_size")) if config.get("do_center_crop", True) else None
    size = config.get("size")
    resized = _side(size) or SIDE
    final = crop or resized
    # In old files, a number alone is the length of both sides.
    squashes = not crop if isinstance(size, int) else "height" in (size or {})
    return {
        "size": asked or final,
        "interpolation": RESAMPLE.get(config.get("resample"), "bicubic"),
        "kept": float(config.get("crop_pct") or min(1.0, final / resized)),
        "mode": "squash" if squashes else "crop",
    }


def _side(value: Mapping[str, int] | int | None) -> int | None:
    """Return the length that a setting of an image processor names, in any of its forms."""
    if isinstance(value, Mapping):
        value = value.get("height") or value.get("shortest_edge")
    return None if value is None else int(value)


def _resize(pixels: Mapping[str, Any]) -> Resize:
    """Return the resize of saved fields.

    Raises:
        TowerError: if one is out of range; they may come from somebody else.
    """
    names = ("size", "interpolation", "kept", "mode")
    try:
        return Resize(**{name: pixels[name] for name in names if name in pixels})
    except (TypeError, ValueError) as error:
        raise TowerError(f"{PIXELS} has a value that cannot be used: {error}") from error
