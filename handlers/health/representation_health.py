"""Monitoring of representations: statistics of the features, and warnings if they are unhealthy."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from textwrap import fill
from typing import Any, ClassVar, cast

import attrs
import torch
from ignite.engine import Events
from torch import Tensor

from diptych.engine.checks import whole_number
from diptych.engine.distributed.collectives import all_reduce_sum, rank
from diptych.engine.errors import BatchError
from diptych.engine.evaluator import EvaluatesModel, Evaluator
from diptych.engine.events import MetricsEvents, StepEvents
from diptych.engine.handler import Finding, Handler
from diptych.engine.metrics.metrics_collector import MetricsCollector, Record
from diptych.engine.modules import named_parameters
from diptych.engine.tasks import ImageText, Outputs
from diptych.engine.trainer import Trainer
from diptych.handlers.cadence import call_in_short_runs, log_point_period
from diptych.handlers.components import default_components
from diptych.handlers.health import feature_statistics
from diptych.handlers.health.feature_statistics import name_count
from diptych.handlers.health.parameter_gauges import MovingShare, temperature_positions
from diptych.handlers.health.rules import RULES, History, Rule, names_between

logger = logging.getLogger(__name__)


@attrs.define(kw_only=True, eq=False)
class RepresentationHealth(Handler):
    """Publishes statistics of the features, and warns once about each problem it finds.

    For each side (image, text; first, second):

    - `health/<side>/spread`, `dead_dimensions`: how evenly unit features fill their dimensions;
    - `health/<side>/uniformity` (arXiv:2005.10242), `health/<side>/rankme` (arXiv:2210.02885), and
      `rank_share`, RankMe as a share of its maximum.

    For two sides:

    - `health/positive_similarity`, `negative_similarity`, `margin`, `auroc`,
      `alignment` (arXiv:2005.10242), and `health/modality_gap` (arXiv:2203.02053), the distance
      between the means of the sides;
    - `health/lidar` (arXiv:2312.04000), if the sides are two views;
    - `health/loss_over_chance`: the loss over ln(global batch); an InfoNCE loss at chance has 1;
    - `health/<evaluation's prefix>/auroc`: the AUROC of held-out pairs, if an `Evaluation` has both
      sides in its outputs;
    - `health/duplicates`: the share of samples with a false negative in their batch: equal text
      (the task's `text`) or equal features, in another group;
    - `health/temperature_position`: the position of ln(1 / temperature) between its bounds, from 0,
      the largest temperature, to 1, the smallest.

    And `health/<component>/moving`: for each child of the model (of the wrapped model, if the model
    is only a wrapper), the share of its weight tensors that have changed since the last log point.

    Rules judge these values at the log points: see `diptych.handlers.health.rules`. A rule that
    fires logs a warning on rank 0 and adds a `Finding` to `findings`, once in a run. No rule fires
    until the learning rate has not risen for `warmup` iterations, nor before `patience` records in
    a row agree.

    Event: `StepEvents.LOSS_COMPUTED` every `every` iterations; `MetricsEvents.LOGGED`; the
        iterations of evaluations.
    Cost: every `every` iterations, some 90 operations, among them products of at most `samples` x
        `samples` x D, without a synchronisation; at each log point a decomposition of D x D for
        each side and the norms of all weights. In a process group, pair statistics are those of
        each rank's batch, averaged over all samples; spread, gap and spectra are those of the
        global batch, with one all-reduce of D numbers (D x D at log points).

    Args:
        every: iterations between two measurements; None: the trainer's `log_every`, and in a run
            shorter than that the last iteration of each epoch.
        features: names of one or two of the task's outputs, [B, D]; None: the first two that end in
            "_features". If there are none of that shape, nothing is measured, which is logged.
        samples: the most pairs of this rank's batch to measure, >= 2.
        warmup: iterations after the last rise of the learning rate in which no rule fires.
        patience: the number of records in a row that must agree.
        rules: the rules to apply, in this order.

    Attributes:
        findings: what the rules have found, in order.

    Raises:
        ValueError: if an argument is out of range.
        BatchError: while running: if the task's outputs lack the features that are named, or they
            are not [B, D].
    """

    collective: ClassVar[bool] = True

    every: int | None = attrs.field(
        default=cast("int | None", 10), validator=attrs.validators.optional(whole_number())
    )
    features: Sequence[str] | None = attrs.field(default=None, validator=name_count(1, 2))
    samples: int = attrs.field(default=1024, validator=whole_number(2))
    warmup: int = attrs.field(default=200, validator=whole_number(0))
    patience: int = attrs.field(default=3, validator=whole_number())
    rules: Sequence[Rule] = attrs.field(default=RULES, repr=False)
    findings: list[Finding] = attrs.field(factory=list, init=False)
    _metrics: MetricsCollector = attrs.field(init=False, repr=False)
    _log_point_features: dict[str, Tensor] = attrs.field(factory=dict, init=False, repr=False)
    _spectra: dict[str, float] = attrs.field(factory=dict, init=False, repr=False)
    _new_spectra: dict[str, Tensor] = attrs.field(factory=dict, init=False, repr=False)
    _has_told: bool = attrs.field(default=False, init=False, repr=False)
    _moving: dict[str, MovingShare] = attrs.field(factory=dict, init=False, repr=False)
    _records: deque[Record] = attrs.field(init=False, repr=False)
    _first: Record | None = attrs.field(default=None, init=False, repr=False)
    _peaks: dict[str, float] = attrs.field(factory=dict, init=False, repr=False)
    _held_out: dict[str, list[float]] = attrs.field(factory=dict, init=False, repr=False)
    _evaluators: list[Evaluator] = attrs.field(factory=list, init=False, repr=False)
    _rate_peak: float = attrs.field(default=0.0, init=False, repr=False)
    _last_rise: int = attrs.field(default=0, init=False, repr=False)

    @_records.default
    def _no_records(self) -> deque[Record]:
        return deque(maxlen=self.patience)

    @property
    def role(self) -> str:
        """The features, if they are named."""
        return ",".join(self.features or ())

    @property
    def has_judged(self) -> bool:
        """Whether the run was long enough for the rules, since the learning rate last rose."""
        enough = len(self._records) == self.patience
        return enough and self._records[-1].step - self._last_rise >= self.warmup

    def attach(self, trainer: Trainer) -> None:
        """Measure the trainer's outputs and judge its records."""
        self._metrics = trainer.metrics
        trainer.add_event_handler(Events.STARTED, self._start)
        at_log_points = trainer.settings.log_every
        every = self.every or at_log_points
        trainer.every(every, self._measure, StepEvents.LOSS_COMPUTED)
        if at_log_points % every:  # else `_measure` keeps them
            trainer.every(at_log_points, self._keep_features, StepEvents.LOSS_COMPUTED)
        last = self._keep_features if self.every else self._measure
        call_in_short_runs(trainer, last, StepEvents.LOSS_COMPUTED)
        trainer.add_event_handler(MetricsEvents.LOGGED, self._judge)
        for name, position in temperature_positions(trainer.loss).items():
            trainer.metrics.gauge(f"health/{name}", position)
        components = default_components(trainer.model)
        single = named_parameters(trainer.model, None)  # a parameter alone may rest at a bound
        self._moving = {n: MovingShare(p) for n, p in components.items() if n not in single}
        for name, moving in self._moving.items():
            trainer.metrics.gauge(f"health/{name}/moving", moving)

    # -- measurements ----------------------------------------------------------------------------

    def _start(self, trainer: Trainer) -> None:
        if trainer.state.iteration == 0:
            self._forget()
            for moving in self._moving.values():
                moving.start()
        for handler in trainer.handlers_of(EvaluatesModel):
            if handler.evaluator not in self._evaluators:
                self._evaluators.append(handler.evaluator)
                self._measure_pairs_of(handler, trainer)

    def _forget(self) -> None:
        for name in self._spectra:
            self._metrics.remove_gauge(f"health/{name}")
        for kept in (self.findings, self._spectra, self._records, self._peaks, self._held_out):
            kept.clear()
        self._first, self._rate_peak, self._last_rise = None, 0.0, 0

    @torch.no_grad()
    def _measure(self, trainer: Trainer) -> None:
        if trainer.state.iteration % log_point_period(trainer):
            sides = self._sides(trainer.outputs)
        else:
            sides = self._keep_features(trainer)
        if not sides:
            return
        stacked = torch.stack([*sides.values()])
        means, deviations = feature_statistics.moments(stacked)
        rows = stacked.shape[1]
        measured = {"uniformity": feature_statistics.uniformity(stacked)}
        counts = [stacked.new_full((), rows if rows > 1 else 0)] * len(sides)
        measured |= feature_statistics.spread(deviations)
        counts += [(deviations < math.inf).all().to(deviations)] * (2 * len(sides))
        values = _by_side(sides, measured)
        if len(sides) == 2:
            first, second = stacked
            negatives = feature_statistics.negatives_in(trainer.outputs, rows)
            pairs = feature_statistics.pair_statistics(first, second, negatives)
            ids = _text_ids(trainer, self.samples)
            pairs["duplicates"] = feature_statistics.duplicates(stacked, ids, negatives)
            counts += [negatives.any(1).sum(dtype=stacked.dtype)] * len(pairs)
            over_chance = _loss_over_chance(trainer)  # infinite for a batch of one, without chance
            counts.append((over_chance.abs() < math.inf).to(over_chance))
            values |= {**pairs, "loss_over_chance": over_chance}
            gap = (means[0] - means[1]).norm()
            trainer.metrics.update_uncopied({"health/modality_gap": gap})
        self._publish_means(values, counts)

    def _publish_means(self, values: dict[str, Tensor], counts: list[Tensor]) -> None:
        """Publish statistics of a batch, to be averaged over all batches and ranks.

        A value is NaN if the batch is too small for it. Its weight is the number of this rank's
        samples that have something to be compared with, or 1 for a statistic of all ranks; 0 if the
        batch is too small.
        """
        found, weights = torch.stack([*values.values()]), torch.stack(counts)
        tags = [f"health/{name}" for name in values]
        self._metrics.update_all_sums(tags, found.nan_to_num() * weights, weights)

    def _sides(self, outputs: Outputs) -> dict[str, Tensor]:
        """Return the features by side; none if no output fits and none was named."""
        try:
            return feature_statistics.sides_of(outputs, self.features, rows=self.samples)
        except BatchError as error:
            if self.features is not None:
                raise
            if not self._has_told:
                self._has_told = True
                logger.info("RepresentationHealth measures nothing: %s.", error)
            return {}

    @torch.no_grad()
    def _keep_features(self, trainer: Trainer) -> dict[str, Tensor]:
        # The log point of this same iteration uses the features, so no checkpoint has to hold them.
        self._log_point_features = self._sides(trainer.outputs)
        self._new_spectra = {}
        if self._log_point_features and not self._spectra:
            sides = [*self._log_point_features]
            names = [f"{side}/{name}" for side in sides for name in ("rankme", "rank_share")]
            if sides == ["first", "second"]:
                names.append("lidar")
            self._spectra = dict.fromkeys(names, math.nan)
            self._publish_spectra()
        return self._log_point_features

    def _publish_spectra(self) -> None:
        for name in self._spectra:
            self._metrics.gauge(f"health/{name}", partial(self._spectrum, name))

    def _spectrum(self, name: str) -> Tensor | float:
        if not self._log_point_features:
            return self._spectra[name]
        if not self._new_spectra:
            self._new_spectra = self._spectra_of(self._log_point_features)
        return self._new_spectra[name]

    @torch.no_grad()
    def _spectra_of(self, sides: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the values of all names of `_spectra`."""
        stacked = torch.stack([*sides.values()])
        ranks = feature_statistics.rankme(feature_statistics.gram(stacked))
        rows = all_reduce_sum(ranks.new_full((), float(stacked.shape[1])))
        found = {f"{side}/rankme": one for side, one in zip(sides, ranks, strict=True)}
        shares = ranks / rows.clamp(max=stacked.shape[2])
        found |= {f"{side}/rank_share": one for side, one in zip(sides, shares, strict=True)}
        if "lidar" in self._spectra:
            found["lidar"] = feature_statistics.lidar([*stacked])
        return found

    # -- held-out pairs --------------------------------------------------------------------------

    def _measure_pairs_of(self, handler: EvaluatesModel, trainer: Trainer) -> None:
        """Publish the mean AUROC over the batches of each evaluation that has pairs."""
        evaluator, values = handler.evaluator, list[Tensor]()

        @torch.no_grad()
        def measure_batch() -> None:
            statistics = self._pair_statistics_of(evaluator.state.output)  # type: ignore[arg-type]
            if statistics is not None:
                values.append(statistics["auroc"].double())

        def publish() -> None:
            empty = torch.zeros(0, dtype=torch.float64, device=evaluator.device)
            found = torch.stack(values) if values else empty
            valid = found.isfinite()  # a batch of one pair has no negatives: NaN
            sums = torch.stack([found.nan_to_num().sum(), valid.double().sum()])
            total, count = all_reduce_sum(sums).tolist()
            if count:
                auroc = total / count
                kept = [*self._held_out.get(handler.prefix, ()), auroc]
                self._held_out[handler.prefix] = kept[-self.patience :]
                tag = f"health/{handler.prefix}/auroc"
                trainer.metrics.report(trainer.state.iteration, {tag: auroc})

        evaluator.add_event_handler(Events.STARTED, values.clear)
        evaluator.add_event_handler(Events.ITERATION_COMPLETED, measure_batch)
        evaluator.add_event_handler(Events.COMPLETED, publish)

    def _pair_statistics_of(self, outputs: Outputs) -> dict[str, Tensor] | None:
        """Return the pair statistics of an evaluation's batch; None if it lacks a side."""
        names = self.features or [name for name in outputs if name.endswith("_features")]
        if len(names) < 2 or not set(names) <= set(outputs):
            return None
        sides = self._sides(outputs)
        if len(sides) < 2:
            return None
        first, second = sides.values()
        negatives = feature_statistics.negatives_in(outputs, len(first))
        return feature_statistics.pair_statistics(first, second, negatives)

    # -- rules -----------------------------------------------------------------------------------

    def _judge(self, trainer: Trainer) -> None:
        record = trainer.metrics.record
        for name in self._spectra:
            self._spectra[name] = record.values.get(f"health/{name}", self._spectra[name])
        if not names_between("health/", "/spread", record.values):
            return  # an evaluation's record, or one without a measurement
        self._log_point_features = {}
        record = Record(record.step, {t: v for t, v in record.values.items() if "health/" in t})
        self._first = self._first or record
        self._records.append(record)
        rate = self._rate(trainer)
        if len(self._records) < self.patience:
            return
        for tag in record.values:
            mean = sum(r.values.get(tag, math.nan) for r in self._records) / self.patience
            self._peaks[tag] = max(mean, self._peaks.get(tag, mean))
        if self.has_judged:
            self._apply_rules(self._history(self._first, rate))

    def _history(self, first: Record, rate: float) -> History:
        return History(
            records=tuple(self._records),
            first=first,
            peaks=self._peaks,
            held_out={n: v for n, v in self._held_out.items() if len(v) == self.patience},
            rate=rate,
            frozen=frozenset(name for name, m in self._moving.items() if m.frozen),
        )

    def _apply_rules(self, history: History) -> None:
        for rule in self.rules:
            silenced = {rule.name, *rule.unless} & {finding.rule for finding in self.findings}
            evidence = None if silenced else rule.judge(history)
            if evidence is not None:
                finding = Finding(rule.name, history.records[-1].step, evidence, rule.remedy)
                self.findings.append(finding)
                if rank() == 0:
                    logger.warning("%s", fill(str(finding), 110, break_long_words=False))

    def _rate(self, trainer: Trainer) -> float:
        """Return the learning rate as a share of its peak; update its peak and its last rise."""
        rate = max((float(group["lr"]) for group in trainer.optimizer.param_groups), default=0.0)
        if rate > self._rate_peak * (1 + 1e-6):
            self._last_rise = trainer.state.iteration if self._rate_peak else 0
            self._rate_peak = rate
        return rate / self._rate_peak if self._rate_peak else 1.0

    # -- memory ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the measurements and findings that rules need, as numbers and texts."""
        return {
            "findings": [attrs.asdict(finding) for finding in self.findings],
            "records": [[record.step, dict(record.values)] for record in self._records],
            "first": [self._first.step, dict(self._first.values)] if self._first else None,
            "peaks": dict(self._peaks),
            "held_out": {name: list(values) for name, values in self._held_out.items()},
            "rate": [self._rate_peak, self._last_rise],
            "spectra": dict(self._spectra),
            "moving": {name: moving.state() for name, moving in self._moving.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        self.findings[:] = [Finding(**finding) for finding in state_dict["findings"]]
        self._records = deque([Record(*r) for r in state_dict["records"]], maxlen=self.patience)
        self._first = Record(*state_dict["first"]) if state_dict["first"] else None
        self._peaks = dict(state_dict["peaks"])
        self._held_out = {name: list(values) for name, values in state_dict["held_out"].items()}
        self._rate_peak, self._last_rise = state_dict["rate"]
        self._spectra = dict(state_dict["spectra"])
        self._publish_spectra()
        for name, moving in self._moving.items():
            moving.start(state_dict["moving"].get(name))


def _loss_over_chance(trainer: Trainer) -> Tensor:
    loss = torch.stack([term.float() for term in trainer.terms.values()]).sum()
    size = len(next(value for value in trainer.outputs.values() if value.ndim))
    return loss / all_reduce_sum(loss.new_full((), float(size))).log()


def _by_side(sides: Iterable[str], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return values [S] by side and name."""
    return {
        f"{side}/{name}": value
        for name, each in values.items()
        for side, value in zip(sides, each.unbind(), strict=True)
    }


def _text_ids(trainer: Trainer, samples: int) -> list[Tensor]:
    """Return a number for each of the batch's first texts, in a list; empty if it has no texts."""
    task = getattr(trainer.task, "task", trainer.task)  # the student's, beside a teacher
    if not isinstance(task, ImageText):
        return []
    ids = feature_statistics.text_ids(task.optional_part(trainer.state.batch, "text"))
    return [] if ids is None else [ids[:samples].to(trainer.device, non_blocking=True)]
