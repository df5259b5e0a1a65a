"""Retrieval metrics of more than the best match: nDCG, precision, R-precision and MAP@R."""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.handlers.evaluation.outputs_metric import OutputTransform, unchanged
from diptych.handlers.evaluation.retrieval import RetrievalMetric, average_precision
from diptych.handlers.evaluation.retrieval_ranks import MatchRanks, Relevance


class RetrievalNDCG(RetrievalMetric):
    """nDCG@k: the discounted gain of the first k results, over that of the ideal order.

    A result at rank r adds its grade / log2(r + 1); a result that does not match adds 0. The sum is
    divided by that of the k matches with the largest grades, in their order. Values in [0, 1]:
    `ndcg@k`, `image_to_text/ndcg@k` and `text_to_image/ndcg@k`. Without `relevance`, the grade of a
    match is 1. For the exponential gain, let `relevance` return 2 ** grade - 1.

    Input, items, ties and process groups are treated as in `RetrievalRecall`. Of matches with equal
    similarities, one with a lower grade ranks first.

    Source: Järvelin and Kekäläinen 2002, "Cumulated gain-based evaluation of IR techniques".

    Event: as for `RetrievalRecall`.
    Cost: as for `RetrievalMetrics`. With `relevance`, two more products of similarities, in tiles,
        and six calls for each pair of an image and a text.

    Args:
        k: as in `RetrievalRecall`.
        relevance: as in `RetrievalRecall`.
        output_transform: as in `RetrievalRecall`.

    Raises:
        ValueError: if a k is below 1 or repeated.
        BatchError: while running: as in `RetrievalRecall`; if `relevance` returns another shape or
            a negative grade.
    """

    def summarise(self, ranks: MatchRanks) -> dict[str, float]:
        """Return nDCG@k."""
        grades = torch.ones_like(ranks.ranks) if ranks.grades is None else ranks.grades
        gains = grades / (ranks.ranks + 1.0).double().log2()
        return {
            f"ndcg@{k}": float(((gains * (ranks.ranks <= k)).sum(0) / _ideal(ranks, k)).mean())
            for k in self.k
        }

    def expected(self, ranks: MatchRanks) -> dict[str, float]:
        """Return nDCG@k of a random order."""
        mean = ranks.total / ranks.results
        return {
            f"ndcg@{k}": float(
                (mean * _discounts(min(k, ranks.results), mean).sum() / _ideal(ranks, k)).mean()
            )
            for k in self.k
        }


class RetrievalPrecision(RetrievalMetric):
    """Precision@k: the share of matches among a query's k best results, also if it has fewer.

    Values in [0, 1]: `precision@k`, `image_to_text/precision@k` and `text_to_image/precision@k`.
    Input, items, ties and process groups are treated as in `RetrievalRecall`.

    Event: as for `RetrievalRecall`.
    Cost: as for `RetrievalMetrics`.

    Args:
        k: as in `RetrievalRecall`.
        relevance: as in `RetrievalRecall`.
        output_transform: as in `RetrievalRecall`.

    Raises:
        ValueError: if a k is below 1 or repeated.
        BatchError: while running: as in `RetrievalRecall`.
    """

    def summarise(self, ranks: MatchRanks) -> dict[str, float]:
        """Return precision@k."""
        return {
            f"precision@{k}": float((ranks.ranks <= k).sum(0).double().mean() / k) for k in self.k
        }

    def expected(self, ranks: MatchRanks) -> dict[str, float]:
        """Return the share of matches among all results."""
        share = float(ranks.matches.double().mean()) / ranks.results
        return {f"precision@{k}": share * min(k, ranks.results) / k for k in self.k}


class RetrievalRPrecision(RetrievalMetric):
    """R-precision and MAP@R: of a query with R matches, judge the first R results.

    `r_precision`: the share of matches among the first R results. `map@r`: the sum of the precision
    at each match among them, divided by R. Both are in [0, 1], also under `image_to_text/` and
    `text_to_image/`, and are 1 only if all matches come first, however many there are. Input,
    items, ties and process groups are treated as in `RetrievalRecall`.

    Source: Musgrave et al. 2020, "A Metric Learning Reality Check", arXiv:2003.08505.

    Event: as for `RetrievalRecall`.
    Cost: as for `RetrievalMetrics`, for all matches of a query; if a query has more than 32, two
        products, in strips of 64 queries, each of whose results are sorted.

    Args:
        relevance: as in `RetrievalRecall`.
        output_transform: as in `RetrievalRecall`.

    Raises:
        BatchError: while running: as in `RetrievalRecall`.
    """

    def __init__(
        self,
        *,
        relevance: Relevance | Tensor | None = None,
        output_transform: OutputTransform = unchanged,
    ) -> None:
        super().__init__(relevance=relevance, output_transform=output_transform)

    def depth(self) -> int | None:
        """Return None: all matches count."""
        return None

    def summarise(self, ranks: MatchRanks) -> dict[str, float]:
        """Return R-precision and MAP@R."""
        found = (ranks.ranks <= ranks.matches).sum(0)
        return {
            "r_precision": float((found / ranks.matches.double()).mean()),
            "map@r": float(average_precision(ranks, ranks.matches).mean()),
        }

    def expected(self, ranks: MatchRanks) -> dict[str, float]:
        """Return R-precision and MAP@R of a random order."""
        matches = ranks.matches.double()
        # At rank i, R / N results match; (i - 1)(R - 1) / (N - 1) matches stand before such a one.
        harmonic = torch.digamma(matches + 1) - torch.digamma(torch.ones_like(matches))
        before = (matches - 1) / max(ranks.results - 1, 1)
        precision = harmonic + before * (matches - harmonic)
        return {
            "r_precision": float(matches.mean()) / ranks.results,
            "map@r": float(precision.mean()) / ranks.results,
        }


def _discounts(k: int, like: Tensor) -> Tensor:
    """Return 1 / log2(r + 1) for the first k ranks, float64 [k]."""
    return torch.arange(2, k + 2, device=like.device).double().log2().reciprocal()


def _ideal(ranks: MatchRanks, k: int) -> Tensor:
    """Return the discounted gain of the best k matches of each query, [Q]."""
    count = min(k, len(ranks.ranks))
    nth = torch.arange(count, device=ranks.ranks.device)[:, None]
    grades = (nth < ranks.matches).double() if ranks.ideal is None else ranks.ideal[:count]
    return _discounts(count, grades) @ grades
