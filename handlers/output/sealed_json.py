"""JSON files that end with a digest of their text, so that a damage shows when they are read."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from diptych.handlers.contained_paths import open_file

START, END = "{\n", "\n}\n"
MARK = '  "sealed": true,\n'
"""The first member. A damaged block cannot remove both it and the digest, and leave JSON."""
HALF = re.compile(r"(\\\\|\\ud[89ab]..\\ud[c-f]..)|\\ud[89a-f]..")
"""An escaped half of a character, which a path has for bytes that are no text; whole ones before
it, and backslashes, are its group."""
SEAL = re.compile(r',\n  "digest": "([0-9a-f]{64})"\n}\n\Z')


def sealed(text: str, name: str) -> str:
    """Return the text of a JSON object with a last member, the digest of the text before it.

    Args:
        text: as `json.dumps` returns it with an indent, and a line feed.
        name: of the file, which the digest includes: another file's content does not pass for it.
    """
    text = HALF.sub(lambda found: found[1] or "?", text)  # readers refuse halves
    body = START + MARK + text.removeprefix(START).removesuffix(END)
    return f'{body},\n  "digest": "{_digest(body, name)}"{END}'


def read_sealed(path: Path, without: str) -> dict[str, Any]:
    """Return the content of a file without its digest; a file without a digest is accepted.

    The error says what happens `without` the file.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: naming the file, if it cannot be read.
        ValueError: naming the file, if it is damaged.
    """
    try:
        text = read_file(path).decode()
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")  # noqa: TRY004, TRY301
        _check(text, content, path.name)
        json.dumps(content, ensure_ascii=False).encode()  # half a character can be escaped
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} must be a JSON object as it was written, but it has changed ({error}). "
            f"Restore it from a copy, or remove it: {without}."
        ) from error
    return {key: value for key, value in content.items() if key not in {"sealed", "digest"}}


def _check(text: str, content: dict[str, Any], name: str) -> None:
    """Check the digest, if there is one."""
    seal = SEAL.search(text)
    if seal is None and not {"sealed", "digest"} & content.keys():
        return
    if seal is None or seal.group(1) != _digest(text[: seal.start()], name):
        raise ValueError("its digest is that of another text")


def read_file(path: Path, start: int = 0) -> bytes:
    """Return the bytes of a file from a position on.

    Raises:
        OSError: naming the file and the way out, of the type that the system raised.
    """
    try:
        with open_file(path) as file:
            file.seek(start)
            return file.read()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> OSError:
    """Return an error of the same type that names the file and the way out."""
    return OSError(
        error.errno, f"{path} cannot be read: {error.strerror}. Check the path and its rights."
    )


def _digest(text: str, name: str) -> str:
    return hashlib.sha256(f"{name}\n{text}".encode()).hexdigest()
