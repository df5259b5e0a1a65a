"""Time and memory of retrieval metrics, compared with the score product alone and common methods.

    python benchmarks/retrieval.py --images 10000 --captions 5 --dim 256 --threads 2

Every row runs in a separate process, once per round; the figures are those of the best round.
Memory is the peak resident size while the values are computed, beyond the size with the features in
memory. Rows marked ~ ran with a tenth of the images: their time and memory are multiplied by 100,
because they grow with the square.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from diptych.handlers import RetrievalMetrics, RetrievalRecall

K = (1, 5, 10)
TILE = 512


class Size(NamedTuple):
    """The size of the retrieval problem."""

    images: int
    captions: int
    dim: int


class Figures(NamedTuple):
    """The time and memory of one run, and the recall that it computed."""

    seconds: float
    megabytes: float
    recall: float


def batches(size: Size) -> Iterator[dict[str, Tensor]]:
    """Yield 250 images at a time, with captions whose features are close to them."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, size.images, 250):
        groups = torch.arange(start, min(start + 250, size.images))
        images = torch.randn(len(groups), size.dim, generator=generator)
        owners = torch.arange(len(groups)).repeat_interleave(size.captions)
        noise = torch.randn(len(owners), size.dim, generator=generator)
        yield {
            "image_features": images,
            "text_features": images[owners] + 3.5 * noise,
            "groups": groups,
            "text_groups": groups[owners],
        }


def features(size: Size) -> tuple[Tensor, Tensor]:
    """Return the normalised features of all images [N, D] and texts [N C, D]."""
    images = torch.empty(size.images, size.dim)
    texts = torch.empty(size.images * size.captions, size.dim)
    for batch in batches(size):
        groups = batch["groups"]
        start, stop = int(groups[0]), int(groups[-1]) + 1
        images[start:stop] = torch.nn.functional.normalize(batch["image_features"])
        texts[start * size.captions : stop * size.captions] = torch.nn.functional.normalize(
            batch["text_features"]
        )
    return images, texts


