"""A gallery of retrieval results for a few fixed samples, over the course of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
import torch
from ignite.engine import Events
from torch import Tensor

from diptych.engine.checks import whole_number
from diptych.engine.distributed.collectives import rank
from diptych.engine.trainer import Trainer
from diptych.handlers.cadence import call_every, check_every
from diptych.handlers.evaluation.retrieval_ranks import TIE
from diptych.handlers.extras import check_extra
from diptych.handlers.pictures.board_handler import VISUAL, BoardHandler
from diptych.handlers.pictures.drawing import QueryResults, RetrievedItem, draw_results, heat_map
from diptych.handlers.pictures.pair_samples import PairFeatures, PairSamples

IMAGE_TO_TEXT, TEXT_TO_IMAGE = "image_to_text", "text_to_image"
MOST_GROUPS = 96
"""The largest number of groups in the similarity matrix."""

FoundRow = tuple[int, int | None, list[tuple[int, bool]]]
"""The index of a query, the rank of its best match, and its results: index, and if it matches."""


@attrs.define(eq=False)
class RetrievalGallery(BoardHandler):
    """Shows queries with their best results, and the similarity matrix, in TensorBoard.

    - Images: `visual/<prefix>/text_to_image` and `visual/<prefix>/image_to_text` show, for each
      query, the rank of its best match and its `k` best results, with matches in green.
      `visual/<prefix>/similarity` has a row for an image and a column for a text of each group, at
      most 96, in the order of the groups; dark is 0 or less, light is 1. The diagonal holds the
      matches.
    - Text: `visual/<prefix>/image_to_text` shows the same results as a list.

    `HistoryPlots` shows the last results too, in `report.html`.

    Ranks are among these samples only, so they are better than those on a full data set.
    TensorBoard keeps ten pictures of a tag by default; `--samples_per_plugin images=100` keeps
    more.

    Event: `STARTED` of a new run; `EPOCH_COMPLETED`, or every `every` iterations. Draws on rank 0
        only, while the other ranks wait at their next collective.
    Cost: a forward pass of the samples, their similarities, and about 150 ms for the pictures,
        which take 100 to 200 kB of disk.

    Args:
        samples: the samples to show.
        every: "epoch", or iterations between two drawings.
        k: results of a query.
        queries: the number of queries in each direction, evenly_spaced evenly over the samples.
        prefix: of the tags.
        board: where to draw; None: the attached `TensorBoard`. A board that is not attached is
            attached with this handler.

    Raises:
        ValueError: if an argument is out of range; when the run starts, if there is no board.
        ImportError: if the extra `images` is not installed.
        BatchError: while running, if the numbers of pictures and of features differ.
    """

    samples: PairSamples = attrs.field(validator=attrs.validators.instance_of(PairSamples))
    every: int | Literal["epoch"] = attrs.field(
        default="epoch", validator=check_every, kw_only=True
    )
    k: int = attrs.field(default=5, validator=whole_number(), kw_only=True)
    queries: int = attrs.field(default=8, validator=whole_number(), kw_only=True)
    prefix: str = attrs.field(default="gallery", kw_only=True)
    _step: int = attrs.field(default=0, init=False, repr=False)
    _found: dict[str, list[FoundRow]] = attrs.field(factory=dict, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        check_extra("images", "PIL", needed_by="RetrievalGallery")

    @property
    def role(self) -> str:
        """The prefix of the tags."""
        return self.prefix

    def listen(self, trainer: Trainer) -> None:
        """Draw on the trainer's events."""
        trainer.add_event_handler(Events.STARTED, self._start)
        call_every(trainer, self.every, self.draw)

    def draw(self, trainer: Trainer) -> None:
        """Draw the current results."""
        features, step = self.samples.features(trainer), trainer.state.iteration
        if rank() != 0:
            return
        matches = features.image_groups[:, None] == features.text_groups
        similarity = features.images.double() @ features.texts.double().T
        to_text, to_image = IMAGE_TO_TEXT, TEXT_TO_IMAGE
        self._step = step
        self._found = {
            to_text: self._best(similarity, matches),
            to_image: self._best(similarity.T, matches.T),
        }
        results, tag = self.results, f"{VISUAL}/{self.prefix}"
        matrix = heat_map(similarity_of_groups(features))
        board = self._board_of(trainer)
        with self.tolerated(lost=1), board.open_writer() as writer:
            writer.add_image(f"{tag}/{to_text}", draw_results(results[to_text]), step)
            writer.add_image(f"{tag}/{to_image}", draw_results(results[to_image]), step)
            writer.add_image(f"{tag}/similarity", matrix, step)
            writer.add_text(f"{tag}/{to_text}", _as_list(results[to_text]), step)

    @property
    def step(self) -> int:
        """The iteration of the last drawing."""
        return self._step

    @property
    def results(self) -> dict[str, list[QueryResults]]:
        """The queries and results of the last drawing, by direction; empty before the first."""
        images, captions = list(self.samples.images), list(self.samples.captions)
        sides = {IMAGE_TO_TEXT: (images, captions), TEXT_TO_IMAGE: (captions, images)}
        return {
            direction: [
                QueryResults(
                    sides[direction][0][query],
                    place,
                    [RetrievedItem(sides[direction][1][i], match) for i, match in best],
                )
                for query, place, best in rows
            ]
            for direction, rows in self._found.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the results of the last drawing, as indices of the samples."""
        sizes = [len(self.samples.images), len(self.samples.captions)]
        return {"step": self._step, "sizes": sizes, "found": dict(self._found)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state that `state_dict` returned; one of other samples is dropped."""
        sizes = [len(self.samples.images), len(self.samples.captions)]
        fits = list(state_dict["sizes"]) == sizes
        self._step = state_dict["step"] if fits else 0
        self._found = dict(state_dict["found"]) if fits else {}

    def _start(self, trainer: Trainer) -> None:
        self._board_of(trainer)
        if trainer.state.iteration == 0:
            self.draw(trainer)

    def _best(self, similarity: Tensor, matches: Tensor) -> list[FoundRow]:
        """Return the best results of evenly spaced queries; they are the rows."""
        chosen = evenly_spaced(len(similarity), self.queries)
        ranks = ranks_of_best(similarity[chosen], matches[chosen])
        best = similarity[chosen].topk(min(self.k, similarity.shape[1])).indices
        return [
            (query, place, [(i, bool(matches[query, i])) for i in indices])
            for query, place, indices in zip(chosen, ranks, best.tolist(), strict=True)
        ]


def _as_list(rows: Sequence[QueryResults]) -> str:
    """Return results as a numbered list: TensorBoard breaks words in the columns of a table."""
    lines = []
    for number, row in enumerate(rows, start=1):
        texts = [f"**{r.content}**" if r.matches else str(r.content) for r in row.results]
        found = "no match" if row.rank is None else f"rank {row.rank}"
        lines.append(f"{number}. {found}: {' | '.join(' '.join(t.split()) for t in texts)}")
    return "\n".join(lines)


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` evenly spaced indices below `count`."""
    wanted = min(count, wanted)
    return [index * count // wanted for index in range(wanted)]


def ranks_of_best(similarity: Tensor, matches: Tensor) -> list[int | None]:
    """Return the rank of each query's best match, from 1; None for a query without a match.

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
    """Return cosine similarities [G, G] of the first image and first text of each group.

    Groups with only one side are left out. The groups are in order; of more than 96, evenly spaced
    ones are picked.
    """
    first_image = _first_indices(features.image_groups)
    first_text = _first_indices(features.text_groups)
    groups = sorted(first_image.keys() & first_text.keys())
    groups = [groups[index] for index in evenly_spaced(len(groups), MOST_GROUPS)]
    images = features.images[[first_image[group] for group in groups]]
    return images @ features.texts[[first_text[group] for group in groups]].T


def _first_indices(groups: Tensor) -> dict[int, int]:
    numbers = groups.tolist()
    return {group: index for index, group in reversed(list(enumerate(numbers)))}
