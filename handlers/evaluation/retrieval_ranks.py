"""Ranks of the matches among retrieval results, counted from similarities in tiles."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diptych.engine.distributed.collectives import all_reduce_sum, rank, world_size
from diptych.engine.errors import BatchError

TIE = 1e-6
"""Cosine similarities closer than this are a tie: the precision of products of float32 vectors."""

COPY = 1e-4
"""Two rows of a group are copies of one item if their cosine similarity is above 1 - COPY. Half
precision and other batch sizes change the features of one image by less; other images differ by far
more."""

ABSENT = torch.iinfo(torch.int64).max
"""The rank of a match that a query does not have."""

STRIP = (64, 1024)
"""Rows and columns of a tile within groups: with few rows, it holds few groups."""


class MatchRanks(NamedTuple):
    """The ranks of the queries' matches among their results.

    Attributes:
        ranks: the rank of each query's j-th best match, int64 [J, Q], from 1; ABSENT if it has
            fewer.
        matches: the number of matches of each query, int64 [Q], >= 1.
    """

    ranks: Tensor
    matches: Tensor


class Items(NamedTuple):
    """The items of one side, sorted by group.

    Attributes:
        features: float32 [N, D], of unit length.
        groups: int64 [N], ascending.
    """

    features: Tensor
    groups: Tensor

    def without_copies(self) -> Items:
        """Return the items without copies of an earlier item of their group."""
        if bool((self.groups.diff() > 0).all()):
            return self
        height, width = STRIP
        copy = torch.zeros_like(self.groups, dtype=torch.bool)
        position = torch.arange(len(copy), device=copy.device)
        spans = _spans(self, self, height)
        for own, span in zip(_tiles(len(copy), height), spans, strict=True):
            rows = self.features[own].double()  # TF32 would be too coarse, and exists for float32
            for others in _tiles(own.stop, width, span.start):
                similar = rows @ self.features[others].double().T > 1 - COPY
                similar &= self.groups[own, None] == self.groups[others]
                similar &= position[others] < position[own, None]
                copy[own] |= similar.any(1)
        return Items(self.features[~copy], self.groups[~copy]) if copy.any() else self


def match_ranks(images: Items, texts: Items, depth: int) -> tuple[MatchRanks, MatchRanks]:
    """Return the ranks of the best `depth` matches of each image and of each text.

    Args:
        images: the items of one side.
        texts: the items of the other side.
        depth: the number of matches of a query to rank, >= 1.

    Raises:
        BatchError: if no image matches any text.
    """
    # Results above these bounds rank before the match.
    image_bounds = _best_matches(images, texts, depth).sub_(TIE)
    text_bounds = _best_matches(texts, images, depth).sub_(TIE)
    below_images, below_texts = _count_below(images, texts, image_bounds, text_bounds)
    return (
        _as_ranks(below_images, _count_matches(images, texts), len(texts.groups)),
        _as_ranks(below_texts, _count_matches(texts, images), len(images.groups)),
    )


def _count_below(
    images: Items, texts: Items, image_bounds: Tensor, text_bounds: Tensor
) -> tuple[Tensor, Tensor]:
    """Count the results below each query's bounds; matches count as below.

    One pass over the tiles of the product serves both directions. Results below are counted, not
    those above, so that a NaN similarity counts as a better result.
    """
    height, width = _tile_shape(images.features)
    counts = tuple(torch.zeros_like(b, dtype=torch.int64) for b in (image_bounds, text_bounds))
    scores, flags = images.features.new_empty(2, height * width)
    rows = _tiles(len(images.groups), height)
    spans = _spans(images, texts, height)
    for own, span in list(zip(rows, spans, strict=True))[rank() :: world_size()]:
        for others in _tiles(len(texts.groups), width):
            shape = own.stop - own.start, others.stop - others.start
            tile, below = (b[: shape[0] * shape[1]].view(shape) for b in (scores, flags))
            torch.mm(images.features[own], texts.features[others].T, out=tile)
            start, stop = max(others.start, span.start), min(others.stop, span.stop)
            if start < stop:
                matches = images.groups[own, None] == texts.groups[start:stop]
                part = tile[:, start - others.start : stop - others.start]
                part.masked_fill_(matches, -torch.inf)
            for bound, count in zip(image_bounds, counts[0], strict=True):
                count[own] += torch.lt(tile, bound[own, None], out=below).sum(1).long()
            for bound, count in zip(text_bounds, counts[1], strict=True):
                count[others] += torch.lt(tile, bound[others], out=below).sum(0).long()
    return all_reduce_sum(counts[0]), all_reduce_sum(counts[1])


def _best_matches(queries: Items, gallery: Items, depth: int) -> Tensor:
    """Return the similarities of each query's best matches, [J, Q]; +inf if it has fewer."""
    height, width = STRIP
    depth = min(depth, int(_count_matches(queries, gallery).max()))
    if depth == 0:
        raise BatchError(
            "groups must occur on both sides, got no image that matches any text: none of "
            f"{len(queries.groups)} ids on one side is among the {len(gallery.groups)} on the "
            "other. Use the same ids for images and texts"
        )
    found = queries.features.new_full((len(queries.groups), depth), -torch.inf)
    rows = _tiles(len(queries.groups), height)
    for own, span in zip(rows, _spans(queries, gallery, height), strict=True):
        for others in _tiles(span.stop, width, span.start):
            scores = queries.features[own] @ gallery.features[others].T
            other = queries.groups[own, None] != gallery.groups[others]
            candidates = torch.cat([found[own], scores.masked_fill_(other, -torch.inf)], dim=1)
            found[own] = candidates.topk(depth, dim=1).values
    return found.masked_fill_(found == -torch.inf, torch.inf).T.contiguous()


def _count_matches(queries: Items, gallery: Items) -> Tensor:
    """Return the number of items of the gallery that match each query, int64 [Q]."""
    after = torch.searchsorted(gallery.groups, queries.groups, right=True)
    return after - torch.searchsorted(gallery.groups, queries.groups)


def _as_ranks(below: Tensor, matches: Tensor, results: int) -> MatchRanks:
    """Return the ranks of matches that have `below` of the results below their bounds."""
    nth = torch.arange(len(below), device=below.device)[:, None]
    # A match ranks after the better results that are no match, and after the better matches. A NaN
    # score ranks last: nothing is below its bound, not even the other matches, hence the minimum.
    ahead = torch.minimum(results - below, results - matches)
    ranks = torch.where(nth < matches, ahead + nth + 1, ABSENT)
    return MatchRanks(ranks[:, matches > 0], matches[matches > 0])


def _spans(rows: Items, columns: Items, height: int) -> list[slice]:
    """Return the columns that hold all matches of a tile of rows, for each tile."""
    groups = rows.groups
    last = torch.cat([groups[height - 1 :: height], groups[-1:]])[: -(-len(groups) // height)]
    starts = torch.searchsorted(columns.groups, groups[::height].contiguous())
    stops = torch.searchsorted(columns.groups, last, right=True)
    return [slice(*pair) for pair in zip(starts.tolist(), stops.tolist(), strict=True)]


def _tiles(stop: int, size: int, start: int = 0) -> list[slice]:
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def _tile_shape(features: Tensor) -> tuple[int, int]:
    """Return the rows and columns of a tile: one that fits the cache, or keeps a GPU busy."""
    return (512, 512) if features.device.type == "cpu" else (4096, 8192)
