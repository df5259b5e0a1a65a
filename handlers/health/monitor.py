"""Watches the representations of a run, and says in plain words when they are not healthy."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from ignite.engine import Events
from torch import Tensor

from diptych.engine.checks import whole_number
from diptych.engine.distributed.collectives import rank, sum_over_ranks
from diptych.engine.evaluator import Evaluator
from diptych.engine.events import MetricsEvents, StepEvents
from diptych.engine.metrics.metrics_collector import MetricsCollector, Record
from diptych.engine.tasks import Outputs
from diptych.engine.trainer import Trainer
from diptych.handlers.health import representation
from diptych.handlers.health.rules import RULES, Finding, History, Rule, names_between
from diptych.handlers.health.sources import (
    HeldOutPairs,
    Moving,
    bounded_scales,
    components,
    contents,
    position,
)

logger = logging.getLogger(__name__)


@attrs.define(kw_only=True, eq=False)
class RepresentationHealth:
    """Publishes how the features of a run fare, and warns once of each thing that is wrong.

    For each side (image, text; first, second):

    - `health/<side>/spread`, `dead_dimensions`: how evenly unit features fill their dimensions;
    - `health/<side>/uniformity` (arXiv:2005.10242), `health/<side>/rankme` (arXiv:2210.02885), and
      `rank_share`, RankMe as a share of what it could be.

    For two sides:

    - `health/positive_similarity`, `negative_similarity`, `margin`, `auroc`,
      `alignment` (arXiv:2005.10242), and `health/modality_gap` (arXiv:2203.02053), the distance
      of the sides' means;
    - `health/lidar` (arXiv:2312.04000), where the sides are views of one kind;
    - `health/loss_over_chance`: the loss over ln(global batch): 1 is what an InfoNCE loss has at
      chance;
    - `health/<evaluation's prefix>/auroc`: the same of held-out pairs, where an `Evaluation` has
      both sides in its outputs;
    - `health/duplicates`: the share of samples with a false negative in their batch: equal text in
      the batch (the task's `text`), or equal features, in another group;
    - `health/temperature_position`: where ln(temperature) stands between its bounds: 0 the
      warmest, 1 the coldest.

    And `health/<component>/moving`: of each child of the model, the share of its weights' tensors
    that have changed since the last log point.

    Rules judge these values at the log points: see `diptych.handlers.health.rules`. A rule that
    fires logs a warning on rank 0 and leaves a `Finding` in `findings`, once in a run. Rules
    rest until the learning rate has not risen for `warmup` iterations, and fire when `patience`
    records in a row say so.

    Event: `StepEvents.LOSS_COMPUTED` every `every` iterations; `MetricsEvents.LOGGED`; an
        evaluation's iterations.
    Cost: products of at most `samples` x `samples` x D, four every `every` iterations, without a
        synchronisation; at each log point two decompositions of D x D (of `samples` rows where
        these are fewer) and the norms of all weights. Over ranks, statistics of pairs are those of
        each rank's batch, averaged; spread, gap and spectra are those of the global batch, by one
        sum of D (D x D at log points) numbers.

    Args:
        every: iterations between two looks.
        features: names of one or two of the task's outputs, [B, D]; None: the first two that end in
            "_features".
        samples: pairs of this rank's batch that are looked at, at most, >= 2.
        warmup: iterations after the learning rate's rise in which no rule fires.
        patience: records in a row that must agree.
        rules: what is judged, in this order.

    Attributes:
        findings: what rules have found, in order.

    Raises:
        ValueError: if an argument is out of range.
        BatchError: while running: if the task's outputs lack the features, or they are not [B, D].
    """

    every: int = attrs.field(default=10, validator=whole_number())
    features: Sequence[str] | None = None
    samples: int = attrs.field(default=1024, validator=whole_number(2))
    warmup: int = attrs.field(default=200, validator=whole_number(0))
    patience: int = attrs.field(default=3, validator=whole_number())
    rules: Sequence[Rule] = RULES
    findings: list[Finding] = attrs.field(factory=list, init=False)
    _metrics: MetricsCollector = attrs.field(init=False, repr=False)
    _kept: dict[str, Tensor] = attrs.field(factory=dict, init=False, repr=False)
    _spectra: dict[str, float] = attrs.field(factory=dict, init=False, repr=False)
    _moving: dict[str, Moving] = attrs.field(factory=dict, init=False, repr=False)
    _records: deque[Record] = attrs.field(init=False, repr=False)
    _first: Record | None = attrs.field(default=None, init=False, repr=False)
    _peaks: dict[str, float] = attrs.field(factory=dict, init=False, repr=False)
    _held_out: dict[str, list[float]] = attrs.field(factory=dict, init=False, repr=False)
    _watched: list[Evaluator] = attrs.field(factory=list, init=False, repr=False)
    _rate_peak: float = attrs.field(default=0.0, init=False, repr=False)
    _risen_at: int = attrs.field(default=0, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.features is not None and (
            isinstance(self.features, str) or len(self.features) not in (1, 2)
        ):
            raise ValueError(f"features must be one or two names, got {self.features!r}")
        self._records = deque(maxlen=self.patience)

    def attach(self, trainer: Trainer) -> None:
        """Look at the trainer's outputs and judge its records."""
        self._metrics = trainer.metrics
        trainer.add_event_handler(Events.STARTED, self._start)
        trainer.every(self.every, self._look, StepEvents.LOSS_COMPUTED)
        trainer.every(trainer.settings.log_every, self._keep, StepEvents.LOSS_COMPUTED)
        trainer.add_event_handler(MetricsEvents.LOGGED, self._judge)
        for name, scale in bounded_scales(trainer.loss).items():
            trainer.metrics.gauge(f"health/{name}", partial(position, scale))
        self._moving = {name: Moving(part) for name, part in components(trainer.model).items()}
        for name, moving in self._moving.items():
            trainer.metrics.gauge(f"health/{name}/moving", moving)

    # -- looking ---------------------------------------------------------------------------------

    def _start(self, trainer: Trainer) -> None:
        if trainer.state.iteration == 0:
            self._forget()
            for moving in self._moving.values():
                moving.start()
        for handler in trainer.handlers:
            evaluator = getattr(handler, "evaluator", None)
            if isinstance(evaluator, Evaluator) and evaluator not in self._watched:
                self._watched.append(evaluator)
                prefix = str(getattr(handler, "prefix", "val"))
                HeldOutPairs(self._pairs_of, partial(self._hold_out, trainer, prefix)).attach(
                    evaluator
                )

    def _forget(self) -> None:
        for name in self._spectra:
            self._metrics.remove_gauge(f"health/{name}")
        for kept in (self.findings, self._spectra, self._records, self._peaks, self._held_out):
            kept.clear()
        self._first, self._rate_peak, self._risen_at = None, 0.0, 0

    @torch.no_grad()
    def _look(self, trainer: Trainer) -> None:
        sides = self._sides(trainer.outputs)
        values: dict[str, Tensor] = {}
        means = []
        for name, side in sides.items():
            mean, deviation = representation.moments(side)
            own = {
                **representation.spread(deviation),
                "uniformity": representation.uniformity(side),
            }
            values.update({f"{name}/{key}": value for key, value in own.items()})
            means.append(mean)
        if len(sides) == 2:
            first, second = sides.values()
            negatives = representation.strangers_in(trainer.outputs, len(first))
            values.update(representation.pairs(first, second, negatives))
            values["modality_gap"] = (means[0] - means[1]).norm()
            values["loss_over_chance"] = self._loss_over_chance(trainer)
            numbers = contents(trainer, self.samples)
            values["duplicates"] = representation.duplicates([first, second], numbers, negatives)
        trainer.metrics.update({f"health/{name}": value for name, value in values.items()})

    def _sides(self, outputs: Outputs) -> dict[str, Tensor]:
        return representation.sides_of(outputs, self.features, rows=self.samples)

    def _pairs_of(self, outputs: Outputs) -> dict[str, Tensor] | None:
        """Return the pair statistics of an evaluation's batch, if it has both sides."""
        names = self.features or [name for name in outputs if name.endswith("_features")]
        if len(names) < 2 or not set(names) <= set(outputs):
            return None
        first, second = self._sides(outputs).values()
        strangers = representation.strangers_in(outputs, len(first))
        return representation.pairs(first, second, strangers)

    def _loss_over_chance(self, trainer: Trainer) -> Tensor:
        loss = torch.stack([term.float() for term in trainer.terms.values()]).sum()
        size = len(next(value for value in trainer.outputs.values() if value.ndim))
        return loss / sum_over_ranks(loss.new_full((), float(size))).log()

    @torch.no_grad()
    def _keep(self, trainer: Trainer) -> None:
        # The log point of this very iteration takes the spectra: nothing is left for a checkpoint.
        self._kept = self._sides(trainer.outputs)
        if not self._spectra:
            names = [f"{side}/{name}" for side in self._kept for name in ("rankme", "rank_share")]
            views = [*self._kept] == ["first", "second"]
            self._spectra = dict.fromkeys([*names, *(["lidar"] if views else [])], math.nan)
            self._publish_spectra()

    def _publish_spectra(self) -> None:
        for name in self._spectra:
            self._metrics.gauge(f"health/{name}", partial(self._spectrum, name))

    @torch.no_grad()
    def _spectrum(self, name: str) -> Tensor | float:
        if not self._kept:
            return self._spectra[name]
        if name == "lidar":
            return representation.lidar([*self._kept.values()])
        side, _, kind = name.partition("/")
        features = self._kept[side]
        effective = representation.rankme(representation.gram(features))
        if kind == "rankme":
            return effective
        rows = sum_over_ranks(effective.new_tensor(float(len(features))))
        return effective / rows.clamp(max=features.shape[1])

    # -- judging ---------------------------------------------------------------------------------

    def _hold_out(self, trainer: Trainer, prefix: str, auroc: float) -> None:
        values = self._held_out.setdefault(prefix, [])
        values.append(auroc)
        del values[: -self.patience]
        trainer.metrics.report(trainer.state.iteration, {f"health/{prefix}/auroc": auroc})

    def _judge(self, trainer: Trainer) -> None:
        record = trainer.metrics.record
        for name in self._spectra:
            self._spectra[name] = record.values.get(f"health/{name}", self._spectra[name])
        if not names_between("health/", "/spread", record.values):
            return  # an evaluation's record, or one without a look
        self._kept = {}
        record = Record(record.step, {t: v for t, v in record.values.items() if "health/" in t})
        self._first = self._first or record
        self._records.append(record)
        rate = self._rate(trainer)
        if len(self._records) < self.patience:
            return
        self._raise_peaks(record)
        if record.step - self._risen_at >= self.warmup:
            self._apply(self._history(self._first, rate))

    def _raise_peaks(self, record: Record) -> None:
        for tag in record.values:
            mean = sum(r.values.get(tag, math.nan) for r in self._records) / self.patience
            self._peaks[tag] = max(mean, self._peaks.get(tag, mean))

    def _history(self, first: Record, rate: float) -> History:
        return History(
            records=tuple(self._records),
            first=first,
            peaks=self._peaks,
            held_out={n: v for n, v in self._held_out.items() if len(v) == self.patience},
            rate=rate,
            frozen=frozenset(name for name, m in self._moving.items() if m.frozen),
        )

    def _apply(self, history: History) -> None:
        for rule in self.rules:
            silenced = {rule.name, *rule.unless} & {finding.rule for finding in self.findings}
            evidence = None if silenced else rule.judge(history)
            if evidence is not None:
                finding = Finding(rule.name, history.records[-1].step, evidence, rule.remedy)
                self.findings.append(finding)
                if rank() == 0:
                    logger.warning("%s", finding)

    def _rate(self, trainer: Trainer) -> float:
        """Return the learning rate as a share of its peak, and note when it last rose."""
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        rate = max((float(value) for value in rates), default=0.0)
        if rate > self._rate_peak * (1 + 1e-6):
            self._risen_at = trainer.state.iteration if self._rate_peak else 0
            self._rate_peak = rate
        return rate / self._rate_peak if self._rate_peak else 1.0

    # -- memory ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen and found, as numbers and texts."""
        return {
            "findings": [attrs.asdict(finding) for finding in self.findings],
            "records": [[record.step, dict(record.values)] for record in self._records],
            "first": [self._first.step, dict(self._first.values)] if self._first else None,
            "peaks": dict(self._peaks),
            "held_out": {name: list(values) for name, values in self._held_out.items()},
            "rate": [self._rate_peak, self._risen_at],
            "spectra": dict(self._spectra),
            "moving": {name: moving.state() for name, moving in self._moving.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` returned."""
        self.findings[:] = [Finding(**finding) for finding in state_dict["findings"]]
        self._records = deque([Record(*r) for r in state_dict["records"]], maxlen=self.patience)
        self._first = Record(*state_dict["first"]) if state_dict["first"] else None
        self._peaks = dict(state_dict["peaks"])
        self._held_out = {name: list(values) for name, values in state_dict["held_out"].items()}
        self._rate_peak, self._risen_at = state_dict["rate"]
        self._spectra = dict(state_dict["spectra"])
        self._publish_spectra()
        for name, moving in self._moving.items():
            moving.start(state_dict["moving"].get(name))
