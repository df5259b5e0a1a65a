"""Features of images and texts for TensorBoard's projector."""

from __future__ import annotations

import errno
import math
from functools import partial
from pathlib import Path

import attrs
import torch
from ignite.engine import Events
from torch import Tensor

from diptych.engine.distributed.collectives import rank
from diptych.engine.trainer import Trainer
from diptych.handlers.contained_paths import is_link
from diptych.handlers.extras import check_extra
from diptych.handlers.files import make_folder, write_atomically
from diptych.handlers.pictures.board_handler import BoardHandler
from diptych.handlers.pictures.drawing import image_grid, save_png, thumbnails
from diptych.handlers.pictures.pair_samples import PairSamples

THUMBNAIL = 32
LARGEST_SPRITE = 8192
"""The side of the largest picture that a browser shows, in pixels."""
TEXT_COLOR = (44, 123, 182)


@attrs.define(eq=False)
class EmbeddingProjector(BoardHandler):
    """Shows the samples' features in TensorBoard's tab "Projector", images and texts together.

    An image is shown as its thumbnail, a text as a blue tile. Search and colour the points by
    caption, side and group. The features have unit length. Each run replaces the files
    `projector/` and `projector_config.pbtxt`.

    Event: `COMPLETED`. Writes on rank 0 only.
    Cost: a forward pass of the samples, once. A sample takes about ten bytes of disk for each
        number of its features, and 2 kB for its thumbnail.

    Args:
        samples: the samples to show.
        board: the files go into its directory; None: the attached `TensorBoard`. A board that is
            not attached is attached with this handler.

    Raises:
        ValueError: when the run starts, if there is no board, or if the thumbnails of all samples
            do not fit into a picture of 8192 x 8192.
        ImportError: if the extra `images` is not installed.
        BatchError: when the run ends, if the numbers of pictures and of features differ.
    """

    samples: PairSamples = attrs.field(validator=attrs.validators.instance_of(PairSamples))

    def __attrs_post_init__(self) -> None:
        check_extra("images", "PIL", needed_by="EmbeddingProjector")

    def listen(self, trainer: Trainer) -> None:
        """Draw on the trainer's events."""
        trainer.add_event_handler(Events.STARTED, self._check)
        trainer.add_event_handler(Events.COMPLETED, self.write)

    def write(self, trainer: Trainer) -> None:
        """Write the current features."""
        features = self.samples.features(trainer)
        if rank() != 0:
            return
        points = torch.cat([features.images, features.texts])
        lines = ["label\tside\tgroup", *self._labels(features.image_groups, features.text_groups)]
        folder = self._board_of(trainer).directory
        projector = folder / "projector"
        with self.tolerated(str(projector), lost=1):
            make_folder(projector)
            if is_link(projector):
                raise OSError(errno.ELOOP, "it is a symbolic link; remove it", str(projector))
            _write_lines(projector / "features.tsv", _as_lines(points))
            _write_lines(projector / "labels.tsv", lines)
            write_atomically(projector / "thumbnails.png", partial(save_png, self._sprite()))
            write_atomically(folder / "projector_config.pbtxt", _config())

    def _check(self, trainer: Trainer) -> None:
        self._board_of(trainer)
        count, most = self._count(), (LARGEST_SPRITE // THUMBNAIL) ** 2
        if count > most:
            raise ValueError(
                f"samples must hold at most {most} images and texts, got {count}. Pass fewer."
            )

    def _count(self) -> int:
        return len(self.samples.images) + len(self.samples.captions)

    def _labels(self, image_groups: Tensor, text_groups: Tensor) -> list[str]:
        """Return a line for each image, labelled with its first caption, and for each text."""
        captions = [" ".join(caption.split()) for caption in self.samples.captions]
        labels = dict(reversed([*zip(text_groups.tolist(), captions, strict=True)]))
        of_images = [f"{labels.get(group, '-')}\timage\t{group}" for group in image_groups.tolist()]
        pairs = zip(captions, text_groups.tolist(), strict=True)
        return [*of_images, *(f"{caption}\ttext\t{group}" for caption, group in pairs)]

    def _sprite(self) -> Tensor:
        # The projector expects a square sprite, so empty rows are kept.
        columns = math.isqrt(self._count() - 1) + 1
        texts = torch.tensor(TEXT_COLOR, dtype=torch.uint8)[None, :, None, None]
        texts = texts.expand(len(self.samples.captions), -1, THUMBNAIL, THUMBNAIL)
        images = thumbnails(self.samples.images, THUMBNAIL)
        return image_grid(torch.cat([images, texts]), columns, gap=0, rows=columns)


def _config() -> str:
    from tensorboard.plugins.projector.projector_config_pb2 import (  # noqa: PLC0415
        ProjectorConfig,
    )

    config = ProjectorConfig()
    embedding = config.embeddings.add(tensor_name="images and texts")
    embedding.tensor_path = "projector/features.tsv"
    embedding.metadata_path = "projector/labels.tsv"
    embedding.sprite.image_path = "projector/thumbnails.png"
    embedding.sprite.single_image_dim.extend([THUMBNAIL, THUMBNAIL])
    return str(config)  # the text format that the projector reads


def _as_lines(points: Tensor) -> list[str]:
    return ["\t".join(f"{value:.5g}" for value in row) for row in points.tolist()]


def _write_lines(path: Path, lines: list[str]) -> None:
    write_atomically(path, "\n".join(lines) + "\n")