def peak() -> float:
    """Return the largest resident size so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(work: Callable[[], float]) -> Figures:
    """Return the time and memory of `work`, a function that returns recall@1."""
    before = peak()
    started = perf_counter()
    recall = work()
    return Figures(perf_counter() - started, peak() - before, recall)


def product_alone(size: Size) -> Figures:
    """Compute every score in tiles, and discard it."""
    images, texts = features(size)

    def work() -> float:
        buffer = torch.empty(TILE * TILE)
        for rows in images.split(TILE):
            for columns in texts.split(TILE):
                scores = buffer[: len(rows) * len(columns)].view(len(rows), len(columns))
                torch.mm(rows, columns.T, out=scores)
        return float("nan")

    return measured(work)


def diptych(metric: RetrievalRecall, size: Size) -> Figures:
    """Update a metric with all batches, and measure `compute`."""
    for batch in batches(size):
        metric.update(batch)
    return measured(lambda: metric.compute()["recall@1"])


def recall_only(size: Size) -> Figures:
    """Measure `RetrievalRecall`: recall@k."""
    return diptych(RetrievalRecall(K), size)


def all_metrics(size: Size) -> Figures:
    """Measure `RetrievalMetrics`: recall@k, mAP@k, MRR, median and mean rank."""
    return diptych(RetrievalMetrics(K), size)


def full_matrix_topk(size: Size) -> Figures:
    """Hold all scores, and compute recall@k from the 10 largest of each row and column."""
    images, texts = features(size)
    owners = torch.arange(size.images).repeat_interleave(size.captions)

    def work() -> float:
        scores = images @ texts.T
        best = owners[scores.topk(max(K), dim=1).indices]
        image_hits = (best == torch.arange(size.images)[:, None]).cumsum(1) > 0
        best = scores.T.topk(max(K), dim=1).indices
        text_hits = (best == owners[:, None]).cumsum(1) > 0
        return float(image_hits[:, 0].float().mean() + text_hits[:, 0].float().mean()) / 2

    return measured(work)


def full_matrix_argsort(size: Size) -> Figures:
    """Hold all scores, and sort every row and column."""
    images, texts = features(size)
    owners = torch.arange(size.images).repeat_interleave(size.captions)

    def work() -> float:
        scores = images @ texts.T
        order = scores.argsort(dim=1, descending=True)
        image_ranks = (owners[order] == torch.arange(size.images)[:, None]).int().argmax(1)
        order = scores.T.argsort(dim=1, descending=True)
        text_ranks = (order == owners[:, None]).int().argmax(1)
        return float((image_ranks == 0).float().mean() + (text_ranks == 0).float().mean()) / 2

    return measured(work)


def python_loops(size: Size) -> Figures:
    """Loop over every query and every result."""
    images, texts = features(size)

    def best_is_own(query: Tensor, gallery: Tensor, own: range) -> bool:
        scores = (gallery @ query).tolist()
        best = max(scores[i] for i in own)
        rank = 1
        for index, score in enumerate(scores):
            if index not in own and score >= best:
                rank += 1
        return rank == 1

    def work() -> float:
        c = size.captions
        first = [best_is_own(q, texts, range(i * c, i * c + c)) for i, q in enumerate(images)]
        second = [best_is_own(q, images, range(i // c, i // c + 1)) for i, q in enumerate(texts)]
        return (sum(first) / len(first) + sum(second) / len(second)) / 2

    return measured(work)


ROWS: tuple[tuple[str, Callable[[Size], Figures], bool], ...] = (
    ("score product alone", product_alone, False),
    ("RetrievalRecall", recall_only, False),
    ("RetrievalMetrics", all_metrics, False),
    ("full matrix, top-k", full_matrix_topk, False),
    ("full matrix, argsort", full_matrix_argsort, True),
    ("Python loops, O(N^2)", python_loops, True),
)


def run(row: int, size: Size, threads: int) -> Figures:
    """Run a row of the table in this process."""
    torch.set_num_threads(threads)
    return ROWS[row][1](size)


def main() -> None:
    """Run every row, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000, help="images to rank")
    parser.add_argument("--captions", type=int, default=5, help="captions per image")
    parser.add_argument("--dim", type=int, default=256, help="dimension of the features")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=3, help="runs per row")
    parser.add_argument("--skip-slow", action="store_true", help="skip the rows marked ~")
    arguments = parser.parse_args()
    size = Size(arguments.images, arguments.captions, arguments.dim)
    rows = [i for i, (_, _, slow) in enumerate(ROWS) if not (slow and arguments.skip_slow)]
    found: dict[int, list[Figures]] = {row: [] for row in rows}
    context = multiprocessing.get_context("spawn")
    for _ in range(arguments.rounds):
        for row in rows:
            own = size._replace(images=size.images // 10) if ROWS[row][2] else size
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                found[row].append(pool.submit(run, row, own, arguments.threads).result())
    print_table(size, arguments.threads, found)


def print_table(size: Size, threads: int, found: dict[int, list[Figures]]) -> None:
    """Print the best figures of each row, and their ratios to the first row."""
    print(
        f"{size.images} images x {size.captions} captions, D = {size.dim}, float32, "
        f"{threads} threads, torch {torch.__version__}\n"
    )
    print(f"{'':24} {'seconds':>9} {'x product':>10} {'MB beyond':>10} {'recall@1':>9}")
    product = min(figures.seconds for figures in found[0])
    for row, runs in found.items():
        name, _, slow = ROWS[row]
        scale = 100 if slow else 1
        seconds = scale * min(figures.seconds for figures in runs)
        megabytes = scale * min(figures.megabytes for figures in runs)
        recall = "" if row == 0 else f"{runs[0].recall:9.4f}"
        print(
            f"{'~ ' if slow else '  '}{name:22} {seconds:9.2f} {seconds / product:10.2f} "
            f"{megabytes:10.0f} {recall:>9}"
        )


if __name__ == "__main__":
    main()
