"""Both sides' features in one space, with a picture at each point, in TensorBoard's projector."""

from __future__ import annotations

from pathlib import Path

import attrs
import torch
from ignite.engine import Events
from torch import Tensor

from diptych.engine.distributed.collectives import rank
from diptych.engine.distributed.dtensor import has_shards
from diptych.engine.trainer import Trainer
from diptych.handlers.pictures.drawing import check_can_draw, save_png, thumbnails, tiles
from diptych.handlers.pictures.pair_samples import PairSamples
from diptych.handlers.sinks.tensorboard import TensorBoard, attach_board_of, board_of

THUMBNAIL = 32
LARGEST_SPRITE = 8192
"""Pixels of a side: what a browser takes as one picture."""
TEXT_COLOUR = (44, 123, 182)


@attrs.define(eq=False)
class EmbeddingProjector:
    """Shows the samples' features in TensorBoard's tab "Projector", images and texts together.

    An image's point is its thumbnail, a text's a blue tile; each has its caption, side and group,
    to search and to colour by. The features are of unit length. The projector shows what it was
    given last; the files `projector/` and `projector_config.pbtxt` are replaced each time.

    Event: `COMPLETED`. Rank 0 alone writes.
    Cost: the model's forward pass of the samples, once. A sample takes some ten bytes of
        disk for each number of its features, and 2 kB for its thumbnail.

    Args:
        samples: a `PairSamples`.
        board: whose folder to write into; None: that of the `TensorBoard` that is attached. One
            that is not attached is attached with this handler.

    Raises:
        ValueError: when the run starts, if there is no board, or there are more samples than a
            picture of 8192 x 8192 holds.
        ImportError: if the extra `images` is not installed.
        BatchError: when the run ends, if the samples' pictures are not as many as their features.
    """

    samples: PairSamples = attrs.field(validator=attrs.validators.instance_of(PairSamples))
    board: TensorBoard | None = attrs.field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        check_can_draw()

    def attach(self, trainer: Trainer) -> None:
        """Write when the trainer has completed its run."""
        attach_board_of(self, trainer)
        if rank() == 0 or has_shards(trainer.model):  # which all ranks run together
            trainer.add_event_handler(Events.STARTED, self._check)
            trainer.add_event_handler(Events.COMPLETED, self.write)

    def write(self, trainer: Trainer) -> None:
        """Write the features of now."""
        features = self.samples.features(trainer)
        if rank() != 0:
            return
        folder = Path(board_of(trainer, self).directory)
        (folder / "projector").mkdir(parents=True, exist_ok=True)
        points = torch.cat([features.images, features.texts])
        _write_lines(folder / "projector" / "features.tsv", _as_lines(points))
        lines = ["label\tside\tgroup", *self._labels(features.image_groups, features.text_groups)]
        _write_lines(folder / "projector" / "labels.tsv", lines)
        sprite = self._sprite()
        save_png(sprite, folder / "projector" / "thumbnails.png")
        (folder / "projector_config.pbtxt").write_text(_config(), encoding="utf-8")

    def _check(self, trainer: Trainer) -> None:
        board_of(trainer, self)
        count, most = self._count(), (LARGEST_SPRITE // THUMBNAIL) ** 2
        if count > most:
            raise ValueError(f"samples must be at most {most} images and texts, got {count}")

    def _count(self) -> int:
        return len(self.samples.images) + len(self.samples.captions)

    def _labels(self, image_groups: Tensor, text_groups: Tensor) -> list[str]:
        """Return a line for each image, called by its first caption, and for each text."""
        captions = [" ".join(caption.split()) for caption in self.samples.captions]
        called = dict(reversed([*zip(text_groups.tolist(), captions, strict=True)]))
        of_images = [f"{called.get(group, '-')}\timage\t{group}" for group in image_groups.tolist()]
        pairs = zip(captions, text_groups.tolist(), strict=True)
        return [*of_images, *(f"{caption}\ttext\t{group}" for caption, group in pairs)]

    def _sprite(self) -> Tensor:
        # The projector takes the picture for a square of lines, each as long as the whole.
        columns = 1
        while columns**2 < self._count():
            columns += 1
        texts = torch.tensor(TEXT_COLOUR, dtype=torch.uint8)[None, :, None, None]
        texts = texts.expand(len(self.samples.captions), -1, THUMBNAIL, THUMBNAIL)
        images = thumbnails(self.samples.images, THUMBNAIL)
        return tiles(torch.cat([images, texts]), columns, gap=0, lines=columns)


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
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
