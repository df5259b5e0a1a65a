"""The run's values in a function, such as one of Ignite's loggers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs
from ignite.engine import Events

from diptych.engine.distributed.collectives import rank
from diptych.engine.events import MetricsEvents

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer

AT_THE_END = (Events.COMPLETED, Events.EXCEPTION_RAISED)


@attrs.define(eq=False)
class ToLogger:
    """Gives every record to a function, such as one that logs scalars in a logger of Ignite's.

    ```python
    visdom = VisdomLogger()
    trainer.attach(ToLogger(lambda values, step: show(visdom, values, step), close=visdom.close))
    ```

    The tags are those of every other sink. `WandB`, `MLflow` and `ClearML` do more: they hand over
    the settings, and go on in the same run when it is resumed.

    Event: `MetricsEvents.LOGGED`; `COMPLETED` or `EXCEPTION_RAISED` closes. Rank 0 alone.
    Cost: that of the function, which may talk to a server; it is called at log points only.

    Args:
        write: called with a mapping of tag to number, and the iteration.
        close: called when the run has ended or failed; None: nothing is.

    Raises:
        TypeError: if one cannot be called.
    """

    write: Callable[[dict[str, float], int], Any] = attrs.field(
        validator=attrs.validators.is_callable()
    )
    close: Callable[[], Any] | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.is_callable())
    )

    def attach(self, trainer: Trainer) -> None:
        """Give the trainer's records to the logger."""
        if rank() == 0:
            trainer.add_event_handler(MetricsEvents.LOGGED, self._log)
            for event in AT_THE_END:
                trainer.add_event_handler(event, self._end)

    def _log(self, trainer: Trainer) -> None:
        record = trainer.metrics.record
        if record.values:
            self.write(dict(record.values), record.step)

    def _end(self, *_: object) -> None:
        if self.close is not None:
            self.close()
