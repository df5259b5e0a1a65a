"""Retrieval metrics: at which rank each query's matches stand, image to text and text to image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from ignite.engine import Engine
from ignite.exceptions import NotComputableError
from ignite.metrics import Metric
from torch import Tensor

from diptych.engine.checks import is_whole
from diptych.engine.distributed.collectives import rank, world_size
from diptych.engine.distributed.gathering import from_all_ranks, rows_of_all_ranks
from diptych.engine.errors import BatchError
from diptych.handlers.evaluation.ranking import Items, MatchRanks, match_ranks

PIECE = 4096
"""Rows that are kept together while batches come in."""

Outputs = Mapping[str, Tensor]


class RetrievalRecall(Metric):
    """Recall@k: the share of queries that have a match among their k best results.

    An image is matched with the texts by cosine similarity, and the other way round. Values, each
    in [0, 1]: `recall@k`, the mean of both directions, `image_to_text/recall@k` and
    `text_to_image/recall@k`.

    It takes a mapping of features, as the `image_text` task returns it: `image_features` [B, D],
    `text_features` [B, D], and, where given, integer `groups` [B]. Without groups, a row's image
    and text match each other alone. With groups, everything of one group matches, any match of a
    query counts (five captions of an image: one hit suffices, as in Karpathy's protocol,
    arXiv:1412.2306), and an item that appears in several rows counts once: an image that the
    loader repeats for each of its captions is one image, as query and as result. Rows show one
    item where they have one group and equal features (cosine similarity above 0.9999).

    The sides need not come in rows: a batch may hold one side only, and `text_groups` gives texts
    groups of their own. The sides may then differ in number, and a query without any match is left
    out, while it still stands in the others' way as a result. All captions against the images of
    a few:

    ```python
    def one_side(model, batch):
        if "image" in batch:
            return {"image_features": model.encode_image(batch["image"]), "groups": batch["group"]}
        return {"text_features": model.encode_text(batch["text"]), "groups": batch["group"]}

    loader = [*batches_of_unseen_images, *batches_of_all_captions]
    Evaluation(loader, metrics=[RetrievalRecall()], task=one_side, prefix="unseen")
    ```

    Ties are broken pessimistically: a wrong result whose similarity is equal (within 1e-6) counts
    as better, and so does one that is not a number. A collapsed model gets no recall.

    Event: Ignite's for metrics; it is reset when an epoch of its evaluator starts.
    Cost: one product of N x M similarities, made and counted in tiles, once for both directions.
        It keeps the features of N images and M texts in float32 and, while it computes, another
        copy of a side at most. Over ranks features are gathered, from shards of any size, and each
        computes its share of the tiles; the values are those of one process.

    Args:
        k: one or several numbers of results to look at, each >= 1.
        output_transform: from the evaluator's output to the mapping above.

    Raises:
        ValueError: if a k is below 1 or given twice.
        BatchError: while running: if the mapping lacks features, shapes differ, only some batches
            have groups, or nothing matches.
        NotComputableError: if it has seen no images or no texts.
    """

    def __init__(
        self,
        k: int | Sequence[int] = (1, 5, 10),
        *,
        output_transform: Callable[[Any], Outputs] = lambda output: output,
    ) -> None:
        self.k = _checked((k,) if isinstance(k, int) else tuple(k))
        super().__init__(output_transform)

    def reset(self) -> None:
        """Forget what was seen."""
        self._images, self._texts = _Side(), _Side()
        self._grouped: bool | None = None
        self._pairs = 0

    @torch.no_grad()
    def iteration_completed(self, engine: Engine) -> None:
        """Take the output of an evaluator's iteration."""
        self.update(self._output_transform(engine.state.output))

    @torch.no_grad()
    def update(self, output: Outputs) -> None:
        """Add a batch's features.

        Args:
            output: `image_features` [B, D] and `text_features` [B, D], or one of them, with integer
                `groups` [B] where there are some, and `text_groups` where the texts have others.
        """
        images, texts = output.get("image_features"), output.get("text_features")
        if images is None and texts is None:
            raise BatchError(
                "retrieval needs image_features or text_features, got "
                f"{', '.join(output) or 'nothing'}: use output_transform"
            )
        groups = output.get("groups")
        text_groups = output.get("text_groups", groups)
        self._check_grouping(images, texts, groups if images is not None else text_groups)
        if groups is None and text_groups is None:
            groups = text_groups = self._new_groups(images, texts)
        for side, features, ids in (
            (self._images, images, groups),
            (self._texts, texts, text_groups),
        ):
            if features is not None:
                side.add(features, ids)

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        """Return the values over all that was seen, on all ranks."""
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
        """Return how many matches of a query are ranked, the best first."""
        return 1

    def _summary(self, ranks: MatchRanks) -> dict[str, float]:
        """Return the values of one direction."""
        best = ranks.ranks[0]
        return {f"recall@{k}": float((best <= k).double().mean()) for k in self.k}

    def _check_grouping(
        self, images: Tensor | None, texts: Tensor | None, groups: Tensor | None
    ) -> None:
        grouped = groups is not None
        if self._grouped not in (None, grouped):
            raise BatchError("either all batches or none must have groups, got both kinds")
        self._grouped = grouped
        if not grouped and (images is None or texts is None or len(images) != len(texts)):
            sizes = [0 if side is None else len(side) for side in (images, texts)]
            raise BatchError(
                "without groups a batch must hold as many images as texts, got "
                f"{sizes[0]} and {sizes[1]}: say what matches with groups"
            )

    def _new_groups(self, images: Tensor | None, texts: Tensor | None) -> Tensor:
        assert images is not None
        assert texts is not None
        start = (rank() << 40) + self._pairs  # other ranks number their own pairs
        self._pairs += len(images)
        return torch.arange(start, start + len(images), device=images.device)

    def _items(self, side: _Side) -> Items:
        device = next((s.device for s in (side, self._images, self._texts) if s.device), None)
        items = side.items() if world_size() == 1 else _gathered(side.items(), device)
        return items.without_copies()


