"""The parts of a tower: a module, the images or tokens that it takes, and its source."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
from torch import Tensor, nn

from diptych.handlers.files import make_folder, write_atomically
from diptych.recipes.towers.resize import Resize

Tokens = Tensor | dict[str, Tensor]
"""The tokens of texts, [B, L] each, as a text tower takes them."""
Save = Callable[[Path], object]

LICENCES = "licences.json"
"""The file of the licences of the image tower and the text tower, in their folder."""
HALF = (0.5, 0.5, 0.5)


class TowerError(ValueError):
    """A tower cannot be built from its name or settings."""


@attrs.frozen(kw_only=True)
class TowerOptions:
    """What a builder of towers is told.

    Attributes:
        image_size: the side of the images in pixels; None: the tower's own.
        pretrained: the weights: None for random ones, "default" for those of the name, a tag of
            open_clip, or a file of the image tower's.
        folder: the folder into which an earlier run saved the towers' descriptions; None: a new
            run. With it, nothing but the folder is read.
    """

    image_size: int | None = None
    pretrained: str | None = None
    folder: Path | None = None

    @property
    def file(self) -> str | None:
        """The file of the weights, if there is one."""
        return self.pretrained if self.pretrained and Path(self.pretrained).is_file() else None


@attrs.frozen(kw_only=True, eq=False)
class ImageTower:
    """A tower for images.

    Attributes:
        module: maps images [B, 3, size, size], normalised, to features [B, width].
        width: the dimension of the features.
        size: the side of the images.
        mean: of the pixels in [0, 1], of each channel: what the images are normalised with.
        std: of the pixels.
        resize: makes an image a square of that side.
        projected: whether the features are made to be compared with those of a text tower, so that
            no projection has to be added.
        save: writes, into a folder, what building it again needs; None: its name is enough.
        licence: of the weights that it starts from, as their files say; empty: they do not.
    """

    module: nn.Module
    width: int
    size: int
    mean: Sequence[float] = HALF
    std: Sequence[float] = HALF
    resize: Resize = attrs.field()
    projected: bool = False
    save: Save | None = None
    licence: str = ""

    @resize.default
    def _whole(self) -> Resize:
        return Resize(self.size)


@attrs.frozen(kw_only=True, eq=False)
class TextTower:
    """A tower for texts.

    Attributes:
        module: maps tokens to features [B, width].
        width: the dimension of the features.
        tokenize: maps texts to tokens; what depends on the longest text is padding alone.
        projected: as for images.
        save: as for images.
        licence: as for images.
    """

    module: nn.Module
    width: int
    tokenize: Callable[[Sequence[str]], Tokens]
    projected: bool = False
    save: Save | None = None
    licence: str = ""


@attrs.frozen(kw_only=True, eq=False)
class Towers:
    """An image tower and, for pairs, a text tower.

    Attributes:
        image: the image tower.
        text: the text tower.
        logit_scale: ln(1 / temperature) that the towers were trained with; None: there is none.
        logit_bias: the bias of SigLIP's logits; None: there is none.
        whole: the model of a library that both towers are parts of, for an export.
    """

    image: ImageTower
    text: TextTower | None = None
    logit_scale: nn.Parameter | None = None
    logit_bias: nn.Parameter | None = None
    whole: Any = None

    def save(self, folder: Path) -> None:
        """Write what building the towers again needs, and their licences, into a folder."""
        make_folder(folder)
        parts = [part for part in (self.image, self.text) if part is not None]
        for part in parts:
            if part.save is not None:
                part.save(folder)
        write_atomically(folder / LICENCES, json.dumps([part.licence for part in parts]) + "\n")
