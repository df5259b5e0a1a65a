"""The handlers that most runs need."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Literal

from diptych._argument_names import names_the_right_argument
from diptych.engine.handler import Attachable
from diptych.handlers.argument_checks import Mode, usual_mode
from diptych.handlers.checkpointing.checkpoint_manager import CheckpointManager
from diptych.handlers.health.representation_health import RepresentationHealth
from diptych.handlers.optimization.gradient_diagnostics import GradientDiagnostics
from diptych.handlers.performance.throughput import Throughput
from diptych.handlers.reports.history_plots import HistoryPlots
from diptych.handlers.run_directory import RunDirectory
from diptych.handlers.sinks.jsonl import JsonLines
from diptych.handlers.sinks.progress_bar import ProgressBar
from diptych.handlers.sinks.run_card import RunCard
from diptych.handlers.sinks.run_record import RunRecord
from diptych.handlers.sinks.tensorboard import TensorBoard


@names_the_right_argument
def default_handlers(
    run_dir: str | os.PathLike[str],
    *,
    best: str | None = None,
    mode: Mode | None = None,
    every: int | timedelta | Literal["epoch"] = "epoch",
    keep: int = 3,
    resume: Path | str | None = "auto",
    health: bool = True,
) -> list[Attachable]:
    """Return handlers that save, resume, log and show a run, as a list to extend.

    ```python
    trainer.attach(
        LearningRate(warmup=200),
        Evaluation(val_loader, metrics=[RetrievalRecall()]),
        *default_handlers(new_run("runs", "emoji"), best="val/recall@1"),
    )
    ```

    They change no weight. Attach handlers that do, such as a schedule or gradient clipping,
    yourself. At the log points they measure the features and the gradients of each component, with
    `RepresentationHealth` and `GradientDiagnostics`. The run directory will hold `checkpoints/`,
    `metrics.jsonl`, `metrics.measured.jsonl`, `settings.json`, `identity.json`, `report.html` and
    TensorBoard's event files; `RunDirectory` names them.

    Args:
        run_dir: the run directory: a new one (`new_run`), or that of a run to resume.
        best: the metric that ranks the best checkpoints, such as "val/recall@1".
        mode: whether a larger ("max") or a smaller ("min") value of it is better; None: "min" for a
            name that ends in "loss", "mean_rank" or "median_rank", else "max", which is logged if
            the name does not say that more is better.
        every: "epoch", iterations, or a `datetime.timedelta` between two checkpoints.
        keep: the number of checkpoints to keep.
        resume: "auto" resumes from the latest checkpoint in the run directory, if there is one; a
            path resumes from that file; None starts a new run.
        health: whether to measure features and gradients. Pass False to attach these two handlers
            yourself, with other arguments.

    Raises:
        ValueError: if an argument is out of range.
    """
    run, mode = RunDirectory(run_dir), mode or usual_mode(best, "best")
    measuring = [RepresentationHealth(every=None), GradientDiagnostics(every=None, updates=False)]
    return [
        *(measuring if health else ()),
        RunRecord(run),
        Throughput(),
        TensorBoard(run),
        JsonLines(run),
        HistoryPlots(run),
        ProgressBar(),
        RunCard(directory=Path(run_dir), best=best, mode=mode),
        CheckpointManager(
            run.checkpoints, every=every, best=best, mode=mode, keep=keep, resume=resume
        ),
    ]
