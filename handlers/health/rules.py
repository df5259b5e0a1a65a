"""When a run is not healthy: rules on the published values, each with its evidence and a remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs

from diptych.engine.metrics.metrics_collector import Record

COLLAPSED = 0.1
"""A spread below it means a mean cosine similarity above 0.99 (1 - spread^2) between any two
samples. Untrained towers start at 0.3 to 1; the emoji example never falls below 0.58."""

FEW_DIRECTIONS = 0.05
"""A share of the directions that features could use. The emoji example uses 0.4 of them, and what
tells ten classes apart in 128 dimensions perfectly 0.07."""

CHANCE = 0.55
"""An AUROC below it is chance: with 256 pairs the value strays by 0.02 around 0.5. The emoji
example is at 0.7 after ten updates."""

LEARNED = 0.6
"""An AUROC that no run without information in its pairs reaches by chance."""

WELL_LEARNED = 0.8
"""An AUROC on training pairs with which something should carry over to others."""

DUPLICATES = 0.2
"""A share of the queries with a false negative, each of which adds up to ln 2 to the loss."""

AT_BOUND = 0.01
"""How near to a bound a temperature is stuck to it, as a share of the way between the bounds."""

RESTING = 0.01
"""A learning rate below this share of its peak moves nothing that float32 shows."""


@attrs.frozen
class Finding:
    """What a rule has found.

    Attributes:
        rule: the name of the rule.
        step: the iteration at which it was found.
        evidence: the numbers that say so, in words.
        remedy: what to do about it.
    """

    rule: str
    step: int
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.rule} at iteration {self.step}: {self.evidence}. {self.remedy}"


@attrs.frozen(kw_only=True)
class History:
    """What rules judge: values that are on the host already, by their tags.

    Attributes:
        records: the last few records with values of health, the newest last.
        first: the first such record of the run.
        peaks: of each tag, the largest mean of as many records in a row so far.
        rate: the learning rate as a share of its largest so far.
        frozen: components of the model without any parameter that requires a gradient.
        held_out: the AUROC of the last few evaluations with pairs, by their prefix.
    """

    records: Sequence[Record]
    first: Record
    peaks: Mapping[str, float]
    rate: float = 1.0
    frozen: frozenset[str] = frozenset()
    held_out: Mapping[str, Sequence[float]] = attrs.field(factory=dict)

    @property
    def latest(self) -> Mapping[str, float]:
        """The newest record's values."""
        return self.records[-1].values

    @property
    def sides(self) -> list[str]:
        """The sides whose features are looked at, such as image and text."""
        return names_between("health/", "/spread", self.latest)

    def always(self, tag: str, holds: Callable[[float], bool]) -> bool:
        """Say whether all the last records have the tag, with a value for which `holds` is true."""
        return all(tag in r.values and holds(r.values[tag]) for r in self.records)

    @property
    def collapsed_sides(self) -> list[str]:
        """The sides whose features are nearly one point."""
        return [s for s in self.sides if self.always(f"health/{s}/spread", lambda v: v < COLLAPSED)]

    @property
    def resting(self) -> list[str]:
        """The components of the model whose weights stand still."""
        names = names_between("health/", "/moving", self.latest)
        return [n for n in names if self.always(f"health/{n}/moving", lambda v: v == 0)]

    @property
    def at_chance(self) -> bool:
        """Whether pairs stand no closer than strangers."""
        return self.always("health/auroc", lambda v: v < CHANCE)


@attrs.frozen(kw_only=True)
class Rule:
    """One thing that can be wrong with a run.

    ```python
    narrow = Rule(
        name="narrow margin",
        judge=lambda h: "margin %.3f" % h.latest["health/margin"]
        if h.always("health/margin", lambda value: value < 0.05) else None,
        remedy="Train longer.",
    )
    RepresentationHealth(rules=(*RULES, narrow))
    ```

    Attributes:
        name: what is wrong.
        judge: returns the evidence where the rule fires, else None.
        remedy: what to do about it.
        unless: rules whose findings explain this one, which then stays silent.
    """

    name: str
    judge: Callable[[History], str | None]
    remedy: str
    unless: tuple[str, ...] = ()


def names_between(start: str, end: str, values: Mapping[str, float]) -> list[str]:
    """Return what stands between two ends of tags, for the tags that have both."""
    found = (tag for tag in values if tag.startswith(start) and tag.endswith(end))
    return [tag[len(start) : -len(end)] for tag in found]


def _collapsed(history: History) -> str | None:
    if _without_information(history):
        return None  # it is the cause, and collapse what follows from it
    values = [
        f"{side} features have spread {history.latest[f'health/{side}/spread']:.3f}, RankMe "
        f"{history.latest.get(f'health/{side}/rankme', 1):.1f}"
        for side in history.collapsed_sides
    ]
    return "; ".join(values) + " (1 is an even spread, 0 one point)" if values else None


def _partly_collapsed(history: History) -> str | None:
    values = []
    for side in set(history.sides) - set(history.collapsed_sides):
        few = history.always(f"health/{side}/rank_share", lambda v: v < FEW_DIRECTIONS)
        dead = history.always(f"health/{side}/dead_dimensions", lambda v: v > 0.5)
        if few or dead:
            own = {
                name: history.latest.get(f"health/{side}/{name}", float("nan"))
                for name in ("rankme", "rank_share", "dead_dimensions")
            }
            values.append(
                f"{side} features use {own['rankme']:.1f} directions, {own['rank_share']:.1%} of "
                f"those that they could, and {own['dead_dimensions']:.0%} of their dimensions are "
                "dead"
            )
    return "; ".join(sorted(values)) or None


