"""Retrieval metrics: recall@k, MRR, mAP and ranks, from image to text and from text to image."""

from __future__ import annotations

import hashlib
import logging
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import attrs
import torch
from ignite.engine import Engine
from ignite.exceptions import NotComputableError
from torch import Tensor

from diptych.engine.checks import is_whole
from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.distributed.gathering import gather_rows, gather_values
from diptych.engine.errors import BatchError
from diptych.engine.tasks import look_up
from diptych.handlers.evaluation.known_ids import KnownIds
from diptych.handlers.evaluation.outputs_metric import (
    Outputs,
    OutputsMetric,
    OutputTransform,
    check_features,
    check_ids,
    unchanged,
)
from diptych.handlers.evaluation.retrieval_ranks import Items, MatchRanks, Relevance, match_ranks

logger = logging.getLogger(__name__)

IDS = ("image_id", "caption_id")
"""The names of the ids of images and texts, among the outputs and in the batch."""

FIRST_NUMBER = torch.iinfo(torch.int64).min
"""From here on, rows without an id or group are numbered, below all ids and `-1 - image_id`."""

PIECE = 4096
"""Rows that are joined to one tensor while batches are added."""


class RetrievalMetric(OutputsMetric):
    """The base of retrieval metrics: collects the items of both sides and ranks their matches.

    A subclass turns the ranks of one direction into values, in `summarise`. Its input, and how
    items, ties and process groups are treated, is described in `RetrievalRecall`.

    Args:
        k: one or several numbers of results, each >= 1.
        relevance: as in `RetrievalRecall`.
        output_transform: from the evaluator's output to the mapping of features.

    Attributes:
        chance: once computed, the expected values of random features, by the names of the values;
            only of values for which there is a closed form.
    """

    def __init__(
        self,
        k: int | Sequence[int] = (1, 5, 10),
        *,
        relevance: Relevance | Tensor | None = None,
        output_transform: OutputTransform = unchanged,
    ) -> None:
        self.k = _checked((k,) if isinstance(k, int) else tuple(k))
        self.relevance = _by_ids(relevance) if isinstance(relevance, Tensor) else relevance
        self.chance: dict[str, float] = {}
        self._has_warned = False
        super().__init__(output_transform)

    def depth(self) -> int | None:
        """Return the number of matches of a query to rank; None: all."""
        return max(self.k)

    @abstractmethod
    def summarise(self, ranks: MatchRanks) -> dict[str, float]:
        """Return the means of values over the queries of one direction, by name."""

    def expected(self, ranks: MatchRanks) -> dict[str, float]:
        """Return the expected values of random features; a value without a closed form is left out.

        Args:
            ranks: only its `matches`, `total`, `ideal` and `results` matter.
        """
        del ranks
        return {}

    def reset(self) -> None:
        """Forget the batches so far."""
        self._images, self._texts = _Side(), _Side()
        self._grouped: bool | None = None
        self._known_groups = KnownIds(
            "groups", consequence="Such samples match their own pair alone"
        )
        self._rows = 0

    @torch.no_grad()
    def iteration_completed(self, engine: Engine) -> None:
        """Add the output of an evaluator's iteration, with the ids of its batch."""
        ids = {name: _as_ids(name, look_up(engine.state.batch, name)) for name in IDS}
        found = {name: own for name, own in ids.items() if own is not None}
        self.update({**found, **self._output_transform(engine.state.output)})

    @torch.no_grad()
    def update(self, output: Outputs) -> None:
        """Add a batch's features.

        Args:
            output: `image_features` [B, D] and `text_features` [B, D], or one of them; optionally
                integer `groups` [B], `text_groups` if the texts have other groups, and the ids
                `image_id` and `caption_id` [B].
        """
        images, texts = output.get("image_features"), output.get("text_features")
        if images is None and texts is None:
            raise BatchError(
                "retrieval needs image_features or text_features, got "
                f"{', '.join(output) or 'nothing'}. Use output_transform to name them"
            )
        groups = output.get("groups")
        text_groups = output.get("text_groups", groups)
        self._check_matchable(output, images, texts)
        numbers = self._new_numbers(images, texts)
        for side, features, own_groups, name in (
            (self._images, images, groups, IDS[0]),
            (self._texts, texts, text_groups, IDS[1]),
        ):
            if features is not None:
                check_features(features)
                rows = numbers[: len(features)]
                ids = _ids_or(rows, name, output.get(name))
                if self.relevance is not None:
                    side.add(features, ids, ids)
                else:
                    side.add(features, self._groups_of(rows, own_groups, output.get(IDS[0])), ids)

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        """Return the values over all batches of all ranks."""
        images, texts = self._items(self._images), self._items(self._texts)
        if len(images.groups) == 0 or len(texts.groups) == 0:
            raise NotComputableError("retrieval needs at least one image and one text")
        self._known_groups.report(type(self).__name__)
        self._warn_of_repeated_rows(images, texts)
        both = match_ranks(images, texts, self.depth(), self.relevance)
        (first, first_chance), (second, second_chance) = map(self._means, both)
        self.chance = _of_both(first_chance, second_chance)
        return _of_both(first, second)

    def _means(self, parts: Iterable[MatchRanks]) -> tuple[dict[str, float], dict[str, float]]:
        """Return the values of one direction and those of chance, over the parts of all ranks."""
        own = [
            (len(ranks.matches), self.summarise(ranks), self.expected(ranks))
            for ranks in parts
            if len(ranks.matches)
        ]
        # With a depth, each rank has all queries.
        found = own if self.depth() is not None else list(chain(*gather_values(own)))
        counts, values, chance = zip(*found, strict=True)
        return _weighted(counts, values), _weighted(counts, chance)

    def _check_matchable(self, output: Outputs, *sides: Tensor | None) -> None:
        """Check that a batch says which items match, in the same way as those before it."""
        if self.relevance is not None:
            _check_has_ids(output, *sides)
            return
        grouped = not {"groups", "text_groups", IDS[0]}.isdisjoint(output)
        if self._grouped not in (None, grouped):
            raise BatchError("groups must be in all batches or in none, got both kinds")
        self._grouped = grouped
        sizes = ["none" if side is None else len(side) for side in sides]
        if not grouped and ("none" in sizes or len(set(sizes)) > 1):
            raise BatchError(
                "without groups a batch must hold as many images as texts, got "
                f"{sizes[0]} and {sizes[1]}. Return groups to say which items match"
            )

    def _new_numbers(self, *sides: Tensor | None) -> Tensor:
        """Return numbers that no other row of any rank has, for the rows of a batch."""
        start = FIRST_NUMBER + (rank() << 40) + self._rows
        there = [side for side in sides if side is not None]
        rows = max(map(len, there))
        self._rows += rows
        return torch.arange(start, start + rows, device=there[0].device)

    def _groups_of(self, rows: Tensor, groups: Tensor | None, image_id: Tensor | None) -> Tensor:
        """Return the groups of one side's rows; instead of a missing one, that of the image id."""
        if image_id is not None and (groups is None or len(image_id) == len(rows)):
            ids = _ids_or(rows, IDS[0], image_id)
            rows = torch.where(ids < 0, rows, -1 - ids)
        if groups is None:
            return rows
        check_ids("groups", groups, len(rows))
        groups = groups.detach().to(rows.device, torch.int64)
        return torch.where(self._known_groups.mask(groups), groups, rows)

    def _warn_of_repeated_rows(self, images: Items, texts: Items) -> None:
        """Warn, once, if a loader seems to repeat images for their captions without their ids."""
        has_ids = any(bool((side.ids >= 0).any()) for side in (images, texts))
        if has_ids or self._has_warned or rank() != 0:
            return
        first, second = (side.groups[1:][side.groups.diff() == 0] for side in (images, texts))
        both = first[torch.isin(first, second)]
        if len(both):
            self._has_warned = True
            logger.warning(
                "%s: several images and several texts have one group (%d), and each counts as an "
                "item.\nIf the loader repeats images for their captions, add image_id and "
                "caption_id to the batches.",
                type(self).__name__,
                int(both[0]),
            )

    def _items(self, side: _Side) -> Items:
        """Return the items of one side of all ranks, without copies."""
        items = side.items()
        if world_size() > 1:
            # A rank without items of this side gathers on the device of the other side.
            device = next((s.device for s in (side, self._images, self._texts) if s.device), None)
            features, groups, ids = (gather_rows(rows, device) for rows in items)
            items = _Side([features], [groups], [ids]).items()
        return items.without_copies()


