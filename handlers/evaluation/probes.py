"""Probes: what a linear head, the nearest neighbours or class prompts make of frozen features."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Engine
from ignite.exceptions import NotComputableError
from ignite.metrics import Metric
from torch import Tensor, nn

from diptych.engine.checks import is_whole
from diptych.engine.distributed.collectives import sum_over_ranks
from diptych.engine.distributed.dtensor import call_on
from diptych.engine.distributed.gathering import rows_of_all_ranks
from diptych.engine.errors import BatchError
from diptych.engine.evaluator import Evaluator

Outputs = Mapping[str, Tensor]

QUERIES, ROWS = 512, 8192
"""Queries and rows of the bank whose similarities are held at once."""


class ProbeAccuracy(Metric):
    """The share of an evaluator's samples that a probe of its features classifies right, in [0, 1].

    The output of the evaluator's task holds features [B, D] and integer labels [B], from 0:

    ```python
    def labelled(model, batch):
        return {"features": model.encode_image(batch["image"]), "labels": batch["label"]}
    ```

    Event: Ignite's for metrics.
    Cost: the subclass says.

    Args:
        output_transform: from the evaluator's output to such a mapping.

    Raises:
        BatchError: while running: if the mapping lacks features or labels, or they do not fit.
        NotComputableError: if it has seen no samples.
    """

    def __init__(self, output_transform: Callable[[Any], Outputs] = lambda output: output) -> None:
        super().__init__(output_transform)

    def reset(self) -> None:
        """Forget what was seen."""
        self._right: list[Tensor] = []
        self._seen = 0

    @abstractmethod
    def predict(self, features: Tensor) -> Tensor:
        """Return the class of each row.

        Args:
            features: unit features, float32 [B, D].
        """

    @torch.no_grad()
    def started(self, engine: Engine) -> None:
        """Forget what was seen, and learn what there is to learn."""
        self.reset()
        if not isinstance(engine, Evaluator):
            raise TypeError(f"a probe asks a model, so it needs an Evaluator, got {engine!r}")
        self.prepare(engine)

    @abstractmethod
    def prepare(self, evaluator: Evaluator) -> None:
        """Learn from the evaluator's model what predictions need."""

    @torch.no_grad()
    def iteration_completed(self, engine: Engine) -> None:
        """Take the output of an evaluator's iteration."""
        self.update(self._output_transform(engine.state.output))

    @torch.no_grad()
    def update(self, output: Outputs) -> None:
        """Classify a batch.

        Args:
            output: `features` [B, D] and `labels` [B].
        """
        features, labels = labelled_features(output)
        self._right.append((self.predict(features) == labels).sum())
        self._seen += len(labels)

    @torch.no_grad()
    def compute(self) -> float:
        """Return the share of right classes over all that was seen, on all ranks."""
        device = self._right[0].device if self._right else self._device
        right = torch.stack(self._right).sum() if self._right else torch.zeros((), device=device)
        counts = torch.stack([right.double(), right.new_tensor(self._seen).double()])
        total, seen = sum_over_ranks(counts).tolist()
        if not seen:
            raise NotComputableError(f"{type(self).__name__} needs at least one sample")
        return float(total / seen)


class BankProbe(ProbeAccuracy):
    """A probe that learns from a bank of labelled features, and predicts those of others.

    In an `Evaluation` the bank is encoded anew, by the same model and task, each time that an
    evaluation starts. By hand: `remember` each batch, `fit` once, then `update` and `compute`.

    Args:
        bank: batches to learn from, of other samples than those that are evaluated; None: by hand
            only. Over ranks each rank's loader gives its shard, of any size.
        output_transform: from the evaluator's output to a mapping with `features` and `labels`.
    """

    def __init__(
        self,
        bank: Iterable[Any] | None = None,
        *,
        output_transform: Callable[[Any], Outputs] = lambda output: output,
    ) -> None:
        self._bank = bank
        self._features: list[Tensor] = []
        self._labels: list[Tensor] = []
        super().__init__(output_transform)

    def prepare(self, evaluator: Evaluator) -> None:
        """Encode the bank and fit."""
        if self._bank is None:
            raise ValueError(
                f"{type(self).__name__} needs a bank of batches to learn from, got none"
            )
        self._features, self._labels, self._device = [], [], evaluator.device
        for batch in self._bank:
            self.remember(self._output_transform(evaluator.outputs(batch)))
        self.fit()

    @torch.no_grad()
    def remember(self, output: Outputs) -> None:
        """Add a batch to the bank.

        Args:
            output: `features` [B, D] and `labels` [B].
        """
        features, labels = labelled_features(output)
        self._features.append(features)
        self._labels.append(labels)

    @abstractmethod
    def fit(self) -> None:
        """Learn from the bank; on every rank, once, after the last `remember`."""

    def _bank_of_this_rank(self) -> tuple[Tensor, Tensor]:
        """Return features [N, D] and labels [N]; without any, [0, 0] and [0]."""
        if not self._features:
            device = self._device
            return torch.empty(0, 0, device=device), torch.empty(
                0, dtype=torch.int64, device=device
            )
        return torch.cat(self._features), torch.cat(self._labels)


