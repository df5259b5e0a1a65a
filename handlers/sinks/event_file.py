"""TensorBoard's event files, written without a thread. Importing this imports TensorBoard."""

from __future__ import annotations

import itertools
import os
import socket
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from torch.utils.tensorboard import FileWriter, RecordWriter, SummaryWriter

from diptych.handlers.files import make_folder

_count = itertools.count()


class EventFile:
    """A new event file; an event is in it when `add_event` returns.

    Args:
        directory: made if it is not there.
    """

    def __init__(self, directory: Path) -> None:
        make_folder(directory)
        # TensorBoard reads the files of a folder in the order of their names.
        place = f"{socket.gethostname()}.{os.getpid()}.{next(_count):06}"
        self._directory = directory
        self._file = (directory / f"events.out.tfevents.{int(time.time()):010}.{place}").open(
            "wb", buffering=0
        )
        self._records = RecordWriter(self._file)
        self.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def add_event(self, event: Any) -> None:
        """Write an event."""
        self._records.write(event.SerializeToString())

    def get_logdir(self) -> str:
        """Return the folder."""
        return str(self._directory)

    def flush(self) -> None:
        """Do what an unbuffered file does on flush."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class DirectFileWriter(FileWriter):
    """Torch's file writer on an `EventFile`."""

    def __init__(self, directory: Path) -> None:
        # Torch's own constructor would start the thread.
        self.event_writer = EventFile(directory)


class DirectWriter(SummaryWriter):
    """Torch's `SummaryWriter` on an `EventFile`.

    The thread of torch's own contends with the training loop for the interpreter: beside an idle
    core that makes a record four times as dear as writing it at once.

    Args:
        directory: of the event file; made if it is not there.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        super().__init__(str(directory))

    def _get_file_writer(self) -> Any:
        if self.file_writer is None:
            file_writer: Any = DirectFileWriter(self._directory)
            all_writers: Any = {str(self._directory): file_writer}
            self.file_writer, self.all_writers = file_writer, all_writers
        return self.file_writer
