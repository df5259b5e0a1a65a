"""Ranks of the matches among retrieval results, counted from similarities in tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.engine.distributed.collectives import all_reduce_sum, rank, world_size
from diptych.engine.errors import BatchError

TIE = 1e-12
"""Cosine similarities closer than this are a tie: the precision of products of float64 vectors. In
float32, all images of a model whose features lie in a narrow cone would be as good as tied."""

ABSENT = torch.iinfo(torch.int64).max
"""The rank of a match that a query does not have."""

STRIP = (64, 1024)
"""Rows and columns of a tile within groups: with few rows, it holds few groups."""

FEW = 32
"""Up to this many matches, comparing with each of them is faster than sorting all results."""

Relevance = Callable[[Tensor, Tensor], Tensor]
"""A function of image and text ids, [N] and [M], that returns grades >= 0 [N, M]."""


class Items(NamedTuple):
    """The items of one side, sorted by group and then by id.

    Attributes:
        features: float32 [N, D], of any length.
        groups: int64 [N], ascending.
        ids: int64 [N].
    """

    features: Tensor
    groups: Tensor
    ids: Tensor

    def unit(self, rows: slice) -> Tensor:
        """Return the unit features of some rows, in float64."""
        return F.normalize(self.features[rows].double(), dim=1)

    def without_copies(self) -> Items:
        """Return the items without the copies of an earlier one, which have its id.

        Raises:
            BatchError: if copies are in different groups.
        """
        first = torch.ones_like(self.groups, dtype=torch.bool)
        first[1:] = (self.groups.diff() != 0) | (self.ids.diff() != 0)
        ids, counts = self.ids[first].unique(return_counts=True)
        if bool((counts > 1).any()):
            raise BatchError(
                "the rows of one image_id or caption_id must be in one group, got id "
                f"{int(ids[counts > 1][0])} in several. Pass groups that agree, or state which "
                "images and texts match with relevance="
            )
        return self if bool(first.all()) else Items(*(rows[first] for rows in self))


class MatchRanks(NamedTuple):
    """The ranks of the queries' matches among their results; only queries with a match.

    Attributes:
        ranks: the rank of each query's j-th best match, int64 [J, Q], from 1; ABSENT if it has
            fewer.
        matches: the number of matches of each query, int64 [Q], >= 1.
        total: the sum of the grades of all matches, float64 [Q].
        grades: the grades of the ranked matches, float64 [J, Q]; None: 1.
        ideal: the largest grades of each query, descending, float64 [J, Q]; None: 1.
        results: the number of results of a query.
    """

    ranks: Tensor
    matches: Tensor
    total: Tensor
    grades: Tensor | None
    ideal: Tensor | None
    results: int


class Direction(NamedTuple):
    """Queries of one side and their results of the other, with the grades of the pairs.

    Attributes:
        queries: the items whose results are ranked.
        gallery: the results.
        relevance: the grades by ids; a match has a grade above 0. None: items of one group match,
            with a grade of 1.
        reverse: whether the texts are the queries.
    """

    queries: Items
    gallery: Items
    relevance: Relevance | None
    reverse: bool = False

    def grades(self, own: slice, others: slice) -> Tensor:
        """Return the grades of a tile of pairs; 0 (or False) if they do not match.

        Raises:
            BatchError: if the relevance returns another shape, a negative number or NaN.
        """
        if self.relevance is None:
            return self.queries.groups[own, None] == self.gallery.groups[others]
        ids = (self.queries.ids[own], self.gallery.ids[others])
        images, texts = ids[::-1] if self.reverse else ids
        grades = self.relevance(images, texts)
        if grades.shape != (len(images), len(texts)) or not bool((grades >= 0).all()):
            raise BatchError(
                f"relevance must return a tensor [{len(images)}, {len(texts)}] of grades >= 0, got "
                f"shape {tuple(grades.shape)} and at least {grades.min().item():g}. Return the "
                "grade of each image_id with each caption_id"
            )
        return grades.T if self.reverse else grades

    def tiles(self, height: int) -> list[tuple[slice, slice]]:
        """Return this rank's tiles of queries, and the results among which their matches are."""
        groups, gallery = self.queries.groups, self.gallery.groups
        rows = _tiles(len(groups), height)
        spans = [slice(0, len(gallery))] * len(rows)
        if self.relevance is None:
            last = torch.cat([groups[height - 1 :: height], groups[-1:]])[: len(rows)]
            starts = torch.searchsorted(gallery, groups[::height].contiguous())
            stops = torch.searchsorted(gallery, last, right=True)
            spans = [slice(*ends) for ends in zip(starts.tolist(), stops.tolist(), strict=True)]
        return list(zip(rows, spans, strict=True))[rank() :: world_size()]

    def count_matches(self) -> tuple[Tensor, Tensor]:
        """Return the number of matches of each query, int64 [Q], and the sum of their grades."""
        groups, gallery = self.queries.groups, self.gallery.groups
        if self.relevance is None:
            after = torch.searchsorted(gallery, groups, right=True)
            counts = after - torch.searchsorted(gallery, groups)
            return counts, counts.double()
        counts, total = torch.zeros_like(groups), torch.zeros_like(groups, dtype=torch.float64)
        height, width = STRIP
        for own, span in self.tiles(height):
            for others in _tiles(span.stop, width, span.start):
                grades = self.grades(own, others)
                counts[own] += (grades > 0).sum(1)
                total[own] += grades.double().sum(1)
        return all_reduce_sum(counts), all_reduce_sum(total)