class RetrievalMetrics(RetrievalRecall):
    """`RetrievalRecall` and, beside it, MRR, mAP@k, median and mean rank.

    `mrr`: the mean of 1 / rank of each query's best match. `map@k`: the mean over queries of
    average precision, the sum over the matches among the first k results of the precision at each,
    divided by the number of matches, at most k. `median_rank`, `mean_rank`: of the best match,
    counted from 1. Each of them as such, the mean of both directions, and under `image_to_text/`
    and `text_to_image/`. Everything else (inputs, groups, ties, ranks) is as there.

    Event: as for `RetrievalRecall`.
    Cost: as for `RetrievalRecall`, and two passes more over each tile for each further match of a
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
    """What one side's batches have brought, in pieces."""

    _features: list[Tensor] = attrs.field(factory=list)
    _groups: list[Tensor] = attrs.field(factory=list)
    _small: int = 0

    @property
    def device(self) -> torch.device | None:
        return self._features[0].device if self._features else None

    def add(self, features: Tensor, groups: Tensor | None) -> None:
        if features.ndim != 2:
            raise BatchError(f"features must be [B, D], got shape {tuple(features.shape)}")
        if groups is None or groups.shape != features.shape[:1] or groups.is_floating_point():
            got = "none" if groups is None else f"{groups.dtype} {tuple(groups.shape)}"
            raise BatchError(f"groups must be integers [{len(features)}], got {got}")
        self._features.append(F.normalize(features.detach().float(), dim=1))
        self._groups.append(groups.detach().to(features.device, torch.int64))
        self._small += 1
        self._join_small()

    def _join_small(self) -> None:
        # The system takes large pieces back one by one while `items` puts them together.
        small = self._features[-self._small :]
        if sum(map(len, small)) >= PIECE:
            self._features[-self._small :] = [torch.cat(small)]
            self._small = 0

    def items(self) -> Items:
        """Return all rows in the order of their groups, and keep them so, in one piece."""
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
    place = torch.arange(1, len(ranks.ranks) + 1, device=ranks.ranks.device)[:, None]
    precision = torch.where(ranks.ranks <= k, place / ranks.ranks.double(), 0.0)
    return float((precision.sum(0) / ranks.matches.clamp(max=k)).mean())


def _gathered(items: Items, device: torch.device | None) -> Items:
    """Return the items of all ranks, in the order of their groups.

    Args:
        items: this rank's, maybe none.
        device: where a rank without items takes part.
    """
    shapes = from_all_ranks(tuple(items.features.shape))
    if not any(shape[0] for shape in shapes):
        return items
    features = items.features.reshape(len(items.groups), max(shape[1] for shape in shapes))
    side = _Side([rows_of_all_ranks(features, device)], [rows_of_all_ranks(items.groups, device)])
    return side.items()


def _checked(k: tuple[int, ...]) -> tuple[int, ...]:
    if not k or not all(map(is_whole, k)) or len(set(k)) != len(k):
        raise ValueError(f"k must be different whole numbers >= 1, got {k}")
    return k
