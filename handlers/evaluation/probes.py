"""Probes of frozen features: nearest neighbours, class prompts, and the base classes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Engine
from ignite.exceptions import NotComputableError
from torch import Tensor, nn

from diptych.engine.checks import is_whole
from diptych.engine.distributed.dtensor import call_on
from diptych.engine.distributed.gathering import gather_rows
from diptych.engine.errors import BatchError
from diptych.engine.evaluator import Evaluator
from diptych.engine.trials.first_batches import first_batches
from diptych.handlers.evaluation.known_ids import KnownIds
from diptych.handlers.evaluation.label_accuracy import Average, LabelAccuracy
from diptych.handlers.evaluation.outputs_metric import (
    Outputs,
    OutputTransform,
    check_features,
    check_ids,
    unchanged,
)

QUERIES, ROWS = 512, 8192
"""Queries and rows of the bank whose similarities are in memory at once."""


class ProbeAccuracy(LabelAccuracy):
    """The share of an evaluator's samples that a probe classifies correctly, in [0, 1].

    The evaluator's task returns features [B, D] and integer labels [B], counted from 0. A sample
    with the label -100 has none, and is left out:

    ```python
    def labelled(model, batch):
        return {"features": model.encode_image(batch["image"]), "labels": batch["label"]}
    ```

    Event: Ignite's for metrics.
    Cost: stated by each subclass.

    Args:
        top: as in `ClassificationAccuracy`.
        average: as in `ClassificationAccuracy`.
        output_transform: from the evaluator's output to such a mapping.

    Raises:
        BatchError: while running: if the mapping lacks features or labels, or they do not fit.
        NotComputableError: if it has seen no samples with a label.
    """

    _predicts = True  # False in a trial

    @abstractmethod
    def scores(self, features: Tensor) -> Tensor:
        """Return the score of each class for each row, [B, C]; the highest one is predicted.

        Args:
            features: unit features, float32 [B, D].
        """

    @torch.no_grad()
    def started(self, engine: Engine) -> None:
        """Reset the metric and prepare the probe."""
        self.reset()
        if not isinstance(engine, Evaluator):
            raise TypeError(
                f"{type(self).__name__} must be attached to an Evaluator, whose model it uses, "
                f"got {engine!r}"
            )
        self._predicts = not engine.partial
        if self._predicts:
            self.prepare(engine)
        else:
            self.check(engine)

    @abstractmethod
    def prepare(self, evaluator: Evaluator) -> None:
        """Compute from the evaluator's model what predictions need."""

    @abstractmethod
    def check(self, evaluator: Evaluator) -> None:
        """Check, on as little data as possible, that `prepare` would succeed."""

    @torch.no_grad()
    def update(self, output: Outputs) -> None:
        """Classify a batch.

        The output holds `features` [B, D] and `labels` [B].
        """
        features, labels = labelled_features(output)
        if self._predicts:
            self.count(self.scores(features), labels)


class BankProbe(ProbeAccuracy):
    """A probe that learns from a bank of labelled features.

    In an `Evaluation`, the model and task being evaluated encode the bank again each time an
    evaluation starts. To use it by hand, `remember` each batch, `fit` once, then `update` and
    `compute`.

    Args:
        bank: batches to learn from, of other samples than those that are evaluated; None: for use
            by hand. In a process group, each rank's loader gives its shard, of any size. Its
            samples with the label -100 are left out.
        top: as in `ClassificationAccuracy`.
        average: as in `ClassificationAccuracy`.
        output_transform: from the evaluator's output to a mapping with `features` and `labels`.
    """

    def __init__(
        self,
        bank: Iterable[Any] | None = None,
        *,
        top: int = 1,
        average: Average = "samples",
        output_transform: OutputTransform = unchanged,
    ) -> None:
        self._bank = bank
        self._features: list[Tensor] = []
        self._labels: list[Tensor] = []
        super().__init__(top=top, average=average, output_transform=output_transform)

    def prepare(self, evaluator: Evaluator) -> None:
        """Encode the bank and fit."""
        self._features, self._labels, self._device = [], [], evaluator.device
        for batch in self._own_bank:
            self.remember(self._output_transform(evaluator.outputs(batch)))
        self.fit()

    def check(self, evaluator: Evaluator) -> None:
        """Encode the first batch of the bank."""
        for batch in first_batches(self._own_bank):
            labelled_features(self._output_transform(evaluator.outputs(batch)))

    @property
    def _own_bank(self) -> Iterable[Any]:
        if self._bank is None:
            raise ValueError(
                f"{type(self).__name__} needs a bank of batches to learn from, got none"
            )
        return self._bank

    @torch.no_grad()
    def remember(self, output: Outputs) -> None:
        """Add a batch to the bank.

        The output holds `features` [B, D] and `labels` [B].
        """
        features, labels = labelled_features(output)
        self._features.append(features)
        self._labels.append(labels)

    @abstractmethod
    def fit(self) -> None:
        """Learn from the bank. Call it on every rank, once, after the last `remember`."""

    def _local_bank(self) -> tuple[Tensor, Tensor]:
        """Return this rank's labelled features [N, D] and labels; [0, 0] and [0] if it has none."""
        if self._features:
            labels = torch.cat(self._labels)
            known = KnownIds("the bank's labels")
            has_label = known.mask(labels)
            known.report(type(self).__name__)
            features = torch.cat(self._features)[has_label]
            # One row of NaN would spoil the results of all queries.
            finite = features.isfinite().all(1, keepdim=True)
            return features.masked_fill(~finite, 0), labels[has_label]
        empty = torch.empty(0, 0, device=self._device)
        return empty, empty.long().flatten()


