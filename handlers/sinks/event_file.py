"""TensorBoard event files written without a thread. Importing this module imports TensorBoard."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from torch.utils.tensorboard import FileWriter, RecordWriter, SummaryWriter

from diptych.handlers.output.appended_file import AppendedFile

_count = itertools.count()

Tolerated = Callable[[str], AbstractContextManager[None]]
"""Returns a context that logs an error instead of raising it; takes the name of the file."""


class EventFile(FileWriter):
    """A new event file; an event is in it when `add_event` returns.

    An event that cannot be written waits in memory, and is written with a later one. The directory
    is made if it is missing. Errors are raised unless they are `tolerated`.
    """

    def __init__(self, directory: str, tolerated: Tolerated = lambda _: nullcontext()) -> None:
        # TensorBoard reads the files of a directory in the order of their names.
        origin = f"{socket.gethostname()}.{os.getpid()}.{next(_count):06}"
        path = Path(directory, f"events.out.tfevents.{int(time.time()):010}.{origin}")
        self.file, self._tolerated = AppendedFile(path), tolerated
        self._records = RecordWriter(self)
        self.add_event(Event(file_version="brain.Event:2"))

    def write(self, chunk: bytes) -> None:
        """Write a record of the file's format."""
        with self._tolerated(str(self.file.path)):
            self.file.append(chunk)

    def add_event(self, event: Any, step: Any = None, walltime: float | None = None) -> None:
        """Write an event."""
        event.wall_time = time.time() if walltime is None else walltime
        if step is not None:
            event.step = int(step)
        self._records.write(event.SerializeToString())

    def get_logdir(self) -> str:
        """Return the directory."""
        return str(self.file.path.parent)

    def flush(self) -> None:
        """Write the events that wait."""
        with self._tolerated(str(self.file.path)):
            self.file.flush()

    def close(self) -> None:
        """Write the events that wait, and close the file."""
        with self._tolerated(str(self.file.path)):
            self.file.close()


class DirectSummaryWriter(SummaryWriter):
    """Torch's `SummaryWriter`, writing to an `EventFile`.

    The thread of torch's own file writer competes with the training loop for the interpreter: a
    record takes about 150 microseconds more of the processor.
    """

    def __init__(self, directory: str, tolerated: Tolerated) -> None:
        self._tolerated = tolerated
        super().__init__(directory)

    @property
    def event_file(self) -> EventFile | None:
        """The file; None if it was closed."""
        return self.file_writer

    def get_event_file(self) -> EventFile:
        """Return the file; open another one if it was closed."""
        file: EventFile = self._get_file_writer()
        return file

    def _get_file_writer(self) -> Any:
        if self.file_writer is None:
            file_writer: Any = EventFile(self.log_dir, self._tolerated)
            all_writers: Any = {self.log_dir: file_writer}
            self.file_writer, self.all_writers = file_writer, all_writers
        return self.file_writer
