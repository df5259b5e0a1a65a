"""A hook of MkDocs: each reference page starts with a table of one line a name."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the Markdown of a page, with the table before its first section."""
    names = re.findall(r"^::: (\S+)$", markdown, re.MULTILINE)
    if not page.file.src_uri.startswith("api/") or not names:
        return markdown
    rows = [f"| [`{name.rpartition('.')[2]}`][{name}] | {_first_line(name)} |" for name in names]
    head, section, rest = markdown.partition("\n## ")
    table = "\n".join(["| name | what it is |", "|---|---|", *rows])
    return f"{head}\n{table}\n{section}{rest}"


def _first_line(name: str) -> str:
    package, _, last = name.rpartition(".")
    text = inspect.getdoc(getattr(importlib.import_module(package), last)) or ""
    return text.partition("\n")[0].replace("|", "\\|")
