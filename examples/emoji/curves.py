"""An SVG picture of four charts with the health values of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import attrs

from diptych.handlers import Finding

WIDTH, HEIGHT, LEFT, TOP, GAP = 172, 120, 26, 34, 38
COLORS = ("#3949ab", "#e65100", "#2e7d32")

Records = Sequence[tuple[int, Mapping[str, float]]]


@attrs.frozen
class Chart:
    """One chart.

    Attributes:
        title: the title above it.
        low: the lower end of the axis.
        high: the upper end of the axis; values outside are clipped.
        curves: the name of each curve to the tag of its values.
    """

    title: str
    low: float
    high: float
    curves: Mapping[str, str]


CHARTS = (
    Chart("loss / ln B", 0, 1.25, {"loss": "health/loss_over_chance"}),
    Chart("AUROC of pairs", 0.4, 1, {"pairs": "health/auroc"}),
    Chart("spread", 0, 1.05, {"image": "health/image/spread", "text": "health/text/spread"}),
    Chart(
        "other signs",
        0,
        1.05,
        {
            "temperature": "health/temperature_position",
            "duplicates": "health/duplicates",
            "image moving": "health/encode_image/moving",
        },
    ),
)


def picture(records: Records, findings: Sequence[Finding]) -> str:
    """Return an SVG of all charts; a dashed line marks the first finding.

    Args:
        records: steps and values, in order.
        findings: the findings of the health rules.
    """
    width = len(CHARTS) * (WIDTH + GAP) + LEFT
    height = TOP + HEIGHT + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for index, chart in enumerate(CHARTS):
        parts += _chart(chart, LEFT + index * (WIDTH + GAP), records, findings)
    names = "; ".join(f"{finding.rule} (iteration {finding.step})" for finding in findings)
    label = names or "nothing found"
    parts.append(f'<text x="{LEFT}" y="14" font-size="12" fill="#222">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _chart(chart: Chart, left: float, records: Records, findings: Sequence[Finding]) -> list[str]:
    last = records[-1][0]

    def at(step: float, value: float) -> tuple[float, float]:
        share = (min(max(value, chart.low), chart.high) - chart.low) / (chart.high - chart.low)
        return left + WIDTH * step / last, TOP + HEIGHT * (1 - share)

    bottom = TOP + HEIGHT
    parts = [
        f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#bbb"/>',
        f'<text x="{left}" y="{TOP - 5}" fill="#222">{escape(chart.title)}</text>',
        f'<text x="{left - 4}" y="{bottom}" text-anchor="end" fill="#666">{chart.low:g}</text>',
        f'<text x="{left - 4}" y="{TOP + 8}" text-anchor="end" fill="#666">{chart.high:g}</text>',
        f'<text x="{left + WIDTH}" y="{bottom + 12}" text-anchor="end" fill="#666">{last}</text>',
    ]
    for finding in findings[:1]:
        x = at(finding.step, 0)[0]
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" stroke="#c62828" '
            'stroke-dasharray="3 3"/>'
        )
    for number, (name, tag) in enumerate(chart.curves.items()):
        color = COLORS[number]
        points = [at(step, values[tag]) for step, values in records if tag in values]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        parts.append(
            f'<text x="{left + number * 62}" y="{bottom + 26}" fill="{color}">{escape(name)}</text>'
        )
    return parts
