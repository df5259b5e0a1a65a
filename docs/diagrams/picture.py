"""An SVG picture of boxes, arrows and texts, in the colours of the page that includes it."""

from __future__ import annotations

from html import escape

INK = "var(--md-default-fg-color, #222)"
FAINT = "var(--md-default-fg-color--light, #666)"
PAPER = "var(--md-default-bg-color, #fff)"
# Drawn half transparent, so that they are readable on a light and a dark background.
FILLS = {"work": "#5c6bc0", "event": "#26a69a", "data": "#ffa726", "plain": "#9e9e9e"}
SIZE, LINE = 13, 17
WIDTH_OF_A_CHARACTER = {False: 0.56, True: 0.61}
"""In units of the font size; False: text, True: code."""


Area = tuple[int, int, int, int]
"""The left edge, the top edge, the width and the height of a rectangle."""


class TooWideError(ValueError):
    """A text is wider than its box."""


class Picture:
    """A picture, drawn by its methods; `svg()` returns it.

    Args:
        name: identifies the picture, unique on a page.
        width: width in pixels.
        height: height in pixels.
        title: describes the picture to screen readers.
    """

    def __init__(self, name: str, width: int, height: int, title: str) -> None:
        self._name, self._width, self._height, self._title = name, width, height, title
        self._parts: list[str] = []

    def box(self, area: Area, text: str, kind: str = "plain") -> None:
        """Draw a rectangle with centred text; a line that begins with ` is code.

        Args:
            area: the rectangle, in pixels.
            text: one or more lines.
            kind: "work", "event", "data" or "plain"; determines the colour.

        Raises:
            TooWideError: if a line is wider than the box.
        """
        x, y, width, height = area
        self._rectangle(area, FILLS[kind], opacity=0.22)
        lines = text.split("\n")
        top = y + height / 2 - LINE * (len(lines) - 1) / 2 + SIZE * 0.36
        for number, line in enumerate(lines):
            self.text(x + width // 2, top + number * LINE, line, anchor="middle", room=width - 8)

    def frame(self, area: Area, text: str) -> None:
        """Draw an empty rectangle around other shapes, with a text at its upper left."""
        x, y, width, _ = area
        self._rectangle(area, FILLS["plain"], opacity=0.06)
        self.text(x + 10, y + 19, text, color=FAINT, room=width - 20)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "start",
        color: str = INK,
        room: int | None = None,
    ) -> None:
        """Write one line; a line that begins with ` is code.

        Args:
            x: position of the anchor, in pixels.
            y: position of the base line, in pixels.
            text: the line.
            anchor: "start", "middle" or "end".
            color: a CSS colour.
            room: the largest allowed width, in pixels.

        Raises:
            TooWideError: if the line is wider than `room`.
        """
        is_code, text = text.startswith("`"), text.strip("`")
        needed = len(text) * SIZE * WIDTH_OF_A_CHARACTER[is_code]
        if room is not None and needed > room:
            raise TooWideError(
                f"text {text!r} must fit into {room} pixels, got {needed:.0f}. Shorten it."
            )
        font = "monospace" if is_code else "sans-serif"
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-family="{font}" '
            f'font-size="{SIZE}" fill="{color}">{escape(text)}</text>'
        )

    def arrow(self, *points: tuple[int, int], dashed: bool = False) -> None:
        """Draw a line through points, with an arrowhead at the last one."""
        path = " ".join(f"{x},{y}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{FAINT}" stroke-width="1.5"{dash} '
            f'marker-end="url(#{self._name}-head)"/>'
        )

    def svg(self) -> str:
        """Return the picture as SVG. It has no blank line, which would end it inside Markdown."""
        head = (
            f'<marker id="{self._name}-head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{FAINT}"/></marker>'
        )
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self._width} {self._height}" '
            f'role="img" aria-label="{escape(self._title)}" '
            f'style="width:100%;min-width:{self._width * 3 // 4}px;max-width:{self._width}px">',
            f"<defs>{head}</defs>",
            *self._parts,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"

    def _rectangle(self, area: Area, color: str, *, opacity: float) -> None:
        x, y, width, height = area
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{color}" '
            f'fill-opacity="{opacity}" stroke="{color}" stroke-width="1.2"/>'
        )