class KNNAccuracy(BankProbe):
    """The accuracy of the k nearest neighbours' weighted vote.

    Each of the k rows of the bank that are most similar to a query votes for its label with
    exp(cosine similarity / temperature); the class with most votes wins.

    Source: Wu et al. 2018, arXiv:1805.01978.

    Event: Ignite's for metrics; the bank is encoded when an epoch of its evaluator starts.
    Cost: a forward pass over the bank, and one product of queries and bank, in tiles: memory is the
        bank's unit features in float32, of all ranks on each, and k numbers for each query of a
        batch. Queries are not kept.

    Args:
        bank: as for every probe with a bank.
        k: neighbours, >= 1 and at most the rows of the bank.
        temperature: of the votes, > 0.
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
        output_transform: Callable[[Any], Outputs] = lambda output: output,
    ) -> None:
        if not is_whole(k):
            raise ValueError(f"k must be a whole number >= 1, got {k!r}")
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature!r}")
        self.k, self.temperature, self._classes = k, temperature, 0
        super().__init__(bank, output_transform=output_transform)

    @torch.no_grad()
    def fit(self) -> None:
        """Put the bank of all ranks in one place."""
        features, labels = self._bank_of_this_rank()
        features, labels = rows_of_all_ranks(features), rows_of_all_ranks(labels)
        if len(labels) < self.k:
            raise BatchError(
                f"k must be at most the number of rows in the bank, got k={self.k} and "
                f"{len(labels)} rows: give a smaller k"
            )
        lowest, highest = torch.stack(labels.aminmax()).tolist()
        if lowest < 0:
            raise BatchError(f"the bank's labels must be >= 0, got {lowest}: leave such rows out")
        self._features, self._labels = [features], [labels]
        self._classes = highest + 1

    def predict(self, features: Tensor) -> Tensor:
        """Return the class that wins the vote."""
        if not self._classes:
            raise NotComputableError("KNNAccuracy must fit its bank before it predicts")
        return torch.cat([self._vote(queries) for queries in features.split(QUERIES)])

    def _vote(self, queries: Tensor) -> Tensor:
        similarity = queries.new_full((len(queries), 0), 0.0)
        labels = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        bank = zip(self._features[0].split(ROWS), self._labels[0].split(ROWS), strict=True)
        for rows, own in bank:
            similarity = torch.cat([similarity, queries @ rows.T], dim=1)
            labels = torch.cat([labels, own.expand(len(queries), -1)], dim=1)
            similarity, nearest = similarity.topk(min(self.k, similarity.shape[1]), dim=1)
            labels = labels.gather(1, nearest)
        # Relative to the nearest, so that no temperature overflows or leaves nothing.
        nearest_of_all = similarity.amax(dim=1, keepdim=True)
        weights = ((similarity - nearest_of_all) / self.temperature).double().exp()
        votes = weights.new_zeros(len(queries), self._classes)
        return votes.scatter_add_(1, labels, weights).argmax(1)


class ZeroShotAccuracy(ProbeAccuracy):
    """The accuracy of classification by prompts: the class whose text is nearest wins.

    Each class name goes into each template; a class is the mean of the unit features of its
    prompts, made unit again.

    ```python
    ZeroShotAccuracy(
        ["cat", "dog"],
        templates=["a photo of a {}.", "a drawing of a {}."],
        encode=lambda model, prompts: model.encode_text(tokenize(prompts)),
    )
    ```

    Source: Radford et al. 2021, arXiv:2103.00020, section 3.1.

    Event: Ignite's for metrics; prompts are encoded when an epoch of its evaluator starts.
    Cost: the text tower once for each class and template, on every rank; then one product of a
        batch and the classes.

    Args:
        classes: their names, in the order of the labels.
        templates: each holds "{}", where the name goes.
        encode: returns features [P, D], on any device, of a model and a list of P prompts.
        prompts: that are encoded at once, >= 1.
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
        output_transform: Callable[[Any], Outputs] = lambda output: output,
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
        super().__init__(output_transform)

    def prepare(self, evaluator: Evaluator) -> None:
        """Encode the prompts of every class."""
        self.fit(evaluator.model, evaluator.device)

    @torch.no_grad()
    def fit(self, model: nn.Module, device: torch.device | str | None = None) -> Tensor:
        """Return the unit features of the classes, [C, D], which predictions use from now on.

        Args:
            model: what `encode` takes.
            device: of the features; None: where `encode` leaves them.
        """
        texts = [t.replace("{}", name) for name in self.classes for t in self.templates]
        starts = range(0, len(texts), self.prompts)
        parts = [
            call_on(self.encode, model, texts[i : i + self.prompts]).to(device) for i in starts
        ]
        prompts = F.normalize(torch.cat(parts).float(), dim=1)
        if len(prompts) != len(texts):
            raise BatchError(
                f"encode must return one row for each of {len(texts)} prompts, got {len(prompts)}"
            )
        means = prompts.view(len(self.classes), len(self.templates), -1).mean(1)
        self._class_features = F.normalize(means, dim=1)
        return self._class_features

    def predict(self, features: Tensor) -> Tensor:
        """Return the class whose prompts are nearest."""
        if self._class_features is None:
            raise NotComputableError("ZeroShotAccuracy must encode its prompts before it predicts")
        return (features @ self._class_features.to(features.device).T).argmax(1)


def labelled_features(output: Outputs) -> tuple[Tensor, Tensor]:
    """Return unit features, float32 [B, D], and labels, int64 [B], of a task's output.

    Raises:
        BatchError: if one of them is missing or they do not fit together.
    """
    if not {"features", "labels"} <= set(output):
        raise BatchError(
            f"a probe needs features and labels, got {', '.join(output) or 'nothing'}: use a task "
            "of its own, or output_transform"
        )
    features, labels = output["features"], output["labels"]
    if features.ndim != 2:
        raise BatchError(f"features must be [B, D], got shape {tuple(features.shape)}")
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise BatchError(
            f"labels must be integers [{len(features)}], got {labels.dtype} {tuple(labels.shape)}"
        )
    unit = F.normalize(features.detach().float(), dim=1)
    return unit, labels.detach().to(features.device, torch.int64)
