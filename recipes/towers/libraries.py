"""Towers of timm and open_clip; each library is imported when a tower needs it.

A tower of a saved run is built from its name and from the folder that the run wrote. No code comes
from either: names that lead to a hub or a folder, and code of models, are not accepted there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, get_args

import torch
from torch import Tensor, nn

from diptych.handlers.extras import check_extra
from diptych.recipes.towers.parts import (
    ImageTower,
    TextTower,
    TowerError,
    TowerOptions,
    Towers,
)
from diptych.recipes.towers.resize import Interpolation, Mode, Resize

NAME = re.compile(r"[\w.\-/]+", re.ASCII)
"""Names without a colon: with one, the libraries read from a hub or a folder."""
MODES: Mapping[str | None, Mode] = {
    "center": "crop",
    "squash": "squash",
    "border": "pad",
    "shortest": "crop",
    "longest": "pad",
}
"""The modes of a resize, as timm and open_clip name them."""


def library(extra: str, package: str, tower: str, name: str) -> Any:
    """Import the library of a tower.

    Raises:
        TowerError: if the tower's name leads elsewhere.
        ImportError: if the library is not installed, or cannot be imported.
    """
    check_extra(extra, package, needed_by=f"the tower {tower}:{name}")
    if not NAME.fullmatch(name):
        raise TowerError(
            f"a tower's name must be letters, digits, dots, slashes and hyphens, got {name!r:.100}"
        )
    try:
        return import_module(package)
    except Exception as error:  # torchvision built for another torch raises what torch does
        raise ImportError(
            f"the tower {tower}:{name} needs the package {package}, which cannot be imported: "
            f"{error!s:.300}"
        ) from error


def timm_image(name: str, options: TowerOptions) -> Towers:
    """Return an image model of timm without its classifier."""
    timm = library("timm", "timm", "timm", name)
    _check_weights("timm", name, options)
    given: dict[str, Any] = {"pretrained": bool(options.pretrained), "num_classes": 0}
    if options.file:
        given["pretrained_cfg_overlay"] = {"file": options.file}
    sized = {} if options.image_size is None else {"img_size": options.image_size}
    try:
        try:
            model = timm.create_model(name, **given, **sized)
        except TypeError:  # a convolutional network takes any size, and no argument for it
            model = timm.create_model(name, **given)
        # Weights that the file lacks are left random, for the sake of classifiers.
        names = timm.models.load_state_dict(options.file).keys() if options.file else set()
    except Exception as error:  # a file of weights raises whatever its reader does
        raise TowerError(f"the tower must be timm's, got {name!r}: {error!s:.300}") from error
    if options.file and not names & model.state_dict().keys():
        raise TowerError(f"pretrained must be a file of timm:{name}, got {options.file} of another")
    config = timm.data.resolve_model_data_config(model)
    size = options.image_size or config["input_size"][-1]
    return Towers(
        image=ImageTower(
            module=model,
            width=model.num_features,
            size=size,
            mean=config["mean"],
            std=config["std"],
            resize=Resize(
                size,
                interpolation=_interpolation(config["interpolation"]),
                kept=config["crop_pct"],
                mode=MODES.get(config.get("crop_mode"), "crop"),
                fill=round(255 * config["mean"][0]),
            ),
            licence=_pretrained_licence(options, model.pretrained_cfg.get("license")),
        )
    )


def _check_weights(library: str, name: str, options: TowerOptions) -> None:
    """Check that a library with one set of weights a name is asked for no others.

    Raises:
        TowerError: if it is.
    """
    if options.pretrained not in (None, "default") and not options.file:
        raise TowerError(
            f"pretrained must be default or a file of weights for {library}:{name}, got "
            f"{options.pretrained!r}"
        )


def _interpolation(name: str) -> Interpolation:
    """Return an interpolation's name; timm's "random", for training, is evaluated as bilinear."""
    known: Sequence[Interpolation] = get_args(Interpolation)
    return next((one for one in known if one == name), "bilinear")


def _pretrained_licence(options: TowerOptions, stated: str | None) -> str:
    """Return the licence of the weights of a name, if its library states one."""
    return (stated or "") if options.pretrained and not options.file else ""


def open_clip_towers(name: str, options: TowerOptions) -> Towers:
    """Return both towers of a model of open_clip, with its scale."""
    open_clip = library("open-clip", "open_clip", "open_clip", name)
    model, tokenizer = _open_clip_model(open_clip, name, options)
    found = model.visual.image_size
    size = found[0] if isinstance(found, (tuple, list)) else found
    config = open_clip.get_model_preprocess_cfg(model)
    with torch.no_grad():  # its models name the dimension in different ways
        width = model.encode_text(tokenizer(["a"])).shape[-1]
    visual, model.visual = model.visual, nn.Identity()
    resize = Resize(
        size,
        interpolation=_interpolation(config["interpolation"]),
        mode=MODES[config["resize_mode"]],
        fill=config["fill_color"],
    )
    image = ImageTower(
        module=visual,
        width=width,
        size=size,
        mean=config["mean"],
        std=config["std"],
        resize=resize,
        projected=True,
    )
    text = _OpenClipText(model)
    return Towers(
        image=image,
        text=TextTower(module=text, width=width, tokenize=tokenizer, projected=True),
        logit_scale=model.logit_scale,
        logit_bias=getattr(model, "logit_bias", None),
    )


def _open_clip_model(open_clip: Any, name: str, options: TowerOptions) -> tuple[Any, Any]:
    """Return a model and its tokenizer.

    Raises:
        TowerError: if open_clip has none of this name, or its weights cannot be used.
    """
    tags = [None, *open_clip.list_pretrained_tags_by_model(name)]
    if options.pretrained not in tags and not options.file:
        known = ", ".join(map(str, tags[1:])) or "none"
        raise TowerError(
            f"pretrained must be a file or a tag of open_clip's {name} ({known:.300}), got "
            f"{options.pretrained!r}"
        )
    try:
        model = open_clip.create_model(
            name, pretrained=options.pretrained, force_image_size=options.image_size
        )
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # as above
        reason = str(error).partition(" Available")[0]
        raise TowerError(f"the tower must be open_clip's, got {name!r}: {reason:.300}") from error
    return model, tokenizer


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
