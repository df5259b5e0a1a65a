"""The memory of a handler before a step, for a step that is repeated after an exception."""

from __future__ import annotations

from typing import Generic, TypeVar

from diptych.engine.trainer import Trainer

Memory = TypeVar("Memory")


class BeforeStep(Generic[Memory]):
    """Keeps what a handler remembered before a step.

    A step that raises before its update is repeated by the next `run`, and with it the handlers of
    the events inside it. A handler that updates its memory there starts from that before the step:

    ```python
    self._sum = self._before.of(trainer, self._sum)
    ```

    The memory must not be changed in place.
    """

    def __init__(self) -> None:
        self._kept: tuple[int, int, Memory] | None = None

    def of(self, trainer: Trainer, memory: Memory) -> Memory:
        """Return the memory, or that before the first try of this iteration if it is repeated."""
        iteration, attempt = trainer.state.iteration, trainer.attempts
        if self._kept is not None and self._kept[0] == iteration:
            if self._kept[1] == attempt:  # a step may fire its events several times
                return memory
            memory = self._kept[2]
        self._kept = (iteration, attempt, memory)
        return memory

    def forget(self) -> None:
        """Forget it: the run continues elsewhere."""
        self._kept = None
