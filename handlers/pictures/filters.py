"""What the first layer of an image encoder looks for, as pictures."""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from ignite.engine import Events
from torch import Tensor, nn

from diptych.engine.distributed.collectives import rank
from diptych.engine.distributed.dtensor import has_shards, whole
from diptych.engine.trainer import Trainer
from diptych.handlers.cadence import call_every, check_every
from diptych.handlers.pictures.drawing import check_can_draw, thumbnails, tiles
from diptych.handlers.sinks.tensorboard import TensorBoard, attach_board_of, board_of

SIDE, MOST, COLUMNS = 32, 64, 8


@attrs.define(kw_only=True, eq=False)
class FirstLayerFilters:
    """Shows the filters of the model's first layer in TensorBoard, as the image `filters`.

    That is the first two-dimensional convolution that looks at 1 or 3 channels, in pieces of more
    than a pixel: the stem of a convolutional network, the patch embedding of a vision transformer.
    Each of its first 64 filters is stretched to its own range: grey noise that stays so is a layer
    that does not learn.

    Event: `STARTED` of a new run, `EPOCH_COMPLETED` or every so many iterations. Rank 0 alone
        draws.
    Cost: the filters are copied to the host, which waits for the device; some 5 ms, and 10 kB of
        disk.

    Args:
        every: "epoch", or iterations between two looks.
        board: where to draw; None: the `TensorBoard` that is attached. One that is not attached is
            attached with this handler.

    Raises:
        ValueError: if `every` is something else; when the run starts, if there is no board or no
            such layer.
        ImportError: if the extra `images` is not installed.
    """

    every: int | Literal["epoch"] = attrs.field(default="epoch", validator=check_every)
    board: TensorBoard | None = None

    def __attrs_post_init__(self) -> None:
        check_can_draw()

    def attach(self, trainer: Trainer) -> None:
        """Draw on the trainer's events."""
        attach_board_of(self, trainer)
        if rank() == 0 or has_shards(trainer.model):  # which all ranks gather
            trainer.add_event_handler(Events.STARTED, self._start)
            call_every(trainer, self.every, self.draw)

    def draw(self, trainer: Trainer) -> None:
        """Draw the filters of now."""
        picture = filter_picture(first_layer(trainer.model))
        if rank() == 0:
            board_of(trainer, self).writer.add_image("filters", picture, trainer.state.iteration)

    def _start(self, trainer: Trainer) -> None:
        board_of(trainer, self)
        first_layer(trainer.model)
        if trainer.state.iteration == 0:
            self.draw(trainer)


def first_layer(model: nn.Module) -> nn.Conv2d:
    """Return the first convolution that looks at pixels.

    Raises:
        ValueError: if there is none.
    """
    for layer in (part for part in model.modules() if isinstance(part, nn.Conv2d)):
        if layer.weight.shape[1] in (1, 3) and layer.weight.shape[2:].numel() > 1:
            return layer
    raise ValueError(
        "FirstLayerFilters needs a model with a Conv2d over 1 or 3 channels and more than a pixel, "
        f"got {type(model).__name__}, which has none: leave the handler out"
    )


@torch.no_grad()
def filter_picture(layer: nn.Conv2d) -> Tensor:
    """Return a layer's filters, uint8 [3, H, W], at most 64 of them, each in its own range."""
    weight = whole(layer.weight.detach())[:MOST].float().cpu()
    low = weight.amin(dim=(1, 2, 3), keepdim=True)
    high = weight.amax(dim=(1, 2, 3), keepdim=True)
    shown = (weight - low) / (high - low).clamp(min=1e-12)
    return tiles(thumbnails(shown, SIDE), COLUMNS)