class RetrievalRecall(RetrievalMetric):
    """Recall@k: the share of queries with a match among their k best results.

    Images are matched with texts by cosine similarity, in both directions. Values, each in [0, 1]:
    `recall@k`, the mean of both directions, `image_to_text/recall@k` and `text_to_image/recall@k`.

    The input is a mapping of features, as the `image_text` task returns it: `image_features`
    [B, D], `text_features` [B, D], and optionally integer `groups` [B]. Without groups, the image
    and the text of a row match only each other. With groups, all items of one group match. Any
    match of a query counts: with five captions for an image, one hit suffices, as in Karpathy's
    protocol (arXiv:1412.2306). A sample with the group -100 has none: only its own pair matches.

    Each row is an item of its own, unless items have ids. With `image_id` [B] and `caption_id` [B]
    in the batch or among the task's outputs (whole numbers, or texts in the batch), an item that
    appears in several rows counts once, as query and as result: an image that the loader repeats
    for each of its captions is one image. Without groups, all texts of an `image_id` match it.
    Features never decide what is one item.

    `relevance` says which items match if groups cannot: items that match several others
    (many-to-many), or matches with a grade. It needs both ids.

    The sides need not come in pairs. A batch may hold only one side, `text_groups` gives the texts
    other groups than the images, and the sides may differ in number. A query without any match is
    left out; it remains in the gallery of the other direction as a distractor. For example, all
    captions against a few images:

    ```python
    def one_side(model, batch):
        if "image" in batch:
            return {"image_features": model.encode_image(batch["image"]), "groups": batch["group"]}
        return {"text_features": model.encode_text(batch["text"]), "groups": batch["group"]}

    loader = [*batches_of_unseen_images, *batches_of_all_captions]
    Evaluation(loader, metrics=[RetrievalRecall()], task=one_side, prefix="unseen")
    ```

    Ties are broken pessimistically: a wrong result with an equal similarity (within 1e-12, in
    float64), or with a NaN similarity, counts as better. A collapsed model has a recall of 0.

    Event: Ignite's for metrics; it is reset when an epoch of its evaluator starts.
    Cost: one product of N x M similarities, computed and counted in tiles, once for both
        directions, in float64: features in a narrow cone differ by less than float32 resolves. It
        keeps the features of N images and M texts in float32 and, in `compute`, at most another
        copy of one side. In a process group, features are gathered from shards of any
        size, and each rank computes its share of the tiles; the values are those of one process.

    Args:
        k: one or several numbers of results, each >= 1.
        relevance: a function of image and text ids, [N] and [M], that returns grades >= 0 [N, M],
            called with parts of them; or a tensor of the grades, whose rows are the image ids and
            whose columns are the text ids. Items match if their grade is above 0. None: by groups.
        output_transform: from the evaluator's output to the mapping above.

    Raises:
        ValueError: if a k is below 1 or repeated.
        BatchError: while running: if the mapping lacks features, shapes differ, only some batches
            have groups, or nothing matches.
        NotComputableError: if it has seen no images or no texts.
    """

    def depth(self) -> int | None:
        """Return 1: the best match suffices."""
        return 1

    def summarise(self, ranks: MatchRanks) -> dict[str, float]:
        """Return recall@k."""
        best = ranks.ranks[0]
        return {f"recall@{k}": float((best <= k).double().mean()) for k in self.k}

    def expected(self, ranks: MatchRanks) -> dict[str, float]:
        """Return the probability that k random results include a match."""
        others = ranks.results - ranks.matches.double()
        values = {}
        for k in self.k:
            drawn = torch.arange(min(k, ranks.results), device=others.device)[:, None]
            missed = ((others - drawn).clamp(min=0) / (ranks.results - drawn)).prod(0)
            values[f"recall@{k}"] = float((1 - missed).mean())
        return values


