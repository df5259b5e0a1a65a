"""One stage of a plan: what it trains, for how long, at which rates and on what."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import attrs

from diptych.engine.checks import whole_number
from diptych.engine.tasks import Task
from diptych.handlers.optimization.parameter_groups import GroupRules, LayerDecay
from diptych.handlers.optimization.schedules import LearningRate


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

    Patterns are those of `parameter_groups`: beginnings of parameter names in whole parts, the
    loss's with "loss" in front.

    Args:
        name: of the stage; each in a plan has its own.
        trains: patterns of what trains; everything else is frozen. Default: everything.
        epochs: how long: epochs (with a patience, at most), or
        steps: iterations. The last epoch of a stage is cut off where they are done.
        lr: the rate of what no component holds.
        weight_decay: of weights other than biases, norms and what is below two dimensions.
        by_component: pattern to a rate, or to a mapping of options of the optimizer.
        layer_decay: the factor from block to block; see `parameter_groups`.
        no_decay: patterns of further parameters without weight decay.
        schedule: warm-up and decay over this stage, counted from its beginning. Default: constant.
        loss: which loss to take, where the trainer's is a `OneOf`.
        loss_weights: weights to set, where the trainer's loss is a `WeightedSum`.
        settings: further attributes to set, by their paths: `{"loss.negatives": "hardest"}`.
        batch_size: of the loader, a `SeededLoader`. Default: what the loader was made with.
        loader: a loader of its own. Default: the one that the run was given.
        task: a task of its own. Default: the trainer's.
        metric: the published value by which weights of this stage are the best.
        patience: values of the metric without improvement that end the stage.
        mode: whether a larger ("max") or a smaller ("min") value is better.
        load: what to start from: "last", the weights as they are, or "best", those of the stage
            before where its metric was best.
        optimizer_state: "keep" lets parameters go on with the moments that they have, after a stage
            in which they were frozen too; "reset" forgets all moments.

    Raises:
        ValueError: if an argument is out of range, there is not one length, or a patience has no
            metric.
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
    mode: Literal["max", "min"] = attrs.field(
        default="max", validator=attrs.validators.in_(("max", "min")), kw_only=True
    )
    load: Literal["last", "best"] = attrs.field(
        default="last", validator=attrs.validators.in_(("last", "best")), kw_only=True
    )
    optimizer_state: Literal["keep", "reset"] = attrs.field(
        default="keep", validator=attrs.validators.in_(("keep", "reset")), kw_only=True
    )
    rules: GroupRules = attrs.field(init=False, repr=False)

    @rules.default
    def _make_rules(self) -> GroupRules:
        names = ("lr", "weight_decay", "by_component", "layer_decay", "no_decay")
        return GroupRules(**{name: getattr(self, name) for name in names})

    def __attrs_post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"stage {self.name!r} needs epochs or steps, and not both, got {self.epochs} and "
                f"{self.steps}"
            )
        if self.patience is not None and self.metric is None:
            raise ValueError(f"stage {self.name!r} has a patience and needs its metric, got none")
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
        """The attributes that the stage sets, by their paths."""
        named = {} if self.loss is None else {"loss.active": self.loss}
        weights = {f"loss.weights.{name}": weight for name, weight in self.loss_weights.items()}
        return {**named, **weights, **self.settings}

    def improves(self, value: float, best: float | None) -> bool:
        """Say whether a value of the metric is better than the best before it; NaN never is."""
        if best is None:
            return value == value  # noqa: PLR0124 - NaN is the number that differs from itself
        return value > best if self.mode == "max" else value < best

    def length(self, epoch_length: int | None) -> int | None:
        """Return the iterations of the stage, at most, or None where they are not known."""
        if self.steps is not None:
            return self.steps
        return None if epoch_length is None else int(self.epochs or 0) * epoch_length

    def epochs_of(self, epoch_length: int | None) -> int:
        """Return the epochs that the stage takes, at most; at least 1 where they are not known."""
        if self.epochs is not None:
            return self.epochs
        return 1 if epoch_length is None else -(-int(self.steps or 0) // epoch_length)

    def check_schedule(self, epoch_length: int | None) -> None:
        """Check that the schedule fits into the stage.

        Raises:
            ValueError: if a decay does not know when to end, or the warm-up is as long as it has to
                end.
        """
        total = self.schedule.total or self.length(epoch_length)
        if self.schedule.decay == "constant":
            return
        if total is None:
            raise ValueError(
                f"the {self.schedule.decay} decay of stage {self.name!r} needs the stage's length, "
                "got a loader without one: give the stage steps, its schedule a total, or run an "
                "epoch_length"
            )
        if self.schedule.warmup >= total:
            raise ValueError(
                f"the warm-up of stage {self.name!r} must be shorter than the {total} iterations "
                f"until its decay ends, got {self.schedule.warmup}: shorten it, or make the stage "
                "longer"
            )
