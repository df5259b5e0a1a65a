"""Where a run stands in a plan of stages."""

from __future__ import annotations

import attrs


@attrs.define
class StageProgress:
    """Where a plan stands, as numbers.

    Attributes:
        index: of the stage that runs, counted from 0; -1 before the first.
        over: whether it has ended; the next epoch begins the next stage.
        first_epoch: the number of its first epoch.
        first_iteration: iterations before it.
        total: its iterations, at most; None where they are not known.
        judged: values of its metric that are judged, those before the stage included.
        counted: values that came within the stage.
        waited: values since the best one.
        best: the best value; None before the first.
    """

    index: int = -1
    over: bool = False
    first_epoch: int = 0
    first_iteration: int = 0
    total: int | None = None
    judged: int = 0
    counted: int = 0
    waited: int = 0
    best: float | None = None
