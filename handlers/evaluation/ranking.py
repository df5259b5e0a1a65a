"""Ranks of matches: one product of all similarities, made and counted tile by tile."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diptych.engine.distributed.collectives import rank, sum_over_ranks, world_size
from diptych.engine.errors import BatchError

TIE = 1e-6
"""Cosine similarities closer than this are a tie: products of float32 unit vectors are as exact."""

COPY = 1e-4
"""Rows of a group whose cosine similarity is above 1 - COPY show one item twice: half precision and
other batch sizes change the features of one image by less, other images by far more."""

ABSENT = torch.iinfo(torch.int64).max
"""Stands for the rank of a match that a query does not have."""

STRIP = (64, 1024)
"""Rows and columns of a tile that looks at one group after the other: few rows have few groups."""


class MatchRanks(NamedTuple):
    """Where the matches of queries stand in their results.

    Attributes:
        ranks: int64 [J, Q], from 1: of each query's j-th best match, ABSENT where it has fewer.
        matches: int64 [Q], how many each query has, >= 1.
    """

    ranks: Tensor
    matches: Tensor


class Items(NamedTuple):
    """One side's items in the order of their groups.

    Attributes:
        features: float32 [N, D], of unit length.
        groups: int64 [N], ascending.
    """

    features: Tensor
    groups: Tensor

    def without_copies(self) -> Items:
        """Return the items without those that show an earlier one of their group again."""
        if bool((self.groups.diff() > 0).all()):
            return self
        height, width = STRIP
        copy = torch.zeros_like(self.groups, dtype=torch.bool)
        place = torch.arange(len(copy), device=copy.device)
        starts = torch.searchsorted(self.groups, self.groups[::height].contiguous()).tolist()
        for own, start in zip(_tiles(len(copy), height), starts, strict=True):
            rows = self.features[own].double()  # which no faster, coarser product replaces
            for others in _tiles(own.stop, width, start):
                similar = rows @ self.features[others].double().T > 1 - COPY
                similar &= self.groups[own, None] == self.groups[others]
                similar &= place[others] < place[own, None]
                copy[own] |= similar.any(1)
        return Items(self.features[~copy], self.groups[~copy]) if copy.any() else self


def match_ranks(images: Items, texts: Items, depth: int) -> tuple[MatchRanks, MatchRanks]:
    """Return the ranks of the best `depth` matches of every image and of every text.

    Args:
        images: the images.
        texts: the texts.
        depth: matches of a query to rank, >= 1.

    Raises:
        BatchError: if no image matches any text.
    """
    best_texts, best_images = (
        _best_matches(images, texts, depth),
        _best_matches(texts, images, depth),
    )
    # What is closer than this counts as better.
    bounds = best_texts.sub_(TIE), best_images.sub_(TIE)
    behind = _count_behind(images, texts, *bounds)
    return (
        _as_ranks(behind[0], _count_matches(images, texts), len(texts.groups)),
        _as_ranks(behind[1], _count_matches(texts, images), len(images.groups)),
    )


def _count_behind(
    images: Items, texts: Items, image_bounds: Tensor, text_bounds: Tensor
) -> tuple[Tensor, Tensor]:
    """Count, for every query and bound, the results below it; matches count as below.

    One pass over the tiles of the product serves both directions. "Not below" rather than "above"
    is what makes similarities that are not a number count as better.
    """
    height, width = _tile_shape(images.features)
    behind = tuple(torch.zeros_like(b, dtype=torch.int64) for b in (image_bounds, text_bounds))
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
            for bound, count in zip(image_bounds, behind[0], strict=True):
                count[own] += torch.lt(tile, bound[own, None], out=below).sum(1).long()
            for bound, count in zip(text_bounds, behind[1], strict=True):
                count[others] += torch.lt(tile, bound[others], out=below).sum(0).long()
    return sum_over_ranks(behind[0]), sum_over_ranks(behind[1])


def _best_matches(queries: Items, gallery: Items, depth: int) -> Tensor:
    """Return the similarities of each query's best matches, [J, Q], +inf where it has fewer."""
    height, width = STRIP
    depth = min(depth, int(_count_matches(queries, gallery).max()))
    if depth == 0:
        raise BatchError(
            f"no image matches any text: none of {len(queries.groups)} groups on one side is among "
            f"the {len(gallery.groups)} on the other"
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
    """Return how many items of the gallery match each query, int64 [Q]."""
    after = torch.searchsorted(gallery.groups, queries.groups, right=True)
    return after - torch.searchsorted(gallery.groups, queries.groups)


def _as_ranks(behind: Tensor, matches: Tensor, results: int) -> MatchRanks:
    """Return ranks from counts of what is behind: all better results, and the better matches."""
    place = torch.arange(len(behind), device=behind.device)[:, None]
    # Behind a match that is no number is nothing, not even the other matches: cut to the last rank.
    ahead = torch.minimum(results - behind, results - matches)
    ranks = torch.where(place < matches, ahead + place + 1, ABSENT)
    return MatchRanks(ranks[:, matches > 0], matches[matches > 0])


def _spans(rows: Items, columns: Items, height: int) -> list[slice]:
    """Return, for each tile of rows, the columns that hold all their matches."""
    groups = rows.groups
    last = torch.cat([groups[height - 1 :: height], groups[-1:]])[: -(-len(groups) // height)]
    starts = torch.searchsorted(columns.groups, groups[::height].contiguous())
    stops = torch.searchsorted(columns.groups, last, right=True)
    return [slice(*pair) for pair in zip(starts.tolist(), stops.tolist(), strict=True)]


def _tiles(stop: int, size: int, start: int = 0) -> list[slice]:
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def _tile_shape(features: Tensor) -> tuple[int, int]:
    """Return rows and columns of a tile: what the cache holds, or what keeps a device busy."""
    return (512, 512) if features.device.type == "cpu" else (4096, 8192)
