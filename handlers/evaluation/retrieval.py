"""Retrieval metrics: recall@k, MRR, mAP and ranks, from image to text and from text to image."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
import torch.nn.functional as F
from ignite.exceptions import NotComputableError
from torch import Tensor

from diptych.engine.checks import is_whole
from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.distributed.gathering import gather_rows
from diptych.engine.errors import BatchError
from diptych.handlers.evaluation.outputs_metric import (
    Outputs,
    OutputsMetric,
    OutputTransform,
    check_features,
    check_ids,
    unchanged,
)
from diptych.handlers.evaluation.retrieval_ranks import Items, MatchRanks, match_ranks

PIECE = 4096
"""Rows that are joined to one tensor while batches are added."""


class RetrievalRecall(OutputsMetric):
    """Recall@k: the share of queries with a match among their k best results.

    Images are matched with texts by cosine similarity, in both directions. Values, each in [0, 1]:
    `recall@k`, the mean of both directions, `image_to_text/recall@k` and `text_to_image/recall@k`.

    The input is a mapping of features, as the `image_text` task returns it: `image_features`
    [B, D], `text_features` [B, D], and optionally integer `groups` [B]. Without groups, the image
    and the text of a row match only each other. With groups, all items of one group match. Any
    match of a query counts: with five captions for an image, one hit suffices, as in Karpathy's
    protocol (arXiv:1412.2306). An item that appears in several rows counts once, as query and as
    result: an image that the loader repeats for each of its captions is one image. Rows are one
    item if they share a group and their features are equal (cosine similarity above 0.9999).

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

    Ties are broken pessimistically: a wrong result with an equal similarity (within 1e-6), or with
    a NaN similarity, counts as better. A collapsed model has a recall of 0.

    Event: Ignite's for metrics; it is reset when an epoch of its evaluator starts.
    Cost: one product of N x M similarities, computed and counted in tiles, once for both
        directions. It keeps the features of N images and M texts in float32 and, in `compute`, at
        most another copy of one side. In a process group, features are gathered from shards of any
        size, and each rank computes its share of the tiles; the values are those of one process.

    Args:
        k: one or several numbers of results, each >= 1.
        output_transform: from the evaluator's output to the mapping above.

    Raises:
        ValueError: if a k is below 1 or repeated.
        BatchError: while running: if the mapping lacks features, shapes differ, only some batches
            have groups, or nothing matches.
        NotComputableError: if it has seen no images or no texts.
    """

    def __init__(
        self,
        k: int | Sequence[int] = (1, 5, 10),
        *,
        output_transform: OutputTransform = unchanged,
    ) -> None:
        self.k = _checked((k,) if isinstance(k, int) else tuple(k))
        super().__init__(output_transform)

    def reset(self) -> None:
        """Forget the batches so far."""
        self._images, self._texts = _Side(), _Side()
        self._grouped: bool | None = None
        self._pairs = 0

    @torch.no_grad()
    def update(self, output: Outputs) -> None:
        """Add a batch's features.

        Args:
            output: `image_features` [B, D] and `text_features` [B, D], or one of them; optionally
                integer `groups` [B], and `text_groups` if the texts have other groups.
        """
        images, texts = output.get("image_features"), output.get("text_features")
        if images is None and texts is None:
            raise BatchError(
                "retrieval needs image_features or text_features, got "
                f"{', '.join(output) or 'nothing'}. Use output_transform to name them"
            )
        groups = output.get("groups")
        text_groups = output.get("text_groups", groups)
        grouped = groups is not None or text_groups is not None
        if self._grouped not in (None, grouped):
            raise BatchError("groups must be in all batches or in none, got both kinds")
        self._grouped = grouped
        if not grouped:
            groups = text_groups = self._new_groups(images, texts)
        for side, features, ids in (
            (self._images, images, groups),
            (self._texts, texts, text_groups),
        ):
            if features is not None:
                side.add(features, ids)

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        """Return the values over all batches of all ranks."""
        images, texts = self._items(self._images), self._items(self._texts)
        if len(images.groups) == 0 or len(texts.groups) == 0:
            raise NotComputableError("retrieval needs at least one image and one text")
        both = match_ranks(images, texts, self._depth())
        first, second = (self._summary(ranks) for ranks in both)
        values = {name: (first[name] + second[name]) / 2 for name in first}
        values.update({f"image_to_text/{name}": value for name, value in first.items()})
        values.update({f"text_to_image/{name}": value for name, value in second.items()})
        return values

    def _depth(self) -> int:
        """Return the number of matches of a query to rank."""
        return 1

    def _summary(self, ranks: MatchRanks) -> dict[str, float]:
        """Return the values of one direction."""
        best = ranks.ranks[0]
        return {f"recall@{k}": float((best <= k).double().mean()) for k in self.k}

    def _new_groups(self, images: Tensor | None, texts: Tensor | None) -> Tensor:
        """Return a new group for each row, whose image and text match only each other."""
        if images is None or texts is None or len(images) != len(texts):
            sizes = [0 if side is None else len(side) for side in (images, texts)]
            raise BatchError(
                "without groups a batch must hold as many images as texts, got "
                f"{sizes[0]} and {sizes[1]}. Return groups to say which items match"
            )
        start = (rank() << 40) + self._pairs  # ids that no other rank uses
        self._pairs += len(images)
        return torch.arange(start, start + len(images), device=images.device)

    def _items(self, side: _Side) -> Items:
        """Return the items of one side of all ranks, without copies."""
        items = side.items()
        if world_size() > 1:
            # A rank without items of this side gathers on the device of the other side.
            device = next((s.device for s in (side, self._images, self._texts) if s.device), None)
            features, groups = (gather_rows(rows, device) for rows in items)
            items = _Side([features], [groups]).items()
        return items.without_copies()


class RetrievalMetrics(RetrievalRecall):
    """`RetrievalRecall`, and MRR, mAP@k, median and mean rank.

    `mrr`: the mean of 1 / rank of each query's best match. `map@k`: the mean of the queries'
    average precision, which is the sum of the precision at each match among the first k results,
    divided by the number of matches, at most k. `median_rank`, `mean_rank`: the rank of the best
    match, from 1. Each value is published as the mean of both directions, and for each direction
    under `image_to_text/` and `text_to_image/`. Inputs, groups, ties and process groups are treated
    as in `RetrievalRecall`.

    Event: as for `RetrievalRecall`.
    Cost: as for `RetrievalRecall`, and two more passes over each tile for each further match of a
        query, at most the largest k.
    """

    def _depth(self) -> int:
        return max(self.k)

    def _summary(self, ranks: MatchRanks) -> dict[str, float]:
        best = ranks.ranks[0]
        ordered = best.sort().values
        middle = ordered[[(len(best) - 1) // 2, len(best) // 2]]
        return {
            **super()._summary(ranks),
            **{f"map@{k}": _average_precision(ranks, k) for k in self.k},
            "mrr": float(best.double().reciprocal().mean()),
            "median_rank": float(middle.double().mean()),
            "mean_rank": float(best.double().mean()),
        }


@attrs.define(eq=False)
class _Side:
    """The features and groups of one side, in the pieces in which they were added."""

    _features: list[Tensor] = attrs.field(factory=list)
    _groups: list[Tensor] = attrs.field(factory=list)
    _small: int = 0

    @property
    def device(self) -> torch.device | None:
        return self._features[0].device if self._features else None

    def add(self, features: Tensor, groups: Tensor | None) -> None:
        check_features(features)
        check_ids("groups", groups, len(features))
        assert groups is not None
        self._features.append(F.normalize(features.detach().float(), dim=1))
        self._groups.append(groups.detach().to(features.device, torch.int64))
        self._small += 1
        small = self._features[-self._small :]
        # `items` frees the pieces one by one while it copies them. The allocator returns only
        # large blocks to the system, so small pieces are joined here.
        if sum(map(len, small)) >= PIECE:
            self._features[-self._small :] = [torch.cat(small)]
            self._small = 0

    def items(self) -> Items:
        """Return all rows sorted by group; keep them sorted, in one piece."""
        if not self._features:
            return Items(torch.empty(0, 0), torch.empty(0, dtype=torch.int64))
        groups = torch.cat(self._groups)
        if len(self._features) > 1 or bool((groups.diff() < 0).any()):
            position = torch.empty_like(groups)
            order = groups.argsort(stable=True)
            position[order] = torch.arange(len(groups), device=groups.device)
            features = self._features[0].new_empty(len(groups), self._features[0].shape[1])
            start = 0
            while self._features:
                piece = self._features.pop(0)
                features.index_copy_(0, position[start : start + len(piece)], piece)
                start += len(piece)
            groups = groups[order]
            self._features, self._small = [features], 0
        self._groups = [groups]
        return Items(self._features[0], groups)


def _average_precision(ranks: MatchRanks, k: int) -> float:
    nth = torch.arange(1, len(ranks.ranks) + 1, device=ranks.ranks.device)[:, None]
    precision = torch.where(ranks.ranks <= k, nth / ranks.ranks.double(), 0.0)
    return float((precision.sum(0) / ranks.matches.clamp(max=k)).mean())


def _checked(k: tuple[int, ...]) -> tuple[int, ...]:
    if not k or not all(map(is_whole, k)) or len(set(k)) != len(k):
        raise ValueError(f"k must be different whole numbers >= 1, got {k}")
    return k
