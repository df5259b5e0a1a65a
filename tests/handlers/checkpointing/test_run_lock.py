"""The lock of a run's directory: no copy, no fork and no second trainer takes it away."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ignite.engine import Events

from diptych.engine import CheckpointError
from diptych.engine.random_state import preserved_random_state
from diptych.handlers.checkpointing.checkpoint_manager import CheckpointManager
from diptych.handlers.checkpointing.run_lock import RunLock
from tests.handlers.checkpointing.test_checkpoint_manager import digest, make_loader, make_trainer

with contextlib.suppress(ImportError):  # Windows
    import fcntl

POSIX = pytest.mark.skipif(os.name == "nt", reason="needs fork, flock or pipes")

TRY = """
import sys
from pathlib import Path
from diptych.handlers.checkpointing.run_lock import RunLock
try:
    RunLock(Path(sys.argv[1])).acquire()
except Exception as error:
    print(error)
else:
    print("free")
"""

FORK_AND_DIE = """
import os, signal, sys, time
from pathlib import Path
from diptych.handlers.checkpointing.run_lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
if os.fork() == 0:
    print(os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
time.sleep(60)
"""


class Owner:
    """Stands for a trainer."""


def seen_by_another_process(directory: Path) -> str:
    """Return "free", or the error that another process gets."""
    result = subprocess.run(
        [sys.executable, "-c", TRY, str(directory)], capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def test_a_copy_of_the_directory_leaves_it_locked(tmp_path):
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    shutil.copytree(tmp_path / "run", tmp_path / "backup")
    (tmp_path / "run" / "run.lock").read_bytes()
    assert f"process {os.getpid()} on " in seen_by_another_process(tmp_path / "run")
    assert seen_by_another_process(tmp_path / "backup") == "free"
    lock.release()
    assert seen_by_another_process(tmp_path / "run") == "free"


@POSIX
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_program_that_removes_or_restores_the_file_does_not_unlock(tmp_path):
    lock, path = RunLock(tmp_path), tmp_path / "run.lock"
    lock.acquire()
    for change in (path.unlink, lambda: shutil.copy(path, tmp_path / "b").replace(path)):
        change()
        child = os.fork()
        if child == 0:
            try:
                RunLock(tmp_path).acquire()
            except CheckpointError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    lock.release()
    assert seen_by_another_process(tmp_path) == "free"


@POSIX
@pytest.mark.parametrize("taken", [False, True])
def test_a_copy_in_place_of_a_moved_directory_is_locked_at_the_next_save(tmp_path, taken):
    folder, seen, other = tmp_path / "run", [], []

    def move(trainer):
        if trainer.state.iteration == 3:
            folder.rename(tmp_path / "moved")
            shutil.copytree(tmp_path / "moved", folder)
            if taken:  # by another process, as far as the system can tell
                other.append((folder / "run.lock").open())
                fcntl.flock(other[0], fcntl.LOCK_EX)
        elif trainer.state.iteration == 5:
            seen.append(seen_by_another_process(folder))

    trainer = make_trainer()
    trainer.attach(CheckpointManager(folder, every=2))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, move)
    if taken:
        with pytest.raises(CheckpointError, match="must be used by one process, and process"):
            trainer.run(make_loader(), max_iters=6)
        other[0].close()
        assert trainer.state.iteration == 4
        assert [path.name for path in folder.glob("*.pt")] == ["checkpoint_epoch_1_iteration_2.pt"]
    else:
        trainer.run(make_loader(), max_iters=6)
        assert f"process {os.getpid()} " in seen[0]
        assert seen_by_another_process(folder) == "free"


def test_a_second_trainer_of_a_process_is_refused_and_cannot_unlock(tmp_path):
    first, second, owners = RunLock(tmp_path), RunLock(tmp_path), (Owner(), Owner())
    first.acquire(owners[0])
    with pytest.raises(CheckpointError, match=r"another trainer of this process \(\d+\) has it"):
        second.acquire(owners[1])
    second.release()
    assert "has it" in seen_by_another_process(tmp_path)
    first.release()
    second.acquire(owners[1])
    assert "has it" in seen_by_another_process(tmp_path)
    first.release()  # a second time
    assert "has it" in seen_by_another_process(tmp_path)
    second.release()
    assert seen_by_another_process(tmp_path) == "free"


def test_the_directory_is_recognized_by_another_path(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    owner, lock = Owner(), RunLock(tmp_path / "run")
    lock.acquire(owner)
    with pytest.raises(CheckpointError, match="another trainer of this process"):
        RunLock(tmp_path / "link").acquire(Owner())
    assert "has it" in seen_by_another_process(tmp_path / "link")
    lock.release()


def test_two_managers_of_one_trainer_share_the_directory(tmp_path):
    first, second, owner = RunLock(tmp_path), RunLock(tmp_path), Owner()
    for lock in (first, first, second):
        lock.acquire(owner)
    first.release()
    first.release()
    assert "has it" in seen_by_another_process(tmp_path)
    second.release()
    assert seen_by_another_process(tmp_path) == "free"


def test_a_trainer_that_is_gone_holds_nothing(tmp_path):
    owner, lock = Owner(), RunLock(tmp_path)
    lock.acquire(owner)
    del owner
    RunLock(tmp_path).acquire(Owner())


@POSIX
def test_a_forked_process_does_not_hold_the_lock_of_a_killed_parent(tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", FORK_AND_DIE, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    child = int(parent.stdout.readline())
    try:
        assert f"process {parent.pid} on " in seen_by_another_process(tmp_path)
        parent.kill()
        parent.wait()
        os.kill(child, 0)  # it is there
        assert seen_by_another_process(tmp_path) == "free"
    finally:
        parent.kill()
        os.kill(child, 9)
        parent.stdout.close()


@POSIX
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_neither_has_the_lock_nor_ends_it(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    child = os.fork()
    if child == 0:
        try:
            lock.acquire()  # the parent has it
        except CheckpointError:
            lock.release()
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert "has it" in seen_by_another_process(tmp_path)
    lock.release()


def test_a_lock_that_is_a_link_is_refused_and_its_target_stays(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(CheckpointError, match="cannot be written"):
        RunLock(tmp_path / "run").acquire()
    assert (tmp_path / "precious").read_text() == "precious"


@POSIX
def test_a_pipe_instead_of_a_lock_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "run.lock")
    with pytest.raises(CheckpointError, match=r"run.lock is not a file"):
        RunLock(tmp_path).acquire()


@POSIX
def test_what_another_program_wrote_into_the_file_is_shown_without_control_characters(tmp_path):
    import fcntl

    with (tmp_path / "run.lock").open("wb+") as file:
        file.write(b"\x1b[2J\x00\xffnobody\n")
        file.flush()
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match=r"process \[2J.nobody has it") as raised:
            RunLock(tmp_path).acquire()
    assert str(raised.value).isprintable()


@POSIX
def test_without_locks_of_the_file_system_the_process_knows_its_own(tmp_path, monkeypatch, caplog):
    import fcntl

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    owner, lock = Owner(), RunLock(tmp_path)
    lock.acquire(owner)
    assert "cannot be locked" in caplog.text
    with pytest.raises(CheckpointError, match="another trainer of this process"):
        RunLock(tmp_path).acquire(Owner())
    lock.release()
    RunLock(tmp_path).acquire(Owner())


@POSIX
def test_a_lock_that_is_replaced_before_it_is_locked_is_locked_anew(tmp_path, monkeypatch):
    import fcntl

    real, replaced = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        if not replaced:
            replaced.append(True)
            (tmp_path / "run.lock").unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert "has it" in seen_by_another_process(tmp_path)
    lock.release()


def test_a_full_disk_does_not_keep_the_lock_from_holding(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    lock = RunLock(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        lock.acquire()
    assert "process unknown has it" in seen_by_another_process(tmp_path)
    lock.release()


def test_a_run_goes_on_when_a_second_trainer_of_its_process_is_refused(tmp_path):
    def run(directory: Path, *, second: bool) -> str:
        trainer = make_trainer()
        trainer.attach(CheckpointManager(directory, every=2))

        def intrude() -> None:
            with preserved_random_state():
                other = make_trainer()
                other.attach(CheckpointManager(directory))
                with pytest.raises(CheckpointError, match="another trainer of this process"):
                    other.run(make_loader(), max_epochs=9)
            assert "has it" in seen_by_another_process(directory)

        if second:
            trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), intrude)
        trainer.run(make_loader(), max_epochs=2)
        return digest(trainer)

    assert run(tmp_path / "a", second=True) == run(tmp_path / "b", second=False)
    assert seen_by_another_process(tmp_path / "a") == "free"


def test_a_checkpoint_is_not_saved_by_hand_into_a_directory_that_another_run_uses(tmp_path):
    trainer, manager = make_trainer(), CheckpointManager(tmp_path)
    trainer.attach(manager)
    lock = RunLock(tmp_path)
    lock.acquire()
    with pytest.raises(CheckpointError, match="has it"):
        manager.save_checkpoint(1, {})
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    lock.release()
    assert manager.save_checkpoint(1, {}).is_file()
    assert seen_by_another_process(tmp_path) == "free"