class BestMatches(NamedTuple):
    """The best matches of each query, best first, float64 [J, Q].

    Attributes:
        bounds: results that are not below them rank before the match; descending, -inf for an
            absent match.
        grades: the grades of the matches; None: 1.
        ideal: the largest grades; None: 1.
    """

    bounds: Tensor
    grades: Tensor | None
    ideal: Tensor | None


def match_ranks(
    images: Items, texts: Items, depth: int | None, relevance: Relevance | None = None
) -> tuple[Iterator[MatchRanks], Iterator[MatchRanks]]:
    """Return the ranks of the best `depth` matches of each image and of each text.

    Each direction is an iterator of parts: one part with all queries, the same on all ranks; or, if
    all matches are asked for and there are many, tiles of queries, of which each rank has its own.
    A depth of None ranks all matches. Without grades by ids, items of one group match.

    Raises:
        BatchError: if no image matches any text.
    """
    sides = (
        Direction(images, texts, relevance),
        Direction(texts, images, relevance, reverse=True),
    )
    counted = [side.count_matches() for side in sides]
    _check_match(sides[0], counted[0][0])
    most = [int(counts.max()) for counts, _ in counted]
    if depth is None and max(most) > FEW:
        first, second = map(_sorted_ranks, sides)
        return first, second
    best = [
        _best_matches(side, own if depth is None else min(depth, own))
        for side, own in zip(sides, most, strict=True)
    ]
    below = _count_below(sides[0], best[0].bounds, best[1].bounds)
    first, second = (iter([one]) for one in map(_as_ranks, sides, counted, best, below))
    return first, second


def _check_match(direction: Direction, counts: Tensor) -> None:
    if bool(counts.any()):
        return
    both = len(counts), len(direction.gallery.groups)
    raise BatchError(
        "groups must occur on both sides, got no image that matches any text: none of "
        f"{both[0]} ids on one side is among the {both[1]} on the other. Use the same ids for "
        "images and texts"
        if direction.relevance is None
        else f"relevance must be above 0 for some pair, got 0 for all {both[0]} x {both[1]}"
    )


def _sorted_ranks(direction: Direction) -> Iterator[MatchRanks]:
    """Yield the ranks of all matches for this rank's tiles of queries; sort all their results."""
    gallery, results = direction.gallery, len(direction.gallery.groups)
    for own, _ in direction.tiles(STRIP[0]):
        queries = direction.queries.unit(own)
        tiles = _tiles(results, STRIP[1])
        scores = torch.cat([queries @ gallery.unit(others).T for others in tiles], dim=1)
        grades = direction.grades(own, slice(0, results)).double()
        # As in `_best_matches` and `_count_below`: a NaN ranks last as a match, first otherwise.
        lost = torch.where(grades > 0, -torch.inf, torch.inf)
        scores = torch.where(scores.isnan(), lost, scores - TIE * _handicap(grades))
        ordered = grades.gather(1, scores.argsort(1, descending=True))
        matches = (ordered > 0).sum(1)
        places = torch.arange(1, results + 1, device=ordered.device)
        ranks = torch.where(ordered > 0, places, ABSENT).sort(1).values[:, : int(matches.max())]
        at_rank = ordered.gather(1, (ranks - 1).clamp(max=results - 1)) * (ranks < ABSENT)
        ideal = grades.topk(ranks.shape[1]).values
        kept = matches > 0
        total = grades.sum(1)[kept]
        ranks, at_rank, ideal = (part[kept].T for part in (ranks, at_rank, ideal))
        yield MatchRanks(ranks, matches[kept], total, at_rank, ideal, results)


