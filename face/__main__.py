"""The command line: `diptych COMMAND ...`, or `python -m diptych COMMAND ...`.

In a clone of the repository in which nothing is installed, it is `python -m face COMMAND ...`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import select
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path

if find_spec("diptych") is None:  # a clone without an installation; spawned ranks inherit the path
    sys.path.append(str(Path(__file__).resolve().with_name("uninstalled")))

from diptych.engine.errors import CheckpointError, LostRankError, ResumeError
from diptych.version import __version__

COMMANDS = {
    "info": ("diptych.commands.info", "print versions and devices, for a bug report"),
    "certify": ("diptych.commands.certify", "check what changes the result of a training"),
    "replay": ("diptych.commands.replay", "repeat an update that a LossGuard recorded"),
    "compare": ("diptych.commands.compare", "compare the settings and the curves of runs"),
    "train": ("diptych.commands.train", "train two towers on your own images and captions"),
    "evaluate": ("diptych.commands.evaluate", "evaluate a trained model on images"),
    "embed": ("diptych.commands.embed", "write the features of images"),
    "search": ("diptych.commands.search", "find the images that match a text"),
    "zero-shot": ("diptych.commands.zero_shot", "label images without training"),
    "export": ("diptych.commands.export", "write a trained model for other programs"),
}
"""Module and one-line help of each command. A module has `add_arguments` and `run`; or, if the
extra `recipes` parses the arguments, a function with the command's name, or a `main` that takes
them."""

RECIPES = {"tyro", "yaml", "PIL"}
"""What commands import from the extra `recipes`."""

EXPECTED = (
    *(CheckpointError, LostRankError, ResumeError, ImportError, OSError, TypeError, ValueError),
)

UNREAD = 141
"""The shell's code of a program that SIGPIPE has ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; end quietly if what reads its output, such as `head`, has ended.

    Args:
        arguments: the command's name and its arguments; None: those of the process.

    Returns:
        The exit code: 0, 1 if a comparison found a difference, 2 if the input is unusable, 130
        after Ctrl-C, 141 if the output is no longer read.
    """
    try:
        return _command(arguments)
    except BrokenPipeError:
        if not _is_unread():
            raise
        return UNREAD
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # which the interpreter would report at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_unread() -> bool:
    """Return whether nothing reads stdout or stderr: other pipes can break too."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)  # no event but an error
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _command(arguments: Sequence[str] | None) -> int:
    if arguments is None and isinstance(sys.stdout, TextIOWrapper):
        # The name of a file may have bytes that are no text.
        sys.stdout.reconfigure(errors="backslashreplace")
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in {"-h", "--help", "--version"}:
        sys.stdout.write(f"diptych {__version__}\n" if name == "--version" else _table())
        return 0
    if name not in COMMANDS:
        sys.stderr.write(f"diptych: error: {_unknown(name)}\n")
        return 2
    try:
        return _run(name, rest)
    except EXPECTED as error:
        text = _explained(error)
        if text is None:
            raise  # a broken pipe, or from the user's own code, where the traceback is what helps
        sys.stderr.write(f"diptych {name}: error: {text}\n")
        return 2


def _run(name: str, arguments: Sequence[str]) -> int:
    try:
        command = import_module(COMMANDS[name][0])
        if hasattr(command, "add_arguments"):
            parser = argparse.ArgumentParser(prog=f"diptych {name}", description=command.__doc__)
            command.add_arguments(parser)
            return int(command.run(parser.parse_args(arguments)))
        if hasattr(command, "main"):
            return int(command.main(arguments))
        import tyro  # noqa: PLC0415 - an extra

        function = getattr(command, name.replace("-", "_"))
        return int(tyro.cli(function, args=arguments, prog=f"diptych {name}"))
    except KeyboardInterrupt:
        return 130  # the shell's code; a training has said where it resumes


def _table() -> str:
    """Return the list of commands."""
    rows = "".join(f"  {name:<10} {text}\n" for name, (_, text) in COMMANDS.items())
    return f"usage: diptych COMMAND ...\n\n{rows}\ndiptych COMMAND --help lists its arguments.\n"


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=2)
    hint = f"Did you mean {' or '.join(near)}?" if near else "diptych --help lists them."
    return f"command must be one of {', '.join(COMMANDS)}, got {name!r}. {hint}"


def _explained(error: Exception) -> str | None:
    """Return an error in a line; None if it is of a pipe, or of the user's own code."""
    if isinstance(error, BrokenPipeError):
        return None
    missing = str(getattr(error, "name", "")).partition(".")[0]
    if isinstance(error, ImportError) and missing in RECIPES:
        return f"it needs {missing}: pip install 'diptych[recipes]'"
    return str(error) if _raised_by_diptych(error) else None


def _raised_by_diptych(error: BaseException) -> bool:
    """Return whether the library itself raised an error, or called what did in Python's library."""
    names = [
        str(f.f_globals.get("__name__", "")) for f, _ in traceback.walk_tb(error.__traceback__)
    ]
    packages = [name.partition(".")[0] for name in names]
    others = [package for package in packages if package not in sys.stdlib_module_names]
    return others[-1:] == ["diptych"]


if __name__ == "__main__":
    sys.exit(main())