def _without_information(history: History) -> bool:
    """Say whether a model that could learn, and tried, has found nothing that pairs share."""
    started_alive = all(
        history.first.values.get(f"health/{side}/spread", 0) >= COLLAPSED for side in history.sides
    )
    never = history.peaks.get("health/auroc", 1) < LEARNED
    # A loss without negatives draws both sides into one point; without information in the pairs,
    # one with negatives gives up on one side, away from the other.
    apart = history.latest.get("health/positive_similarity", 1) < 1 - COLLAPSED
    return history.at_chance and never and apart and started_alive and not history.resting


def _captions_shuffled(history: History) -> str | None:
    if not _without_information(history):
        return _learned_by_heart(history)
    start = ", ".join(
        f"{side} {history.first.values[f'health/{side}/spread']:.2f}" for side in history.sides
    )
    return (
        f"{_chance(history)} and never was above {history.peaks['health/auroc']:.2f}, though both "
        f"sides move and began spread out ({start})"
    )


def _learned_by_heart(history: History) -> str | None:
    """Say so where training pairs are told apart, and no held-out pair is."""
    for prefix, values in history.held_out.items():
        seen = history.latest.get("health/auroc", 0)
        if seen > WELL_LEARNED and max(values) < CHANCE:
            return (
                f"pairs of the training set are told apart (AUROC {seen:.2f}), those of {prefix} "
                f"are not (AUROC {values[-1]:.2f}): they are learned by heart"
            )
    return None


def _stuck_at_chance(history: History) -> str | None:
    if not history.at_chance or _without_information(history):
        return None
    reasons = []
    if history.collapsed_sides:
        reasons.append(f"{' and '.join(history.collapsed_sides)} collapsed")
    still = [*history.resting, *(n for n in sorted(history.frozen) if n not in history.resting)]
    if still:
        reasons.append(f"{' and '.join(still)} standing still")
    peak = history.peaks["health/auroc"]
    if peak >= LEARNED:
        reasons.append(f"AUROC down from {peak:.2f}")
    return f"{_chance(history)}" + (f", with {', '.join(reasons)}" if reasons else "")


def _chance(history: History) -> str:
    values = history.latest
    return (
        f"pairs stand no closer than strangers (AUROC {values['health/auroc']:.2f}, margin "
        f"{values.get('health/margin', 0):.3f}, loss "
        f"{values.get('health/loss_over_chance', 1):.2f} of ln B)"
    )


def _frozen_tower(history: History) -> str | None:
    still = [name for name in history.resting if name not in history.frozen]
    if not still or history.rate < RESTING:
        return None
    return f"no weight of {' and '.join(still)} has changed since {history.records[0].step}"


def _temperature_saturated(history: History) -> str | None:
    for tag in history.latest:
        if not tag.endswith("temperature_position"):
            continue
        for bound, at in (
            ("coldest", lambda v: v > 1 - AT_BOUND),
            ("warmest", lambda v: v < AT_BOUND),
        ):
            if history.always(tag, at):
                return (
                    f"the temperature is held at its {bound} bound ({tag} "
                    f"{history.latest[tag]:.3f}, 0 the warmest, 1 the coldest)"
                )
    return None


def _false_negatives(history: History) -> str | None:
    tag = "health/duplicates"
    if history.collapsed_sides or not history.always(tag, lambda v: v > DUPLICATES):
        return None
    return (
        f"{history.latest[tag]:.0%} of the samples have one of the same content in their batch "
        "that counts as a negative"
    )


RULES: tuple[Rule, ...] = (
    Rule(
        name="collapsed",
        judge=_collapsed,
        remedy=(
            "Lower the learning rate or lengthen its warm-up; without negatives, check the "
            "stop-gradient and the predictor; look for a layer that gives a constant."
        ),
        unless=("captions shuffled",),
    ),
    Rule(
        name="partly collapsed",
        judge=_partly_collapsed,
        remedy=(
            "Look for a bottleneck before the features; add a term that spreads dimensions "
            "(VICReg, decorrelation), a wider projection or more negatives."
        ),
        unless=("captions shuffled", "collapsed"),
    ),
    Rule(
        name="captions shuffled",
        judge=_captions_shuffled,
        remedy=(
            "Print a few pairs as the model gets them: a sampler, sort or collate function may "
            "have put the two sides into different orders. If they are right, the learning rate "
            "is far off."
        ),
    ),
    Rule(
        name="stuck at chance",
        judge=_stuck_at_chance,
        remedy=(
            "Check that the optimizer holds both towers and that gradients reach them, and try "
            "learning rates a factor of ten apart."
        ),
        unless=("captions shuffled", "collapsed"),
    ),
    Rule(
        name="frozen tower",
        judge=_frozen_tower,
        remedy=(
            "Give its parameters to the optimizer, look for a detach() or no_grad() on the way, "
            "or, where it is meant, set requires_grad_(False), which silences this."
        ),
        unless=("stuck at chance",),
    ),
    Rule(
        name="temperature saturated",
        judge=_temperature_saturated,
        remedy=(
            "Keep weight decay off logit_scale; move the bound (max_logit_scale), lower the "
            "temperature's rate, or fix the temperature."
        ),
    ),
    Rule(
        name="batch full of false negatives",
        judge=_false_negatives,
        remedy=(
            "Give the batch group ids (the task's `group`) that are equal where contents are, or "
            "draw batches without repeats."
        ),
        unless=("captions shuffled", "collapsed", "partly collapsed"),
    ),
)
"""The rules that `RepresentationHealth` judges by; to add one: `rules=(*RULES, mine)`."""
