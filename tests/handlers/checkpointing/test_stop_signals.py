"""Signals end a run at a safe point, with a checkpoint and the conventional exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from ignite.engine import Events

from diptych.engine import CheckpointError
from diptych.handlers.checkpointing.checkpoint_manager import CheckpointManager
from diptych.handlers.checkpointing.run_lock import RunLock
from tests.handlers.checkpointing.test_checkpoint_manager import digest, make_loader, make_trainer


@pytest.mark.parametrize(
    ("number", "error", "code"),
    [
        (signal.SIGTERM, SystemExit, 143),
        (signal.SIGUSR1, SystemExit, 138),
        (signal.SIGINT, KeyboardInterrupt, None),
    ],
)
def test_a_signal_ends_the_run_after_its_iteration_with_a_checkpoint(tmp_path, number, error, code):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path))
    trainer.add_event_handler(
        Events.ITERATION_STARTED(once=8), lambda: os.kill(os.getpid(), number)
    )
    before = signal.getsignal(number)
    with pytest.raises(error) as raised:
        trainer.run(make_loader(), max_epochs=3)
    assert code is None or raised.value.code == code
    assert (tmp_path / "checkpoint_epoch_2_iteration_8.pt").exists()
    assert signal.getsignal(number) == before

    resumed, whole = make_trainer(), make_trainer()
    resumed.attach(CheckpointManager(tmp_path))
    resumed.run(make_loader(), max_epochs=3)
    whole.run(make_loader(), max_epochs=3)
    assert digest(resumed) == digest(whole)


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["default", "ignored"])
def _before(request):
    """The action of SIGINT without a trainer; a background job ignores it."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_before")
def test_a_second_signal_ends_at_once(tmp_path):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path))

    def twice() -> None:
        for _ in range(2):  # two of one instant may arrive as one
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    trainer.add_event_handler(Events.ITERATION_STARTED(once=3), twice)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(make_loader(), max_epochs=1)
    assert trainer.state.iteration == 2
    assert not list(tmp_path.glob("*.pt"))


HOLD = """
import sys, time
from pathlib import Path
from diptych.handlers.checkpointing.run_lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_on_one_folder_is_refused_until_the_first_is_gone(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=f"process {holder.pid} on .* has it"):
            RunLock(tmp_path).acquire()
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_a_folder_that_cannot_be_made_is_an_error_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="cannot be written"):
        trainer.run(make_loader(), max_epochs=1)
    assert trainer.state.iteration == 0
