"""Towers of timm, open_clip and transformers; each library is imported when a tower needs it.

A tower of a saved run is built from its name and from the folder that the run wrote. No code comes
from either: names that lead to a hub or a folder, and code of models, are not accepted there.
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

from diptych.handlers.extras import check_extra
from diptych.handlers.files import write_atomically
from diptych.recipes.towers.parts import (
    HALF,
    ImageTower,
    TextTower,
    Tokens,
    TowerError,
    TowerOptions,
    Towers,
)

NAME = re.compile(r"[\w.\-/]+", re.ASCII)
"""Names without a colon: with one, the libraries read from a hub or a folder."""
PIXELS = "preprocessor.json"
"""The file with size, mean and deviation of the images of a transformers model."""
SIDE = 224
"""The side of the images if the model does not say."""
LONGEST = 128
"""The most tokens of a text if the model allows more."""


def _library(extra: str, package: str, tower: str, name: str) -> Any:
    check_extra(extra, package, needed_by=f"the tower {tower}:{name}")
    if not NAME.fullmatch(name):
        raise TowerError(
            f"a tower's name must be letters, digits, dots, slashes and hyphens, got {name!r:.100}"
        )
    return import_module(package)


def timm_image(name: str, options: TowerOptions) -> Towers:
    """Return an image model of timm without its classifier."""
    timm = _library("timm", "timm", "timm", name)
    sized = {} if options.image_size is None else {"img_size": options.image_size}
    try:
        model = timm.create_model(name, pretrained=bool(options.pretrained), num_classes=0, **sized)
    except TypeError:  # a convolutional network takes any size, and no argument for it
        model = timm.create_model(name, pretrained=bool(options.pretrained), num_classes=0)
    except RuntimeError as error:
        raise TowerError(f"the tower must be timm's, got {name!r}: {error!s:.300}") from error
    config = timm.data.resolve_model_data_config(model)
    return Towers(
        image=ImageTower(
            module=model,
            width=model.num_features,
            size=options.image_size or config["input_size"][-1],
            mean=config["mean"],
            std=config["std"],
        )
    )


def open_clip_towers(name: str, options: TowerOptions) -> Towers:
    """Return both towers of a model of open_clip, with its scale."""
    open_clip = _library("open-clip", "open_clip", "open_clip", name)
    tags = [None, *open_clip.list_pretrained_tags_by_model(name)]
    if options.pretrained not in tags:
        known = ", ".join(map(str, tags[1:])) or "none"
        raise TowerError(
            f"pretrained must be a tag of open_clip's {name} ({known:.300}), got "
            f"{options.pretrained!r}"
        )
    try:
        model = open_clip.create_model(
            name, pretrained=options.pretrained, force_image_size=options.image_size
        )
    except RuntimeError as error:
        reason = str(error).partition(" Available")[0]
        raise TowerError(f"the tower must be open_clip's, got {name!r}: {reason:.300}") from error
    size = model.visual.image_size
    config = open_clip.get_model_preprocess_cfg(model)
    tokenizer = open_clip.get_tokenizer(name)
    with torch.no_grad():  # its models name the dimension in different ways
        width = model.encode_text(tokenizer(["a"])).shape[-1]
    visual, model.visual = model.visual, nn.Identity()
    return Towers(
        image=ImageTower(
            module=visual,
            width=width,
            size=size[0] if isinstance(size, (tuple, list)) else size,
            mean=config["mean"],
            std=config["std"],
            projected=True,
        ),
        text=TextTower(
            module=_OpenClipText(model),
            width=width,
            tokenize=tokenizer,
            projected=True,
        ),
        logit_scale=model.logit_scale,
        logit_bias=getattr(model, "logit_bias", None),
    )


class _OpenClipText(nn.Module):
    """The text side of a model of open_clip."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return features of tokens [B, L]."""
        features: Tensor = self.model.encode_text(tokens)
        return features

    def set_grad_checkpointing(self) -> None:
        """Recompute activations in the backward pass."""
        if hasattr(self.model, "text"):
            self.model.text.set_grad_checkpointing(True)
        else:
            self.model.transformer.grad_checkpointing = True


