"""A DataLoader whose workers leave alone what their parent has left in cycles."""

from __future__ import annotations

import gc
from typing import Any

from torch.utils.data import DataLoader, Dataset


class WorkerLoader(DataLoader[Any]):
    """A DataLoader whose workers do not collect the garbage of their parent.

    The memory of batches that the parent copied to a GPU cannot be freed in a process of its own:
    the attempt ends it.

    Args:
        dataset: As for `DataLoader`.
        **arguments: Those of `DataLoader` but `worker_init_fn`.
    """

    def __init__(self, dataset: Dataset[Any], **arguments: Any) -> None:
        super().__init__(dataset, worker_init_fn=_leave_garbage, **arguments)

    def __iter__(self) -> Any:
        collects = gc.isenabled()
        gc.disable()  # in workers that start here, until `_leave_garbage`
        try:
            return super().__iter__()
        finally:
            if collects:
                gc.enable()


def _leave_garbage(_: int) -> None:
    gc.freeze()
    gc.enable()
