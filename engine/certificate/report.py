"""The report of a certificate on one update."""

from __future__ import annotations

import attrs


@attrs.frozen
class Check:
    """One way to run an update, compared with the plain one.

    Attributes:
        way: the way, in words.
        error: the largest error of a parameter's gradient (for handlers: of a weight after the
            update), relative to its largest entry; None if the check did not run.
        passed: whether the error is rounding; True if the way does not apply.
        remark: the cause of a difference, or the reason why the check did not run.
    """

    way: str
    error: float | None
    passed: bool
    remark: str = ""

    @property
    def verdict(self) -> str:
        """The result in a word: equal, CHANGES, FAILS or not run."""
        if self.error is None:
            return "not run" if self.passed else "FAILS"
        return "equal" if self.passed else "CHANGES"


@attrs.frozen
class InvarianceReport:
    """The checks of one update; `str(report)` is a table.

    Attributes:
        checks: one for each way to run the update.
    """

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether the update is the same in every way."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        rows = [("run as", "relative error", "verdict", "why")]
        for check in self.checks:
            error = "-" if check.error is None else f"{check.error:.1e}"
            rows.append((check.way, error, check.verdict, check.remark))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]
            ).rstrip()
            for row in rows
        )
