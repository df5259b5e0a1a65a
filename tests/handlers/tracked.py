"""A script that trains and logs to a tracking service in its offline mode.

    python -m tests.handlers.tracked wandb FOLDER [--stop]

It resumes from the checkpoints in the folder, if there are any.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ignite.engine import Events

from diptych.handlers import CheckpointManager, ClearML, JsonLines, MLflow, WandB
from diptych.handlers.sinks.trackers import Tracker
from tests.handlers.runs import loader, make_trainer, report_each_epoch


def tracker(service: str, folder: Path) -> Tracker:
    """Return the sink of a service, set up to write into the folder."""
    if service == "wandb":
        return WandB("pairs", name="one", options={"mode": "offline", "dir": str(folder)})
    if service == "mlflow":
        return MLflow("pairs", name="one", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    from ignite.handlers.clearml_logger import ClearMLLogger

    ClearMLLogger.set_bypass_mode(True)
    return ClearML("pairs", name="one")


def main(service: str, folder: Path, *, stop: bool) -> None:
    """Train for three epochs, or fail in the last of them."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    os.environ |= {"HOME": str(folder), "CLEARML_CACHE_DIR": str(folder / "clearml")}
    trainer = make_trainer()
    report_each_epoch(trainer, 0.25, 0.75, 0.5)
    if stop:
        trainer.add_event_handler(Events.ITERATION_STARTED(once=17), fail)
    trainer.attach(
        JsonLines(folder),
        tracker(service, folder),
        CheckpointManager(folder / "checkpoints", every=5),
    )
    trainer.run(loader(), max_epochs=3)


def fail() -> None:
    """Raise an error, as a faulty training would."""
    raise RuntimeError("out of luck")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), stop="--stop" in sys.argv)