class KNNAccuracy(BankProbe):
    """The accuracy of a weighted vote of the k nearest neighbours.

    Each of the k rows of the bank that are most similar to a query votes for its label with
    exp(cosine similarity / temperature); the class with the most votes wins.

    Source: Wu et al. 2018, arXiv:1805.01978.

    Event: Ignite's for metrics; the bank is encoded when an epoch of its evaluator starts.
    Cost: a forward pass over the bank, and one product of queries and bank, in tiles. Memory: the
        bank's unit features in float32, those of all ranks on each, and k numbers for each query of
        a batch. Queries are not kept.

    Args:
        bank: as for every probe with a bank.
        k: neighbours, >= 1 and at most the rows of the bank.
        temperature: of the votes, > 0.
        top: as in `ClassificationAccuracy`.
        average: as in `ClassificationAccuracy`.
        output_transform: from the evaluator's output to a mapping with `features` and `labels`.

    Raises:
        ValueError: if k or the temperature is out of range.
        BatchError: while running: if the bank has fewer than k rows, or an output does not fit.
    """

    def __init__(
        self,
        bank: Iterable[Any] | None = None,
        *,
        k: int = 200,
        temperature: float = 0.1,
        top: int = 1,
        average: Average = "samples",
        output_transform: OutputTransform = unchanged,
    ) -> None:
        if not is_whole(k):
            raise ValueError(f"k must be a whole number >= 1, got {k!r}")
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature!r}")
        self.k, self.temperature, self._classes = k, temperature, 0
        super().__init__(bank, top=top, average=average, output_transform=output_transform)

    @torch.no_grad()
    def fit(self) -> None:
        """Gather the bank of all ranks."""
        features, labels = (gather_rows(rows) for rows in self._local_bank())
        if len(labels) < self.k:
            raise BatchError(
                f"k must be at most the number of rows in the bank, got k={self.k} and "
                f"{len(labels)} rows. Use a smaller k"
            )
        self._features, self._labels = [features], [labels]
        self._classes = int(labels.max()) + 1

    def scores(self, features: Tensor) -> Tensor:
        """Return the votes for each class."""
        if not self._classes:
            raise NotComputableError("KNNAccuracy must fit its bank before it predicts")
        return torch.cat([self._vote(queries) for queries in features.split(QUERIES)])

    def _vote(self, queries: Tensor) -> Tensor:
        similarity = queries.new_empty(len(queries), 0)
        labels = similarity.long()
        bank = zip(self._features[0].split(ROWS), self._labels[0].split(ROWS), strict=True)
        for rows, own in bank:
            similarity = torch.cat([similarity, queries @ rows.T], dim=1)
            labels = torch.cat([labels, own.expand(len(queries), -1)], dim=1)
            similarity, nearest = similarity.topk(min(self.k, similarity.shape[1]), dim=1)
            labels = labels.gather(1, nearest)
        # Relative to the nearest neighbour, so that no temperature overflows or underflows to zero.
        highest = similarity.amax(dim=1, keepdim=True)
        weights = ((similarity - highest) / self.temperature).double().exp()
        votes = weights.new_zeros(len(queries), self._classes)
        return votes.scatter_add_(1, labels, weights)


