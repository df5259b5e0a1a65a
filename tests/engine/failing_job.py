"""A small job of two ranks in which one fails, as a script.

Usage: python -m tests.engine.failing_job FOLDER WHAT [SECONDS], with RANK and the like in the
environment. With SECONDS, the timeout, each rank has a GPU.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

from ignite.engine import Events

from diptych.engine import Trainer, process_group
from diptych.engine.distributed.collectives import rank
from diptych.handlers import default_handlers
from tests.engine.models import paired, trainer_of

FAILS_AT = 3


def free_port() -> int:
    """Return a port for the store of a job."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def goes_wrong(trainer: Trainer, what: str) -> None:
    """Fail on the second rank in the middle of the run, in one of several ways."""
    if rank() == 0 or trainer.state.iteration != FAILS_AT:
        return
    if what == "raises":
        raise ValueError("planted")
    if what == "hangs":
        time.sleep(25)  # longer than the timeout
    if what == "leaves":
        os._exit(3)  # like a process that the operating system has killed


def main(folder: Path, what: str, device: str) -> None:
    """Train on all ranks."""
    trainer = trainer_of(log_every=1, device=device)
    trainer.add_event_handler(Events.ITERATION_STARTED, goes_wrong, what)
    if what == "aborts" and rank() == 0:  # what a backend's watchdog does
        abort = threading.Timer(1.0, os.abort)
        trainer.add_event_handler(Events.ITERATION_STARTED(once=2), abort.start)
    if what == "aborts" and rank() == 1:
        trainer.add_event_handler(Events.ITERATION_STARTED(once=2), lambda: time.sleep(3.0))
    trainer.attach(*default_handlers(folder, health=False))  # ranks meet in the average alone
    trainer.run([paired(4)] * 10, max_epochs=1)


if __name__ == "__main__":
    device, backend, seconds = "cpu", "gloo", 60.0
    if len(sys.argv) > 3:
        device, backend, seconds = f"cuda:{os.environ['RANK']}", "nccl", float(sys.argv[3])
    with process_group(backend=backend, timeout=timedelta(seconds=seconds)):
        main(Path(sys.argv[1]), sys.argv[2], device)
