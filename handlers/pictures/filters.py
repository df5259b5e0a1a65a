"""The filters of an image encoder's first layer, as a picture."""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from ignite.engine import Events
from torch import Tensor, nn

from diptych.engine.distributed.collectives import rank
from diptych.engine.distributed.dtensor import full_tensor
from diptych.engine.trainer import Trainer
from diptych.handlers.cadence import call_every, check_every
from diptych.handlers.extras import check_extra
from diptych.handlers.pictures.board_handler import VISUAL, BoardHandler
from diptych.handlers.pictures.drawing import image_grid, thumbnails

SIDE, MOST_FILTERS, COLUMNS = 32, 64, 8


@attrs.define(kw_only=True, eq=False)
class FirstLayerFilters(BoardHandler):
    """Shows the filters of the model's first layer in TensorBoard, as the image `visual/filters`.

    The layer is the first `Conv2d` with 1 or 3 input channels and a kernel larger than one pixel:
    the stem of a convolutional network, or the patch embedding of a vision transformer. Each of its
    first 64 filters is scaled to its own range. Filters that stay grey noise belong to a layer that
    does not learn.

    Event: `STARTED` of a new run; `EPOCH_COMPLETED`, or every `every` iterations. Draws on rank 0
        only.
    Cost: the filters are copied to the host, which waits for the device; about 5 ms, and 10 kB of
        disk.

    Args:
        every: "epoch", or iterations between two drawings.
        board: where to draw; None: the attached `TensorBoard`. A board that is not attached is
            attached with this handler.

    Raises:
        ValueError: if `every` is neither; when the run starts, if there is no board or no
            such layer.
        ImportError: if the extra `images` is not installed.
    """

    every: int | Literal["epoch"] = attrs.field(default="epoch", validator=check_every)

    def __attrs_post_init__(self) -> None:
        check_extra("images", "PIL", needed_by="FirstLayerFilters")

    def listen(self, trainer: Trainer) -> None:
        """Draw on the trainer's events."""
        trainer.add_event_handler(Events.STARTED, self._start)
        call_every(trainer, self.every, self.draw)

    def draw(self, trainer: Trainer) -> None:
        """Draw the current filters."""
        picture = filter_picture(first_layer(trainer.model))
        if rank() == 0:
            board = self._board_of(trainer)
            with self.tolerated(lost=1), board.open_writer() as writer:
                writer.add_image(f"{VISUAL}/filters", picture, trainer.state.iteration)

    def _start(self, trainer: Trainer) -> None:
        self._board_of(trainer)
        first_layer(trainer.model)
        if trainer.state.iteration == 0:
            self.draw(trainer)


def first_layer(model: nn.Module) -> nn.Conv2d:
    """Return the first convolution whose input is an image.

    Raises:
        ValueError: if there is none.
    """
    for layer in (part for part in model.modules() if isinstance(part, nn.Conv2d)):
        if layer.weight.shape[1] in (1, 3) and layer.weight.shape[2:].numel() > 1:
            return layer
    raise ValueError(
        "the model of FirstLayerFilters must have a Conv2d over 1 or 3 channels with a kernel "
        f"larger than one pixel, got none in {type(model).__name__}. Remove the handler."
    )


@torch.no_grad()
def filter_picture(layer: nn.Conv2d) -> Tensor:
    """Return at most 64 of a layer's filters, each scaled to its own range, as uint8 [3, H, W]."""
    weight = full_tensor(layer.weight.detach())[:MOST_FILTERS].float().cpu()
    low = weight.amin(dim=(1, 2, 3), keepdim=True)
    high = weight.amax(dim=(1, 2, 3), keepdim=True)
    shown = (weight - low) / (high - low).clamp(min=1e-12)
    return image_grid(thumbnails(shown, SIDE), COLUMNS)
