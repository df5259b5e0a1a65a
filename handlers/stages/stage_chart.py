"""A plan of stages as text, with bars for rates and schedules."""

from __future__ import annotations

from collections.abc import Sequence

from diptych.handlers.stages.stage import Stage
from diptych.handlers.stages.stage_groups import StageGroups

BARS = "▁▂▃▄▅▆▇█"
WIDTH, CURVE = 16, 24


def plan_as_text(
    stages: Sequence[Stage], groups: StageGroups, lengths: Sequence[int | None]
) -> str:
    """Return the length, trained parameters, settings, groups and rates of each stage.

    The lengths are the iterations of an epoch in each stage; None if unknown.
    """
    highest = max(
        (options["lr"] for group in groups.groups for options in group.options if options),
        default=0.0,
    )
    everything = sum(parameter.numel() for parameter in groups.named.values())
    lines: list[str] = []
    for index, (stage, length) in enumerate(zip(stages, lengths, strict=True)):
        trained = sum(groups.named[name].numel() for name in groups.trained[index])
        lines.append(
            f"{index + 1}. {stage.name}: {_length(stage)}; trains {', '.join(stage.trains)}: "
            f"{trained:,} of {everything:,} parameters"
        )
        lines += [f"   {note}" for note in _notes(stage)]
        curve = _curve(stage, stage.length(length))
        lines += [f"   schedule {curve}"] if curve else []
        lines += _group_table(groups, index, highest)
    return "\n".join(lines)


def _length(stage: Stage) -> str:
    unit, count = ("epoch", stage.epochs) if stage.epochs else ("step", stage.steps)
    most = "" if stage.patience is None else "at most "
    text = f"{most}{count} {unit}{'' if count == 1 else 's'}"
    if stage.patience is None:
        return text
    return f"{text}, until {stage.metric} has not improved {stage.patience} times"


def _notes(stage: Stage) -> list[str]:
    notes = [f"{path} = {value}" for path, value in stage.assignments.items()]
    if stage.batch_size is not None:
        notes.append(f"batch size {stage.batch_size}")
    if stage.loader is not None:
        notes.append("its own loader")
    if stage.load == "best":
        notes.append("starts from the best weights of the previous stage")
    if stage.optimizer_state == "reset":
        notes.append("resets the optimizer's moments")
    return notes


def _curve(stage: Stage, length: int | None) -> str:
    """Return the schedule's factor over the stage as a row of bars."""
    total = stage.schedule.total or length
    constant = stage.schedule.decay == "constant" and not stage.schedule.warmup
    if constant or total is None or length is None:
        return ""
    columns = min(CURVE, length)
    at = [1 + round(column * (length - 1) / max(columns - 1, 1)) for column in range(columns)]
    return "".join(BARS[round(stage.schedule.factor(t, total) * (len(BARS) - 1))] for t in at)


def _group_table(groups: StageGroups, stage: int, highest: float) -> list[str]:
    width = max(len(group.name) for group in groups.groups)
    lines = []
    for group in groups.groups:
        options = group.options[stage]
        if options is None:
            continue
        size = sum(groups.named[name].numel() for name in group.names)
        bar = "█" * max(1, round(options["lr"] / highest * WIDTH)) if options["lr"] else ""
        decay = f"  weight decay {options['weight_decay']:g}" if options["weight_decay"] else ""
        rate = f"lr {options['lr']:.2e}"
        lines.append(f"   {group.name:{width}} {size:>12,}  {rate} {bar:{WIDTH}}{decay}".rstrip())
    return lines