class ZeroShotAccuracy(ProbeAccuracy):
    """The accuracy of zero-shot classification: the class with the nearest prompts wins.

    Each class name is inserted into each template. The features of a class are the normalised mean
    of the unit features of its prompts.

    ```python
    ZeroShotAccuracy(
        ["cat", "dog"],
        templates=["a photo of a {}.", "a drawing of a {}."],
        encode=lambda model, prompts: model.encode_text(tokenize(prompts)),
    )
    ```

    Source: Radford et al. 2021, arXiv:2103.00020, section 3.1.

    Event: Ignite's for metrics; prompts are encoded when an epoch of its evaluator starts.
    Cost: the text tower once for each class and template, on every rank; then one product of each
        batch and the classes.

    Args:
        classes: class names, in the order of the labels.
        templates: texts with "{}" where the name goes.
        encode: a function of a model and a list of P prompts that returns features [P, D], on any
            device.
        prompts: the number of prompts encoded at once, >= 1.
        top: as in `ClassificationAccuracy`.
        average: as in `ClassificationAccuracy`.
        output_transform: from the evaluator's output to a mapping with `features` and `labels`.

    Raises:
        ValueError: if there are no classes or templates, or a template lacks "{}".
        BatchError: while running: if `encode` returns too few rows, or an output does not fit.
    """

    def __init__(
        self,
        classes: Sequence[str],
        *,
        encode: Callable[[nn.Module, list[str]], Tensor],
        templates: Sequence[str] = ("{}",),
        prompts: int = 256,
        top: int = 1,
        average: Average = "samples",
        output_transform: OutputTransform = unchanged,
    ) -> None:
        if isinstance(classes, str) or not classes:
            raise ValueError(f"classes must be one name or more, in a list, got {classes!r}")
        if isinstance(templates, str) or not templates or any("{}" not in t for t in templates):
            raise ValueError(f"templates must be a list of texts with '{{}}', got {templates!r}")
        if prompts < 1:
            raise ValueError(f"prompts must be >= 1, got {prompts}")
        self.classes, self.templates = tuple(classes), tuple(templates)
        self.encode, self.prompts = encode, prompts
        self._class_features: Tensor | None = None
        super().__init__(top=top, average=average, output_transform=output_transform)

    def prepare(self, evaluator: Evaluator) -> None:
        """Encode the prompts of every class."""
        self.fit(evaluator.model, evaluator.device)

    def check(self, evaluator: Evaluator) -> None:
        """Encode the first prompt."""
        call_on(self.encode, evaluator.model, [self.templates[0].replace("{}", self.classes[0])])

    @torch.no_grad()
    def fit(self, model: nn.Module, device: torch.device | str | None = None) -> Tensor:
        """Encode the classes, and return their unit features [C, D]; predictions use them.

        Args:
            model: the model passed to `encode`.
            device: of the features; None: the device on which `encode` returns them.
        """
        texts = [t.replace("{}", name) for name in self.classes for t in self.templates]
        starts = range(0, len(texts), self.prompts)
        parts = [
            call_on(self.encode, model, texts[i : i + self.prompts]).to(device) for i in starts
        ]
        prompts = F.normalize(torch.cat(parts).float(), dim=1)
        if len(prompts) != len(texts):
            raise BatchError(
                f"encode must return one row for each prompt, got {len(prompts)} rows for "
                f"{len(texts)} prompts"
            )
        means = prompts.view(len(self.classes), len(self.templates), -1).mean(1)
        self._class_features = F.normalize(means, dim=1)
        return self._class_features

    def scores(self, features: Tensor) -> Tensor:
        """Return the similarity to each class."""
        if self._class_features is None:
            raise NotComputableError("ZeroShotAccuracy must encode its prompts before it predicts")
        return features @ self._class_features.to(features.device).T


def labelled_features(output: Outputs) -> tuple[Tensor, Tensor]:
    """Return unit features, float32 [B, D], and labels, int64 [B], of a task's output.

    Raises:
        BatchError: if one of them is missing or they do not fit together.
    """
    if not {"features", "labels"} <= set(output):
        raise BatchError(
            f"a probe needs features and labels, got {', '.join(output) or 'nothing'}. Give its "
            "Evaluation a task that returns both, or use output_transform"
        )
    features, labels = output["features"], output["labels"]
    check_features(features)
    check_ids("labels", labels, len(features))
    unit = F.normalize(features.detach().float(), dim=1)
    return unit, labels.detach().to(features.device, torch.int64)
