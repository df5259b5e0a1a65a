"""Check that micro-batches, ranks, tiles, handlers and interruptions do not change the result.

The factory is a function without arguments that returns a trainer, with its handlers attached, and
its loader. The exit code is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from diptych.commands.factory import find_factory
from diptych.engine.certificate.certificate import certify
from diptych.engine.trainer import Trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("factory", metavar="module:function", help="returns trainer and loader")
    parser.add_argument(
        "--microbatch-size", type=int, metavar="N", help="samples of a micro-batch (a third)"
    )
    parser.add_argument(
        "--interruption",
        type=int,
        metavar="STEPS",
        help="also interrupt a run of so many steps, and resume it",
    )


def run(options: argparse.Namespace) -> int:
    """Print the reports; return 1 if a check fails, else 0."""
    _check_numbers(options)
    build = find_factory(options.factory)
    trainer, loader = _built(build(), options.factory)
    reports: list[Any] = [
        certify(trainer, next(iter(loader)), microbatch_size=options.microbatch_size)
    ]
    if options.interruption is not None:
        steps = options.interruption
        reports.append(certify.interruption(build, steps=steps, at=max(1, steps // 3)))
    sys.stdout.write("".join(f"{report}\n" for report in reports))
    return 0 if all(report.passed for report in reports) else 1


def _check_numbers(options: argparse.Namespace) -> None:
    """Raise ValueError if a number is too small."""
    for name, least in (("microbatch_size", 1), ("interruption", 2)):
        given = getattr(options, name)
        if given is not None and given < least:
            raise ValueError(f"--{name.replace('_', '-')} must be >= {least}, got {given}")


def _built(built: Any, factory: str) -> tuple[Trainer, Iterable[Any]]:
    """Return the trainer and the loader; raise TypeError if the factory returned something else."""
    if not (isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], Trainer)):
        raise TypeError(
            f"factory must return a Trainer and its loader, got {type(built).__name__}. End "
            f"{factory} with: return trainer, loader."
        )
    return built
