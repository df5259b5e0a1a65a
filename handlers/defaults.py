"""The handlers that most runs want."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Literal

from diptych.engine.handler import Attachable
from diptych.handlers.checkpointing.checkpoint_manager import CheckpointManager
from diptych.handlers.performance.throughput import Throughput
from diptych.handlers.sinks.jsonl import JsonLines
from diptych.handlers.sinks.progress import ProgressBar
from diptych.handlers.sinks.run_card import RunCard
from diptych.handlers.sinks.run_directory import RunRecord
from diptych.handlers.sinks.tensorboard import TensorBoard


def default_handlers(
    run_dir: Path | str,
    *,
    best: str | None = None,
    mode: Literal["max", "min"] = "max",
    every: int | timedelta | Literal["epoch"] = "epoch",
    keep: int = 3,
    resume: Path | str | None = "auto",
) -> list[Attachable]:
    """Return the handlers that save, resume and show a run, as a list to extend.

    ```python
    trainer.attach(
        LearningRate(warmup=200),
        Evaluation(val_loader, metrics=[RetrievalRecall()]),
        *default_handlers(new_run("runs", "emoji"), best="val/recall@1"),
    )
    ```

    None of them changes what is learned, so what does (a schedule, gradient clipping) is not among
    them. The folder will hold `checkpoints/`, `metrics.jsonl`, `metrics.measured.jsonl`,
    `settings.json` and TensorBoard's event files.

    Args:
        run_dir: the run's folder: a new one (`new_run`), or one whose run is to go on.
        best: the metric by which the best checkpoints are kept, such as "val/recall@1".
        mode: whether a larger ("max") or a smaller ("min") value of it is better.
        every: "epoch", iterations, or a `datetime.timedelta` between two checkpoints.
        keep: checkpoints to keep.
        resume: "auto" continues from the latest checkpoint in the folder, where there is one; a
            path continues from that file; None starts anew.

    Raises:
        ValueError: if an argument is out of range.
    """
    run_dir = Path(run_dir)
    return [
        RunRecord(run_dir),
        Throughput(),
        TensorBoard(run_dir),
        JsonLines(run_dir),
        ProgressBar(),
        RunCard(directory=run_dir, best=best, mode=mode),
        CheckpointManager(
            run_dir / "checkpoints", every=every, best=best, mode=mode, keep=keep, resume=resume
        ),
    ]
