"""Evaluation of a trained model on a user's data: retrieval both ways, classes, and probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
from ignite.metrics import Accuracy, Metric
from torch import Tensor, nn

from diptych.engine import tasks
from diptych.engine.evaluator import Evaluator
from diptych.engine.tasks import Task
from diptych.handlers.evaluation.linear_probes import LinearProbeAccuracy
from diptych.handlers.evaluation.probes import KNNAccuracy, ZeroShotAccuracy
from diptych.handlers.evaluation.retrieval import RetrievalMetrics
from diptych.recipes.data.image_batches import (
    ImageRows,
    PairBatch,
    evaluation_loader,
    labelled_batch,
)
from diptych.recipes.data.image_table import ImageRow, ImageTable
from diptych.recipes.data.rows import DataError
from diptych.recipes.encoder import TEMPLATES, Encoder
from diptych.recipes.settings import Settings
from diptych.recipes.towers.models import TwoTowers

Part = Literal["all", "train", "val", "test"]
NEIGHBOURS = 20
"""The neighbours that vote for a class, if there are so many images."""


@attrs.frozen
class Results:
    """What a model reaches, beside what chance does.

    Attributes:
        values: the values by name.
        chance: the expected values of random features or guesses, of those that have one.
    """

    values: dict[str, float]
    chance: dict[str, float]


def evaluate(encoder: Encoder, table: ImageTable, *, part: Part = "all") -> dict[str, float]:
    """Return what a model reaches on data.

    With captions: how often the caption of an image is found among all captions, and the image of a
    caption among all images. With classes: the accuracy of the model's own head, or without
    training, if it has a text tower; and the accuracies of the nearest neighbours and of a linear
    probe, of one half of the images by the other half (by the part to train on, if there is one).

    Args:
        encoder: the model.
        table: the data.
        part: the part of the data to evaluate on: a part that the data name, else one of the
            run: val is what was held out.

    Raises:
        DataError: if there is nothing to evaluate in the part.
    """
    return evaluate_with_chance(encoder, table, part=part).values


def evaluate_with_chance(encoder: Encoder, table: ImageTable, *, part: Part = "all") -> Results:
    """Return what a model reaches on data, as `evaluate` does, and what chance does."""
    rows = _rows_of(table, part, encoder.settings)
    has_text = isinstance(encoder.model, TwoTowers)
    captioned = has_text and any(row.has_caption for row in rows)
    labelled = [row for row in rows if row.label]
    if not captioned and not labelled:
        texts = "captions (--captions names their file) or " if has_text else ""
        raise DataError(f"{table.source} must have {texts}classes in --part {part}, got none.")
    found = _retrieval(encoder, rows) if captioned else Results({}, {})
    if labelled:
        guessed = _own_classes(encoder, labelled, table.classes, has_text=has_text)
        guessed |= _probes(encoder, table, labelled)
        found.values.update(guessed)
        found.chance.update(dict.fromkeys(guessed, 1 / len(table.classes)))
    return found


def _rows_of(table: ImageTable, part: Part, settings: Settings | None) -> Sequence[ImageRow]:
    # A run of shards held out one of them, which no names of images tell.
    held_out = 0.0 if settings is None or settings.shards is not None else settings.held_out
    parts = {"all": table.rows, **table.parts(held_out)}
    if not parts[part] and table.rows:
        sizes = ", ".join(f"{name} {len(rows):,}" for name, rows in parts.items())
        raise DataError(f"--part must have rows, got {part} of {table.source}: {sizes}.")
    return parts[part]


def _retrieval(encoder: Encoder, rows: Sequence[ImageRow]) -> Results:
    assert encoder.towers.text is not None
    collate, metric = PairBatch(encoder.towers.text.tokenize), RetrievalMetrics()
    values = _evaluated(encoder, rows, task=tasks.image_text, metrics=[metric], collate=collate)
    return Results(values, metric.chance)


def _own_classes(
    encoder: Encoder, rows: Sequence[ImageRow], classes: Sequence[str], *, has_text: bool
) -> dict[str, float]:
    """Return the accuracy of the model's head, or of the classes' names."""
    task: Task = _Labelled()
    metric: Metric
    if has_text:
        metric = ZeroShotAccuracy(
            [name.replace("_", " ") for name in classes],
            encode=lambda _, prompts: encoder.encode_texts(prompts),
            templates=TEMPLATES,
        )
    elif encoder.classes == tuple(classes):
        task, metric = tasks.classification, Accuracy()
    else:
        return {}
    return _evaluated(encoder, rows, task=task, metrics=[metric], classes=classes)


def _probes(encoder: Encoder, table: ImageTable, rows: Sequence[ImageRow]) -> dict[str, float]:
    """Return the accuracies of probes that are fitted to one part of the images."""
    parts = table.parts(held_out=0.5)
    bank = [row for row in parts["train"] if row.label]
    queries = [row for row in rows if row not in set(bank)]
    if len(bank) < 2 or not queries:
        return {}
    loader = evaluation_loader(
        _labelled_rows(encoder, bank, table.classes), labelled_batch, workers=encoder.workers
    )
    metrics = [KNNAccuracy(loader, k=min(NEIGHBOURS, len(bank))), LinearProbeAccuracy(loader)]
    return _evaluated(encoder, queries, task=_Labelled(), metrics=metrics, classes=table.classes)


def _labelled_rows(encoder: Encoder, rows: Sequence[ImageRow], classes: Sequence[str]) -> ImageRows:
    return ImageRows(rows, encoder.towers.image.resize, classes=classes)


def _evaluated(
    encoder: Encoder,
    rows: Sequence[ImageRow],
    *,
    task: Task,
    metrics: Sequence[Metric],
    collate: Any = labelled_batch,
    classes: Sequence[str] = (),
) -> dict[str, float]:
    loader = evaluation_loader(
        _labelled_rows(encoder, rows, classes), collate, workers=encoder.workers
    )
    evaluator = Evaluator(
        encoder.model,
        task=task,
        metrics=metrics,
        precision=encoder.precision,
        device=encoder.device,
    )
    return evaluator.evaluate(loader)


class _Labelled:
    """A task: the features of images, without a head, and their labels."""

    prediction = None

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor], /) -> dict[str, Tensor]:
        encode: Any = model.encode_image
        return {"features": encode(batch["image"]), "labels": batch["label"]}
