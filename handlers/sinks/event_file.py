"""TensorBoard event files written without a thread. Importing this module imports TensorBoard."""

from __future__ import annotations

import itertools
import os
import socket
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from torch.utils.tensorboard import FileWriter, RecordWriter, SummaryWriter

_count = itertools.count()


class EventFile(FileWriter):
    """A new event file; an event is in it when `add_event` returns."""

    def __init__(self, directory: str) -> None:
        # TensorBoard reads the files of a directory in the order of their names.
        origin = f"{socket.gethostname()}.{os.getpid()}.{next(_count):06}"
        path = Path(directory, f"events.out.tfevents.{int(time.time()):010}.{origin}")
        self._file = path.open("wb", buffering=0)
        self._records = RecordWriter(self._file)
        self.add_event(Event(file_version="brain.Event:2"))

    def add_event(self, event: Any, step: Any = None, walltime: float | None = None) -> None:
        """Write an event."""
        event.wall_time = time.time() if walltime is None else walltime
        if step is not None:
            event.step = int(step)
        self._records.write(event.SerializeToString())

    def get_logdir(self) -> str:
        """Return the directory."""
        return str(Path(self._file.name).parent)

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class DirectSummaryWriter(SummaryWriter):
    """Torch's `SummaryWriter`, writing to an `EventFile`.

    The thread of torch's own file writer competes with the training loop for the interpreter: a
    record takes about 150 microseconds more of the processor.
    """

    def _get_file_writer(self) -> Any:
        if self.file_writer is None:
            file_writer: Any = EventFile(self.log_dir)
            all_writers: Any = {self.log_dir: file_writer}
            self.file_writer, self.all_writers = file_writer, all_writers
        return self.file_writer