def hf_image(name: str, options: TowerOptions) -> Towers:
    """Return an image model of transformers; with its text tower, if it is a CLIP."""
    transformers = _library("transformers", "transformers", "hf", name)
    model, source = _hf_model(transformers, name, options, "image")
    config = model.config
    pixels = _pixels(source, options)
    side = getattr(getattr(config, "vision_config", config), "image_size", pixels["size"])
    if pixels["size"] != side:
        raise TowerError(f"image_size must be {side} for hf:{name}, got {pixels['size']}")

    def save(folder: Path) -> None:
        config.save_pretrained(folder / "image")
        write_atomically(folder / "image" / PIXELS, json.dumps(pixels))

    vision = getattr(config, "vision_config", None)
    shape = {"size": pixels["size"], "mean": pixels["mean"], "std": pixels["std"], "save": save}
    if vision is None:
        return Towers(image=ImageTower(module=_HFPooled(model), width=config.hidden_size, **shape))
    tokenize, save_tokenizer = _hf_tokenizer(
        transformers, name, options, "image", config.text_config
    )
    width = model.text_projection.out_features
    return Towers(
        image=ImageTower(
            module=_HFSide(model.vision_model, model.visual_projection),
            width=width,
            projected=True,
            **shape,
        ),
        text=TextTower(
            module=_HFSide(model.text_model, model.text_projection),
            width=width,
            tokenize=tokenize,
            projected=True,
            save=save_tokenizer,
        ),
        logit_scale=model.logit_scale,
        whole=model,
    )


def hf_text(name: str, options: TowerOptions) -> TextTower:
    """Return a text model of transformers; its features are the mean over a text's tokens."""
    transformers = _library("transformers", "transformers", "hf", name)
    model, _ = _hf_model(transformers, name, options, "text")
    tokenize, save_tokenizer = _hf_tokenizer(transformers, name, options, "text", model.config)

    def save(folder: Path) -> None:
        model.config.save_pretrained(folder / "text")
        save_tokenizer(folder)

    width = int(model.config.hidden_size)
    return TextTower(module=_HFPooled(model), width=width, tokenize=tokenize, save=save)


class _HFPooled(nn.Module):
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
        reason = str(error).strip().partition("\n")[0]
        raise TowerError(
            f"{side}_tower must be a model of transformers that this machine has or can fetch, got "
            f"{str(source)!r:.200}: {reason:.300}"
        ) from error


def _hf_tokenizer(
    transformers: Any, name: str, options: TowerOptions, side: str, config: Any
) -> tuple[Any, Any]:
    """Return a function from texts to tokens, and one that saves the tokenizer."""
    saved = options.folder is not None
    source = options.folder / side if options.folder is not None else name
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        source, trust_remote_code=False, local_files_only=saved
    )
    most = min(LONGEST, int(getattr(config, "max_position_embeddings", LONGEST)))

    def tokenize(texts: Sequence[str]) -> dict[str, Tensor]:
        found: Mapping[str, Tensor] = tokenizer(
            list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt"
        )
        return {key: found[key] for key in ("input_ids", "attention_mask")}

    def save(folder: Path) -> None:
        tokenizer.save_pretrained(folder / side)

    return tokenize, save


def _pixels(source: Path | str, options: TowerOptions) -> dict[str, Any]:
    """Return size, mean and deviation of the images, as the model's files say."""
    if options.folder is not None:
        saved: dict[str, Any] = json.loads((Path(source) / PIXELS).read_text("utf-8"))
        return saved
    base = import_module("transformers.image_processing_base")
    try:
        config, _ = base.ImageProcessingMixin.get_image_processor_dict(str(source))
    except OSError:
        config = {}
    return {
        "size": options.image_size or _side(config),
        "mean": list(config.get("image_mean") or HALF),
        "std": list(config.get("image_std") or HALF),
    }


def _side(config: Mapping[str, Any]) -> int:
    size = config.get("crop_size") or config.get("size") or SIDE
    if isinstance(size, int):
        return size
    return int(size.get("height") or size.get("shortest_edge") or SIDE)
