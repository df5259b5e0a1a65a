"""What a model retrieves for a few fixed samples, as pictures that one slides through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import attrs
import torch
from ignite.engine import Events
from torch import Tensor

from diptych.engine.checks import whole_number
from diptych.engine.distributed.collectives import rank
from diptych.engine.distributed.dtensor import has_shards
from diptych.engine.trainer import Trainer
from diptych.handlers.cadence import call_every, check_every
from diptych.handlers.evaluation.ranking import TIE
from diptych.handlers.pictures.drawing import Result, Row, check_can_draw, heat_map, sheet
from diptych.handlers.pictures.pair_samples import PairFeatures, PairSamples
from diptych.handlers.sinks.run_texts import markdown_table
from diptych.handlers.sinks.tensorboard import TensorBoard, attach_board_of, board_of

MATRIX = 96
"""Groups in the similarity matrix, at most."""


@attrs.define(eq=False)
class RetrievalGallery:
    """Shows queries with their best results in TensorBoard, and the matrix of similarities.

    - Images: `<prefix>/text_to_image` and `<prefix>/image_to_text`: for each query the rank of its
      best match and its `k` best results, those that match in green;
      `<prefix>/similarity`: an image (line) and a text (column) of each of at most 96 groups, in
      the order of the groups, dark at 0 and below, light at 1. What matches is the diagonal.
    - Text: `<prefix>/image_to_text` as a table.

    A rank is that among these samples: a small gallery flatters. TensorBoard keeps ten pictures of
    a tag by itself; `--samples_per_plugin images=100` shows more.

    Event: `STARTED` of a new run, `EPOCH_COMPLETED` or every so many iterations. Rank 0 alone
        draws, while the others wait at their next exchange.
    Cost: the model's forward pass of the samples, their similarities, and some 150 ms for the
        pictures, which take 100 to 200 kB of disk.

    Args:
        samples: a `PairSamples`.
        every: "epoch", or iterations between two looks.
        k: results of a query.
        queries: how many queries of each direction, spread evenly over the samples.
        prefix: of the tags.
        board: where to draw; None: the `TensorBoard` that is attached. One that is not attached is
            attached with this handler.

    Raises:
        ValueError: if an argument is out of range; when the run starts, if there is no board.
        ImportError: if the extra `images` is not installed.
        BatchError: while running: if the samples' pictures are not as many as their features.
    """

    samples: PairSamples = attrs.field(validator=attrs.validators.instance_of(PairSamples))
    every: int | Literal["epoch"] = attrs.field(
        default="epoch", validator=check_every, kw_only=True
    )
    k: int = attrs.field(default=5, validator=whole_number(), kw_only=True)
    queries: int = attrs.field(default=8, validator=whole_number(), kw_only=True)
    prefix: str = attrs.field(default="gallery", kw_only=True)
    board: TensorBoard | None = attrs.field(default=None, kw_only=True)

    def __attrs_post_init__(self) -> None:
        check_can_draw()

    def attach(self, trainer: Trainer) -> None:
        """Draw on the trainer's events."""
        attach_board_of(self, trainer)
        if rank() != 0 and not has_shards(trainer.model):  # which all ranks run together
            return
        trainer.add_event_handler(Events.STARTED, self._start)
        call_every(trainer, self.every, self.draw)

    def draw(self, trainer: Trainer) -> None:
        """Draw the pictures of now."""
        features, step = self.samples.features(trainer), trainer.state.iteration
        if rank() != 0:
            return
        writer = board_of(trainer, self).writer
        images, captions = list(self.samples.images), list(self.samples.captions)
        matches = features.image_groups[:, None] == features.text_groups
        similarity = features.images @ features.texts.T
        to_text = self._rows(similarity, matches, images, captions)
        to_image = self._rows(similarity.T, matches.T, captions, images)
        writer.add_image(f"{self.prefix}/image_to_text", sheet(to_text), step)
        writer.add_image(f"{self.prefix}/text_to_image", sheet(to_image), step)
        matrix = heat_map(similarity_of_groups(features), 0.0, 1.0)
        writer.add_image(f"{self.prefix}/similarity", matrix, step)
        writer.add_text(f"{self.prefix}/image_to_text", self._table(to_text), step)

    def _start(self, trainer: Trainer) -> None:
        board_of(trainer, self)
        if trainer.state.iteration == 0:
            self.draw(trainer)

    def _rows(
        self,
        similarity: Tensor,
        matches: Tensor,
        queries: Sequence[Tensor | str],
        results: Sequence[Tensor | str],
    ) -> list[Row]:
        chosen = spread(len(queries), self.queries)
        ranks = ranks_of_best(similarity[chosen], matches[chosen])
        best = similarity[chosen].topk(min(self.k, len(results))).indices
        return [
            Row(
                queries[query],
                place,
                [Result(results[i], bool(matches[query, i])) for i in indices],
            )
            for query, place, indices in zip(chosen, ranks, best.tolist(), strict=True)
        ]

    def _table(self, rows: Sequence[Row]) -> str:
        head = ["query", *(str(place + 1) for place in range(len(rows[0].results)))]
        lines = []
        for number, row in enumerate(rows):
            texts = [f"**{r.content}**" if r.right else str(r.content) for r in row.results]
            # In one cell: TensorBoard breaks the lines of narrow columns inside words.
            found = "no match" if row.rank is None else f"rank {row.rank}"
            lines.append([f"{number + 1}, {found}", *texts])
        return markdown_table(head, lines)


def spread(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` of the numbers below `count`, evenly spread."""
    wanted = min(count, wanted)
    return [index * count // wanted for index in range(wanted)]


def ranks_of_best(similarity: Tensor, matches: Tensor) -> list[int | None]:
    """Return the rank of each query's best match, from 1; None where it has none.

    Ties count against the match, as in `RetrievalRecall`.

    Args:
        similarity: [Q, N].
        matches: bool [Q, N].
    """
    best = similarity.masked_fill(~matches, -torch.inf).amax(dim=1, keepdim=True)
    better = ~matches & ~(similarity < best - TIE)
    ranks, found = (1 + better.sum(dim=1)).tolist(), matches.any(dim=1).tolist()
    return [place if any_match else None for place, any_match in zip(ranks, found, strict=True)]


def similarity_of_groups(features: PairFeatures) -> Tensor:
    """Return cosine similarities [G, G]: the first image and first text of groups with both.

    In the order of the groups, at most 96 of them, evenly spread.
    """
    first_image = _firsts(features.image_groups)
    first_text = _firsts(features.text_groups)
    groups = sorted(first_image.keys() & first_text.keys())
    groups = [groups[index] for index in spread(len(groups), MATRIX)]
    images = features.images[[first_image[group] for group in groups]]
    return images @ features.texts[[first_text[group] for group in groups]].T


def _firsts(groups: Tensor) -> dict[int, int]:
    numbers = groups.tolist()
    return {group: index for index, group in reversed(list(enumerate(numbers)))}
