"""A stage of a training plan: its trained parameters, length, rates, loss and data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import attrs

from diptych.engine.checks import whole_number
from diptych.engine.tasks import Task
from diptych.engine.trials.first_batches import FirstBatches
from diptych.engine.trials.trial import Trial
from diptych.handlers.argument_checks import Mode, improves, one_of, usual_mode
from diptych.handlers.optimization.parameter_groups import GroupRules, LayerDecay
from diptych.handlers.optimization.schedules import LearningRate, check_length


def _constant() -> LearningRate:
    return LearningRate(warmup=0, decay="constant")


def _patterns(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


_count = attrs.validators.optional(whole_number())


@attrs.frozen(eq=False)
class Stage:
    """One stage of a `StagePlan`.

    ```python
    Stage("projections", trains=["image.projection", "text.projection", "loss"], epochs=2, lr=1e-3)
    Stage(
        "everything", epochs=20, patience=3, metric="val/recall@1", load="best", lr=1e-4,
        by_component={"text": 1e-5}, layer_decay={"image.blocks": 0.75},
        schedule=LearningRate(warmup=100), loss_weights={"triplet": 1.0}, batch_size=256,
    )
    ```

    Patterns are those of `parameter_groups`: beginnings of parameter names in whole parts; names of
    the loss's parameters begin with "loss".

    Args:
        name: the stage's name, unique in the plan.
        trains: patterns of the trained parameters; all others are frozen. Default: all.
        epochs: length in epochs (the maximum, with a patience); either this or `steps`.
        steps: length in iterations; the last epoch ends early after so many.
        lr: the rate of parameters outside all components.
        weight_decay: for parameters with two or more dimensions that are not biases or norms.
        by_component: pattern to a rate, or to a mapping of options of the optimizer.
        layer_decay: the factor of the rate from block to block; see `parameter_groups`.
        no_decay: patterns of further parameters without weight decay.
        schedule: warm-up and decay, counted from the start of the stage. Default: constant.
        loss: the name of the active loss, if the trainer's loss is a `OneOf`.
        loss_weights: weights to set, if the trainer's loss is a `WeightedSum`.
        settings: further attributes to set, by path: `{"loss.negatives": "hardest"}`.
        batch_size: the batch size of a `SeededLoader`. Default: the loader's original one.
        loader: the loader of this stage. Default: that of the run.
        task: the task of this stage. Default: the trainer's.
        metric: the published value that ranks the weights of this stage.
        patience: values of the metric without improvement that end the stage.
        mode: whether a larger ("max") or a smaller ("min") value is better. Default: "min" for a
            name that ends in "loss", "mean_rank" or "median_rank", else "max", which is logged if
            the name does not say that more is better.
        load: initial weights: "last", the current ones, or "best", those with which the previous
            stage had its best metric.
        optimizer_state: "keep" continues with the optimizer's moments, also those of parameters
            that were frozen in between; "reset" clears them.

    Raises:
        ValueError: if an argument is out of range, not exactly one length is given, or a patience
            has no metric.
    """

    name: str
    trains: Sequence[str] = attrs.field(default=("*",), converter=_patterns, kw_only=True)
    epochs: int | None = attrs.field(default=None, validator=_count, kw_only=True)
    steps: int | None = attrs.field(default=None, validator=_count, kw_only=True)
    lr: float | None = attrs.field(default=None, kw_only=True)
    weight_decay: float = attrs.field(default=0.0, kw_only=True)
    by_component: Mapping[str, float | Mapping[str, Any]] = attrs.field(factory=dict, kw_only=True)
    layer_decay: LayerDecay | None = attrs.field(default=None, kw_only=True)
    no_decay: Sequence[str] = attrs.field(default=(), kw_only=True)
    schedule: LearningRate = attrs.field(factory=_constant, kw_only=True)
    loss: str | None = attrs.field(default=None, kw_only=True)
    loss_weights: Mapping[str, float] = attrs.field(factory=dict, kw_only=True)
    settings: Mapping[str, Any] = attrs.field(factory=dict, kw_only=True)
    batch_size: int | None = attrs.field(default=None, validator=_count, kw_only=True)
    loader: Iterable[Any] | None = attrs.field(default=None, kw_only=True, repr=False)
    task: Task | None = attrs.field(default=None, kw_only=True, repr=False)
    metric: str | None = attrs.field(default=None, kw_only=True)
    patience: int | None = attrs.field(default=None, validator=_count, kw_only=True)
    mode: Mode = attrs.field(validator=one_of(Mode), kw_only=True)
    load: Literal["last", "best"] = attrs.field(
        default="last", validator=one_of(Literal["last", "best"]), kw_only=True
    )
    optimizer_state: Literal["keep", "reset"] = attrs.field(
        default="keep", validator=one_of(Literal["keep", "reset"]), kw_only=True
    )
    rules: GroupRules = attrs.field(init=False, repr=False)

    @mode.default
    def _usual_mode(self) -> Mode:
        return usual_mode(self.metric, "metric")

    @rules.default
    def _make_rules(self) -> GroupRules:
        names = ("lr", "weight_decay", "by_component", "layer_decay", "no_decay")
        return GroupRules(**{name: getattr(self, name) for name in names})

    def __attrs_post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"stage {self.name!r} needs either epochs or steps, got {self.epochs} and "
                f"{self.steps}"
            )
        if self.patience is not None and self.metric is None:
            raise ValueError(f"the patience of stage {self.name!r} needs a metric, got none")
        for name, weight in self.loss_weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(
                    f"loss_weights of stage {self.name!r} must be >= 0 and finite, got {weight!r} "
                    f"for {name!r}"
                )
        if self.lr is None and not self.by_component:
            raise ValueError(f"stage {self.name!r} needs lr, by_component or both, got neither")

    @property
    def assignments(self) -> dict[str, Any]:
        """The attributes that the stage sets, by path."""
        named = {} if self.loss is None else {"loss.active": self.loss}
        weights = {f"loss.weights.{name}": weight for name, weight in self.loss_weights.items()}
        return {**named, **weights, **self.settings}

    def for_trial(self, trial: Trial) -> Stage:
        """Return this stage with one epoch of a few batches, and no warm-up."""
        loader = None if self.loader is None else FirstBatches(self.loader, trial.batches)
        schedule = attrs.evolve(self.schedule, warmup=0)
        return attrs.evolve(self, epochs=1, steps=None, loader=loader, schedule=schedule)

    def improves(self, value: float, best: float | None) -> bool:
        """Return whether a value of the metric is better than the best one so far; NaN never is."""
        return improves(value, best, self.mode)

    def length(self, epoch_length: int | None) -> int | None:
        """Return the largest number of iterations of the stage, or None if it is unknown."""
        if self.steps is not None:
            return self.steps
        return None if epoch_length is None else int(self.epochs or 0) * epoch_length

    def epochs_of(self, epoch_length: int | None) -> int:
        """Return the largest number of epochs of the stage; 1 if it is unknown."""
        if self.epochs is not None:
            return self.epochs
        return 1 if epoch_length is None else -(-int(self.steps or 0) // epoch_length)

    def check_schedule(self, epoch_length: int | None) -> None:
        """Check that the schedule fits into the stage.

        Raises:
            ValueError: if the end of a decay is unknown, or the warm-up is not shorter than the
                stage.
        """
        check_length(self.schedule, self.length(epoch_length), f"stage {self.name!r}")