class RetrievalMetrics(RetrievalRecall):
    """`RetrievalRecall`, and MRR, mAP@k, median and mean rank.

    `mrr`: the mean of 1 / rank of each query's best match. `map@k`: the mean of the queries'
    average precision, which is the sum of the precision at each match among the first k results,
    divided by the number of matches, at most k. `median_rank`, `mean_rank`: the rank of the best
    match, from 1. Each value is published as the mean of both directions, and for each direction
    under `image_to_text/` and `text_to_image/`. Inputs, items, ties and process groups are treated
    as in `RetrievalRecall`.

    Event: as for `RetrievalRecall`.
    Cost: as for `RetrievalRecall`, and two more passes over each tile for each further match of a
        query, at most the largest k.
    """

    def depth(self) -> int | None:
        """Return the largest k."""
        return max(self.k)

    def summarise(self, ranks: MatchRanks) -> dict[str, float]:
        """Return recall@k, mAP@k, and the values of the best match's rank."""
        best = ranks.ranks[0]
        ordered = best.sort().values
        middle = ordered[[(len(best) - 1) // 2, len(best) // 2]]
        return {
            **super().summarise(ranks),
            **{f"map@{k}": float(average_precision(ranks, k).mean()) for k in self.k},
            "mrr": float(best.double().reciprocal().mean()),
            "median_rank": float(middle.double().mean()),
            "mean_rank": float(best.double().mean()),
        }


@attrs.define(eq=False)
class _Side:
    """The features, groups and ids of one side, in the pieces in which they were added."""

    _features: list[Tensor] = attrs.field(factory=list)
    _groups: list[Tensor] = attrs.field(factory=list)
    _ids: list[Tensor] = attrs.field(factory=list)
    _small: int = 0

    @property
    def device(self) -> torch.device | None:
        return self._features[0].device if self._features else None

    def add(self, features: Tensor, groups: Tensor, ids: Tensor) -> None:
        self._features.append(features.detach().float())
        self._groups.append(groups.to(features.device))
        self._ids.append(ids.to(features.device))
        self._small += 1
        small = self._features[-self._small :]
        # `items` frees the pieces one by one while it copies them. The allocator returns only
        # large blocks to the system, so small pieces are joined here.
        if sum(map(len, small)) >= PIECE:
            self._features[-self._small :] = [torch.cat(small)]
            self._small = 0

    def items(self) -> Items:
        """Return all rows sorted by group and id; keep them sorted, in one piece."""
        if not self._features:
            none = torch.empty(0, dtype=torch.int64)
            return Items(torch.empty(0, 0), none, none)
        groups, ids = torch.cat(self._groups), torch.cat(self._ids)
        order = ids.argsort(stable=True)
        order = order[groups[order].argsort(stable=True)]
        rows = torch.arange(len(order), device=order.device)
        if len(self._features) > 1 or bool((order != rows).any()):
            position = torch.empty_like(order)
            position[order] = rows
            features = self._features[0].new_empty(len(groups), self._features[0].shape[1])
            start = 0
            while self._features:
                piece = self._features.pop(0)
                features.index_copy_(0, position[start : start + len(piece)], piece)
                start += len(piece)
            groups, ids = groups[order], ids[order]
            self._features, self._small = [features], 0
        self._groups, self._ids = [groups], [ids]
        return Items(self._features[0], groups, ids)


def average_precision(ranks: MatchRanks, within: int | Tensor) -> Tensor:
    """Return the average precision of each query's first results, [Q].

    Args:
        ranks: of all matches that may be among these results.
        within: the number of results, for all queries or for each of them.
    """
    nth = torch.arange(1, len(ranks.ranks) + 1, device=ranks.ranks.device)[:, None]
    precision = torch.where(ranks.ranks <= within, nth / ranks.ranks.double(), 0.0)
    return precision.sum(0) / ranks.matches.clamp(max=within)


def _weighted(counts: Sequence[int], parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the means of values over parts, each of which counts as many times."""
    shares = [count / sum(counts) for count in counts]
    pairs = list(zip(shares, parts, strict=True))
    return {name: sum(share * part[name] for share, part in pairs) for name in parts[0]}


def _of_both(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    """Return the values of both directions, and their means."""
    return {
        **{name: (first[name] + second[name]) / 2 for name in first},
        **{f"image_to_text/{name}": value for name, value in first.items()},
        **{f"text_to_image/{name}": value for name, value in second.items()},
    }


def _check_has_ids(output: Outputs, *sides: Tensor | None) -> None:
    given = zip(IDS, sides, strict=True)
    lacking = [name for name, rows in given if rows is not None and name not in output]
    if lacking:
        raise BatchError(
            f"the batch must have {' and '.join(lacking)} if relevance is given, got none. Number "
            "the items, and return the numbers with the batch"
        )


def _ids_or(rows: Tensor, name: str, ids: Tensor | None) -> Tensor:
    """Return the ids of rows, and the row's number instead of a missing one."""
    if ids is None:
        return rows
    check_ids(name, ids, len(rows))
    ids = ids.detach().to(rows.device, torch.int64)
    return torch.where(ids >= 0, ids, rows)


def _as_ids(name: str, value: Any) -> Tensor | None:
    """Return ids in a batch as numbers, also texts; None if the batch has none."""
    if value is None or isinstance(value, Tensor):
        return None if value is None else value.flatten()
    listed = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(listed, (list, tuple)):
        raise BatchError(f"{name} must be whole numbers or texts, one for each row, got {value!r}")
    return torch.tensor([_as_id(name, one) for one in listed])


def _as_id(name: str, value: Any) -> int:
    own = value.item() if hasattr(value, "item") else value  # NumPy's numbers are no int
    if not isinstance(own, (int, str)):
        raise BatchError(f"{name} must be whole numbers or texts, one for each row, got {value!r}")
    return own if isinstance(own, int) else _number_of(own)


def _number_of(text: str) -> int:
    """Return the same number for a text on all ranks, and others for other texts."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _by_ids(grades: Tensor) -> Relevance:
    """Return the function that reads grades from a tensor by image and text id."""
    if grades.ndim != 2:
        raise ValueError(f"relevance must be [images, texts], got shape {tuple(grades.shape)}")

    def read(images: Tensor, texts: Tensor) -> Tensor:
        known = (images >= 0)[:, None] & (texts >= 0)
        rows = grades[images.clamp(min=0).to(grades.device)]
        return rows[:, texts.clamp(min=0).to(grades.device)].to(images.device) * known

    return read


def _checked(k: tuple[int, ...]) -> tuple[int, ...]:
    if not k or not all(map(is_whole, k)) or len(set(k)) != len(k):
        raise ValueError(f"k must be different whole numbers >= 1, got {k}")
    return k