def _handicap(grades: Tensor) -> Tensor:
    """Return by how many ties matches rank later: of equal ones, a lower grade comes first."""
    return (grades > 0) + grades / (1 + grades)


def _count_below(
    direction: Direction, image_bounds: Tensor, text_bounds: Tensor
) -> tuple[Tensor, Tensor]:
    """Count the results below each query's bounds; matches count as below.

    One pass over the tiles of the product serves both directions. Results below are counted, not
    those above, so that a NaN similarity counts as a better result.
    """
    images, texts = direction.queries, direction.gallery
    height, width = _tile_shape(images.features)
    counts = tuple(torch.zeros_like(b, dtype=torch.int64) for b in (image_bounds, text_bounds))
    scores, flags = image_bounds.new_empty(2, height * width)
    for own, span in direction.tiles(height):
        queries = images.unit(own)
        for others in _tiles(len(texts.groups), width):
            shape = own.stop - own.start, others.stop - others.start
            tile, below = (b[: shape[0] * shape[1]].view(shape) for b in (scores, flags))
            torch.mm(queries, texts.unit(others).T, out=tile)
            start, stop = max(others.start, span.start), min(others.stop, span.stop)
            if start < stop:
                matches = direction.grades(own, slice(start, stop)) > 0
                part = tile[:, start - others.start : stop - others.start]
                part.masked_fill_(matches, -torch.inf)
            _add_below(tile, image_bounds[:, own], counts[0][:, own], below)
            _add_below(tile.T, text_bounds[:, others], counts[1][:, others], below.T)
    return all_reduce_sum(counts[0]), all_reduce_sum(counts[1])


def _add_below(tile: Tensor, bounds: Tensor, counts: Tensor, memory: Tensor) -> None:
    """Add the number of a query's similarities that are below each of its bounds.

    Similarities are [Q, N], bounds [J, Q] and counts int64 [J, Q]. The memory is overwritten.
    """
    for nth, bound in enumerate(bounds):
        counts[nth] += torch.lt(tile, bound[:, None], out=memory).sum(1).long()


def _best_matches(direction: Direction, depth: int) -> BestMatches:
    """Return the best `depth` matches of each query."""
    groups = direction.queries.groups
    found, grades, ideal = groups.new_zeros(3, len(groups), depth, dtype=torch.float64)
    for own, span in direction.tiles(STRIP[0]):
        found[own] = -torch.inf
        queries = direction.queries.unit(own)
        for others in _tiles(span.stop, STRIP[1], span.start):
            scores = queries @ direction.gallery.unit(others).T
            new = direction.grades(own, others).double()
            scores = scores.masked_fill((new == 0) | scores.isnan(), -torch.inf)
            ideal[own] = torch.cat([ideal[own], new], dim=1).topk(depth).values
            scores, new = torch.cat([found[own], scores], 1), torch.cat([grades[own], new], 1)
            order = (scores - TIE * _handicap(new)).topk(depth).indices
            found[own], grades[own] = scores.gather(1, order), new.gather(1, order)
    found, grades, ideal = (all_reduce_sum(rows).T for rows in (found, grades, ideal))
    bounds = (found - TIE).cummin(0).values.contiguous()
    is_graded = direction.relevance is not None
    return BestMatches(bounds, *((grades, ideal) if is_graded else (None, None)))


def _as_ranks(
    direction: Direction, counted: tuple[Tensor, Tensor], best: BestMatches, below: Tensor
) -> MatchRanks:
    """Return the ranks of matches that have `below` of the results below their bounds."""
    matches, total = counted
    results = len(direction.gallery.groups)
    nth = torch.arange(len(below), device=below.device)[:, None]
    # A match ranks after the better results that are no match, and after the better matches. A NaN
    # score ranks last: nothing is below its bound, not even the other matches, hence the minimum.
    ahead = torch.minimum(results - below, results - matches)
    ranks = torch.where(nth < matches, ahead + nth + 1, ABSENT)
    found = matches > 0
    grades, ideal = (part if part is None else part[:, found] for part in (best.grades, best.ideal))
    return MatchRanks(ranks[:, found], matches[found], total[found], grades, ideal, results)


def _tiles(stop: int, size: int, start: int = 0) -> list[slice]:
    return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]


def _tile_shape(features: Tensor) -> tuple[int, int]:
    """Return the rows and columns of a tile: one that fits the cache, or keeps a GPU busy."""
    return (512, 512) if features.device.type == "cpu" else (4096, 4096)
