"""Ids among labels and groups: which ones count, and the report of those that cannot."""

from __future__ import annotations

import logging

import attrs
import torch
from torch import Tensor

from diptych.engine.tasks import NO_LABEL

logger = logging.getLogger(__name__)


@attrs.define
class KnownIds:
    """Tells the samples that have a label or group from those that have none.

    An id below 0 is none, and so is a label that is not below the number of classes. Only -100
    says so on purpose; any other one is reported by `report`, which waits for the device, so that
    nothing else has to.

    Args:
        name: what the ids are, for the report.
        classes: the number of classes; None: any id >= 0 is known.
        consequence: what happens to samples without an id, for the report.
    """

    name: str
    classes: int | None = None
    consequence: str = "Such samples are left out"
    _odd: Tensor | None = attrs.field(default=None, init=False)
    _reported: bool = attrs.field(default=False, init=False)

    def mask(self, ids: Tensor) -> Tensor:
        """Return which samples have an id, bool [B]."""
        known = ids >= 0 if self.classes is None else (ids >= 0) & (ids < self.classes)
        if len(ids):
            # The one that is farthest from NO_LABEL, which is at no distance from itself.
            odd = ids.to(torch.int64).masked_fill(known, NO_LABEL)
            odd = odd if self._odd is None else torch.cat([odd, self._odd.to(odd.device)])
            # An index of one dimension: the host would wait for one of none.
            self._odd = odd[(odd - NO_LABEL).abs().argmax()[None]]
        return known

    def report(self, owner: str) -> None:
        """Log an error if there was an id that neither counts nor says that it does not; once."""
        odd = NO_LABEL if self._reported or self._odd is None else int(self._odd)
        if odd != NO_LABEL:
            self._reported = True
            rule = ">= 0" if self.classes is None else f"in [0, {self.classes})"
            logger.error(
                "%s: %s must be %s, or %d for a sample without one, got %d. %s.",
                owner,
                self.name,
                rule,
                NO_LABEL,
                odd,
                self.consequence,
            )
