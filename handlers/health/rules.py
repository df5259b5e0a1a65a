"""Rules that find problems in the published health values, with evidence and a remedy each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs

from diptych.engine.metrics.metrics_collector import Record

COLLAPSED = 0.1
"""A spread below this is a collapse: the mean cosine similarity of two samples, 1 - spread^2, is
above 0.99. Untrained towers start at 0.3 to 1; the emoji example stays above 0.58."""

FEW_DIRECTIONS = 0.05
"""A rank_share below this is a partial collapse. The emoji example has 0.4; features that separate
ten classes perfectly in 128 dimensions have 0.07."""

CHANCE = 0.55
"""An AUROC below this is chance: with 256 pairs, it varies by 0.02 around 0.5. The emoji example
reaches 0.7 after ten updates."""

LEARNED = 0.6
"""An AUROC that is not reached by chance if the pairs share no information."""

WELL_LEARNED = 0.8
"""An AUROC on training pairs at which held-out pairs should be above chance."""

DUPLICATES = 0.2
"""A share of samples with a false negative above this is reported. Each false negative raises the
loss of its sample by up to ln 2."""

AT_BOUND = 0.01
"""Distance from a bound, as a fraction of the range, that counts as saturated."""

RESTING = 0.01
"""A learning rate below this share of its peak counts as zero: an update may be smaller than the
resolution of float32, so weights that do not change are not reported."""


@attrs.frozen(kw_only=True)
class History:
    """The values that rules judge, by tag; they are on the host already.

    Attributes:
        records: the last few records with health values, the newest last.
        first: the first such record of the run.
        peaks: for each tag, the largest mean of as many records in a row so far.
        rate: the learning rate as a share of its peak so far.
        frozen: the model's components in which no parameter requires a gradient.
        held_out: the AUROC of the last few evaluations with pairs, by prefix.
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
        """The sides whose features are measured, such as image and text."""
        return names_between("health/", "/spread", self.latest)

    def always(self, tag: str, holds: Callable[[float], bool]) -> bool:
        """Return whether `holds` is true of the tag's value in each of the last records."""
        return all(tag in r.values and holds(r.values[tag]) for r in self.records)

    @property
    def collapsed_sides(self) -> list[str]:
        """The sides whose features are nearly equal."""
        return [s for s in self.sides if self.always(f"health/{s}/spread", lambda v: v < COLLAPSED)]

    @property
    def resting(self) -> list[str]:
        """The components of the model whose weights do not change."""
        names = names_between("health/", "/moving", self.latest)
        return [n for n in names if self.always(f"health/{n}/moving", lambda v: v == 0)]

    @property
    def at_chance(self) -> bool:
        """Whether pairs are no more similar than negatives."""
        return self.always("health/auroc", lambda v: v < CHANCE)


@attrs.frozen(kw_only=True)
class Rule:
    """A problem that a run can have.

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
        name: the name of the problem.
        judge: returns the evidence if the run has the problem, else None.
        remedy: what to do about it.
        unless: rules that explain this problem: once one of them has fired, this one does not.
    """

    name: str
    judge: Callable[[History], str | None]
    remedy: str
    unless: tuple[str, ...] = ()


def names_between(start: str, end: str, values: Mapping[str, float]) -> list[str]:
    """Return the middle parts of the tags that have this start and this end."""
    found = (tag for tag in values if tag.startswith(start) and tag.endswith(end))
    return [tag[len(start) : -len(end)] for tag in found]


def _collapsed(history: History) -> str | None:
    if _without_information(history):
        return None  # the collapse follows from it
    values = [
        f"{side} features have spread {history.latest[f'health/{side}/spread']:.3f}, RankMe "
        f"{history.latest.get(f'health/{side}/rankme', 1):.1f}"
        for side in history.collapsed_sides
    ]
    return "; ".join(values) + " (1: an even spread, 0: all equal)" if values else None


def _partly_collapsed(history: History) -> str | None:
    values = []
    for side in sorted(set(history.sides) - set(history.collapsed_sides)):
        few = history.always(f"health/{side}/rank_share", lambda v: v < FEW_DIRECTIONS)
        dead = history.always(f"health/{side}/dead_dimensions", lambda v: v > 0.5)
        if few or dead:
            rank, share, dead_share = (
                history.latest.get(f"health/{side}/{name}", float("nan"))
                for name in ("rankme", "rank_share", "dead_dimensions")
            )
            values.append(
                f"{side} features use {rank:.1f} directions, {share:.1%} of the possible ones, and "
                f"{dead_share:.0%} of their dimensions are dead"
            )
    return "; ".join(values) or None


def _without_information(history: History) -> bool:
    """Return whether a model that was able to learn found nothing that pairs have in common."""
    first = history.first.values
    # Features that lie in few directions from the start follow from a bottleneck.
    started_alive = all(
        first.get(f"health/{side}/spread", 0) >= COLLAPSED
        and first.get(f"health/{side}/rank_share", 1) >= FEW_DIRECTIONS
        for side in history.sides
    )
    never = history.peaks.get("health/auroc", 1) < LEARNED
    # A loss without negatives makes both sides equal. A loss with negatives, if the pairs share no
    # information, collapses one side far from the other.
    apart = history.latest.get("health/positive_similarity", 1) < 1 - COLLAPSED
    return history.at_chance and never and apart and started_alive and not history.resting


