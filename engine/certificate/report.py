"""What the certificate says about one update."""

from __future__ import annotations

import attrs


@attrs.frozen
class Check:
    """One way to run an update, against the plain one.

    Attributes:
        way: how it was run.
        error: the largest error of a parameter's gradient (for handlers: of a weight after the
            update), relative to its largest entry; None where it was not run.
        passed: whether that is rounding; True where the way does not apply.
        remark: the culprit, or why it was not run.
    """

    way: str
    error: float | None
    passed: bool
    remark: str = ""

    @property
    def verdict(self) -> str:
        """One word: equal, CHANGES, or not run."""
        if self.error is None:
            return "not run" if self.passed else "FAILS"
        return "equal" if self.passed else "CHANGES"


@attrs.frozen
class InvarianceReport:
    """What changes an update, and what does not.

    Attributes:
        checks: one for each way.
    """

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no way changes anything."""
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


def shortened(names: list[str]) -> str:
    """Return a few names and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
