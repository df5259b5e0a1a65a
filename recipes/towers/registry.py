"""Towers by name: the registry in which the names of a user, and of a saved run, are looked up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import attrs

from diptych.recipes.towers.libraries import open_clip_towers, timm_image
from diptych.recipes.towers.parts import ImageTower, TextTower, TowerError, TowerOptions, Towers
from diptych.recipes.towers.small_towers import ImageEncoder, TextEncoder, tokenize_all
from diptych.recipes.towers.transformers_towers import hf_image, hf_text

Built = TypeVar("Built", Towers, TextTower)

SMALL = "small"
OWN = "own"
"""The name of a tower that the caller's own code builds."""
WIDTH, SIZE = 256, 64
"""The features of the small towers, and the side of their images."""


def _small_image(_: str, options: TowerOptions) -> Towers:
    size = options.image_size or SIZE
    # The images arrive normalised, as for every tower.
    module = ImageEncoder(WIDTH, size=size, mean=0.0, std=1.0)
    std = (0.25, 0.25, 0.25)
    return Towers(image=ImageTower(module=module, width=WIDTH, size=size, std=std, projected=True))


def _small_text(_: str, __: TowerOptions) -> TextTower:
    return TextTower(module=TextEncoder(WIDTH), width=WIDTH, tokenize=tokenize_all, projected=True)


def _open_clip_text(name: str, options: TowerOptions) -> TextTower:
    text = open_clip_towers(name, options).text
    assert text is not None
    return text


IMAGE_TOWERS: dict[str, Callable[[str, TowerOptions], Towers]] = {
    SMALL: _small_image,
    "timm": timm_image,
    "open_clip": open_clip_towers,
    "hf": hf_image,
}
TEXT_TOWERS: dict[str, Callable[[str, TowerOptions], TextTower]] = {
    SMALL: _small_text,
    "open_clip": _open_clip_text,
    "hf": hf_text,
}
"""The builders by the part of a name before the colon: all that a run's files can name."""


def build_towers(image: str, text: str | None, options: TowerOptions) -> Towers:
    """Return the towers that two names stand for.

    Args:
        image: `small`, `timm:NAME`, `open_clip:NAME` or `hf:NAME`.
        text: `small`, `open_clip:NAME` or `hf:NAME`; None: the text tower that the image tower
            comes with, else the small one.
        options: size of the images, weights, and the folder of a saved run.

    Raises:
        TowerError: if a name is unknown, or its library does not have it.
        ImportError: if the library is not installed.
    """
    towers = _built("image_tower", image, IMAGE_TOWERS, options)
    if text is None:
        return towers if towers.text else attrs.evolve(towers, text=_small_text("", options))
    return Towers(image=towers.image, text=_built("text_tower", text, TEXT_TOWERS, options))


def _built(
    argument: str,
    text: str,
    table: Mapping[str, Callable[[str, TowerOptions], Built]],
    options: TowerOptions,
) -> Built:
    prefix, colon, name = text.partition(":")
    if prefix not in table or bool(colon) == (prefix == SMALL):
        known = ", ".join(one if one == SMALL else f"{one}:NAME" for one in table)
        raise TowerError(
            f"{argument} must be one of {known}, got {text!r:.100}. Pass towers of your own code "
            "as a factory (--factory module:function)."
        )
    return table[prefix](name, options)