def _captions_shuffled(history: History) -> str | None:
    if not _without_information(history):
        return _memorised(history)
    start = ", ".join(
        f"{side} {history.first.values[f'health/{side}/spread']:.2f}" for side in history.sides
    )
    return (
        f"{_chance(history)}. AUROC was never above {history.peaks['health/auroc']:.2f}, although "
        f"both sides change and began spread out ({start})"
    )


def _memorised(history: History) -> str | None:
    """Return evidence that training pairs are recognised and held-out pairs are not."""
    seen = history.latest.get("health/auroc", 0)
    for prefix, values in history.held_out.items():
        if seen > WELL_LEARNED and max(values) < CHANCE:
            return (
                f"training pairs are recognised (AUROC {seen:.2f}), held-out pairs of {prefix} are "
                f"not (AUROC {values[-1]:.2f}): the pairs are memorised"
            )
    return None


def _stuck_at_chance(history: History) -> str | None:
    if not history.at_chance or _without_information(history):
        return None
    reasons = []
    if history.collapsed_sides:
        reasons.append(f"{' and '.join(history.collapsed_sides)} collapsed")
    unchanged = [*history.resting, *sorted(history.frozen.difference(history.resting))]
    if unchanged:
        reasons.append(f"{' and '.join(unchanged)} not changing")
    peak = history.peaks["health/auroc"]
    if peak >= LEARNED:
        reasons.append(f"AUROC down from {peak:.2f}")
    return _chance(history) + (f", with {', '.join(reasons)}" if reasons else "")


def _chance(history: History) -> str:
    values = history.latest
    return (
        f"pairs are no more similar than negatives (AUROC {values['health/auroc']:.2f}, margin "
        f"{values.get('health/margin', 0):.3f}, loss "
        f"{values.get('health/loss_over_chance', 1):.2f} times ln B)"
    )


def _frozen_tower(history: History) -> str | None:
    unchanged = [name for name in history.resting if name not in history.frozen]
    if not unchanged or history.rate < RESTING:
        return None
    since = history.records[0].step
    return f"no weight of {' and '.join(unchanged)} has changed since iteration {since}"


def _temperature_saturated(history: History) -> str | None:
    for tag in history.latest:
        if not tag.endswith("temperature_position"):
            continue
        coldest = history.always(tag, lambda v: v > 1 - AT_BOUND)
        if coldest or history.always(tag, lambda v: v < AT_BOUND):
            return (
                f"the temperature is at its {'lower' if coldest else 'upper'} bound ({tag} "
                f"{history.latest[tag]:.3f}; 0: the upper bound, 1: the lower)"
            )
    return None


def _false_negatives(history: History) -> str | None:
    tag = "health/duplicates"
    if history.collapsed_sides or not history.always(tag, lambda v: v > DUPLICATES):
        return None
    return (
        f"{history.latest[tag]:.0%} of the samples have a negative with the same content in their "
        "batch"
    )


RULES: tuple[Rule, ...] = (
    Rule(
        name="collapsed",
        judge=_collapsed,
        remedy=(
            "Lower the learning rate or lengthen its warm-up; if the loss has no negatives, check "
            "the stop-gradient and the predictor; look for a layer with a constant output."
        ),
        unless=("captions shuffled",),
    ),
    Rule(
        name="partly collapsed",
        judge=_partly_collapsed,
        remedy=(
            "Look for a bottleneck before the features; add a loss term that spreads dimensions "
            "(VICReg, decorrelation), a wider projection or more negatives."
        ),
        unless=("captions shuffled", "collapsed"),
    ),
    Rule(
        name="captions shuffled",
        judge=_captions_shuffled,
        remedy=(
            "Print a few pairs as the model receives them: a sampler, sort or collate function may "
            "have put the two sides into different orders. If they match, the learning rate is far "
            "off."
        ),
    ),
    Rule(
        name="stuck at chance",
        judge=_stuck_at_chance,
        remedy=(
            "Check that the optimizer holds both towers and that gradients reach them, and try "
            "learning rates a factor of ten apart."
        ),
        unless=("captions shuffled", "collapsed", "partly collapsed"),
    ),
    Rule(
        name="frozen tower",
        judge=_frozen_tower,
        remedy=(
            "Pass its parameters to the optimizer, and look for a detach() or no_grad() in its "
            "path. If it is frozen on purpose, set requires_grad_(False), which silences this rule."
        ),
        unless=("stuck at chance",),
    ),
    Rule(
        name="temperature saturated",
        judge=_temperature_saturated,
        remedy=(
            "Exclude logit_scale from weight decay; move the bound (max_logit_scale), lower the "
            "temperature's learning rate, or fix the temperature."
        ),
    ),
    Rule(
        name="batch full of false negatives",
        judge=_false_negatives,
        remedy=(
            "Add group ids to the batch (the task's `group`) that are equal for equal contents, or "
            "sample batches without repeats."
        ),
        unless=("captions shuffled", "collapsed", "partly collapsed"),
    ),
)
"""The rules of `RepresentationHealth`. To add one: `rules=(*RULES, mine)`."""
