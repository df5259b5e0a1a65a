"""The decision to save with flags, as it was before `save_policy`: the oracle for its test."""

from __future__ import annotations

from diptych.handlers.checkpointing.save_policy import RunStatus

Action = tuple[str, object]


class PreviousPolicy:
    """Eight flags and the code that read and wrote them, without the files that it wrote.

    Attributes:
        actions: what it did at the last call, in order.
    """

    def __init__(self, *, best: bool, timed: bool) -> None:
        self.best = best
        self._waits = not best and not timed
        self._scored: int | None = 0
        self._due = False
        self._saved: tuple[int, int] | None = None
        self._timed = 0
        self._asleep = False
        self.actions: list[Action] = []

    def fall_due(self) -> None:
        self._due, self._asleep = True, False

    def restore(self) -> None:
        self._asleep = False
        self._saved = None

    def load(self, scored: int | None) -> None:
        self._scored = scored

    def start(self, status: RunStatus) -> None:
        if self._scored is None:
            self._scored = len(status.values)

    def at_safe_point(self, status: RunStatus) -> None:
        self.actions = []
        if self._asleep and not status.signal:
            return
        self._look(status)
        self._asleep = self._waits and not self.actions and not self._due

    def _look(self, status: RunStatus) -> None:
        number, timed = status.signal, status.timeouts
        self._due |= timed > self._timed
        self._timed = max(timed, self._timed)
        if status.is_finished:
            return
        score = self._new_score(status)
        missing = status.missing
        asked = self._due or number > 0 or missing is not None
        if score is not None or (asked and not status.position_is_lost):
            self._save(status, score)
        if missing is not None:
            self.actions.append(("raise", missing))
            return
        if number:
            self.actions.append(("leave", number))

    def _save(self, status: RunStatus, score: float | None) -> None:
        self._saved = status.at
        self._due = self._due and status.position_is_lost
        self.actions.append(("save", score))

    def at_end(self, status: RunStatus) -> None:
        self.actions = []
        score = self._new_score(status)  # amended: it was left out where the state was saved before
        if score is not None or status.save_failed or self._saved != status.at:
            self._save(status, score)
        if status.missing is not None and status.is_finished:
            self.actions.append(("raise", status.missing))

    def _new_score(self, status: RunStatus) -> float | None:
        if not self.best:
            return None
        values = status.values
        is_new = bool(values) and len(values) != self._scored
        self._scored = len(values)
        return values[-1] if is_new else None
