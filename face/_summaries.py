"""Short representations of objects that hold much: a line of text, and a table in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from html import escape
from operator import attrgetter
from typing import ClassVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy


class Summarized:
    """An object whose representation names a few of its attributes, and holds no tensor.

    A class lists them in `_shown`, as paths: "settings.precision" is shown as `precision`. An
    attribute that is None or not there yet is left out.
    """

    __slots__ = ()
    _shown: ClassVar[tuple[str, ...]] = ()

    def __repr__(self) -> str:
        facts = ", ".join(f"{name}={text}" for name, text in self._facts().items())
        return f"{type(self).__name__}({facts})"

    def _repr_html_(self) -> str:
        """Return the table that a notebook shows."""
        rows = "".join(
            f'<tr><th style="text-align:left">{escape(name)}</th>'
            f'<td style="text-align:left">{escape(text)}</td></tr>'
            for name, text in self._facts().items()
        )
        return f"<b>{escape(type(self).__name__)}</b><table>{rows}</table>"

    def _facts(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for path in self._shown:
            with suppress(AttributeError):  # its construction is not finished, or has failed
                value = attrgetter(path)(self)
                if value is not None:
                    found[path.rpartition(".")[2].lstrip("_")] = _brief(value)
        return found


def _brief(value: object) -> str:
    """Return a value in a few words."""
    if isinstance(value, int | str | torch.device | Summarized):
        return str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, nn.Module):
        count = sum(p.numel() for p in value.parameters() if not is_lazy(p))
        return type(value).__name__ + (f" of {count:,} parameters" if count else "")
    if isinstance(value, Mapping):  # of metrics, by name
        return ", ".join(map(str, value)) or "none"
    if hasattr(type(value), "__len__"):
        with suppress(TypeError, NotImplementedError):
            return f"{type(value).__name__} of {len(value):,}"  # type: ignore[arg-type]
    return str(getattr(value, "__name__", type(value).__name__))
