"""A sink that calls a function, such as the method of an Ignite logger."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs

from diptych.handlers.sinks.sink import Sink

if TYPE_CHECKING:
    from diptych.engine.metrics.metrics_collector import Record
    from diptych.engine.trainer import Trainer


@attrs.define(eq=False)
class ToLogger(Sink):
    """Passes every record to a function, such as one that calls an Ignite logger.

    ```python
    visdom = VisdomLogger()
    trainer.attach(ToLogger(lambda values, step: show(visdom, values, step), close=visdom.close))
    ```

    The tags are the same as in every other sink. `WandB`, `MLflow` and `ClearML` also log the
    settings, and continue the same run when training resumes.

    Event: `MetricsEvents.LOGGED`, `RunEvents.ENDED`. Runs on rank 0 only.
    Cost: the function's own, at log points only.

    Args:
        write: called with a mapping of tag to value, and the iteration.
        close: called when the run has completed, was terminated or failed, and after a record that
            arrives later; None: nothing is called.

    Raises:
        TypeError: if one of them is not callable.
    """

    leaves_traces = True

    write: Callable[[dict[str, float], int], Any] = attrs.field(
        validator=attrs.validators.is_callable()
    )
    close: Callable[[], Any] | None = attrs.field(
        default=None, validator=attrs.validators.optional(attrs.validators.is_callable())
    )

    def write_record(self, _: Trainer, record: Record) -> None:
        """Call `write`."""
        self.write(dict(record.values), record.step)

    def close_destination(self, _: Trainer) -> None:
        """Call `close`, if there is one."""
        if self.close is not None:
            self.close()
