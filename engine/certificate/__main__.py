"""`python -m diptych.engine.certificate module:factory`: the certificate of a training in a file."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from diptych.engine.certificate.certificate import certify
from diptych.engine.trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0 where every check has passed, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m diptych.engine.certificate",
        description="Check whether how a training is run changes what it gives.",
    )
    parser.add_argument(
        "factory", help="module:function that returns a trainer with its handlers, and its loader"
    )
    parser.add_argument("--microbatch-size", type=int, help="samples of a piece")
    parser.add_argument(
        "--interruption",
        type=int,
        metavar="STEPS",
        help="also interrupt a run of so many steps, and resume it",
    )
    options = parser.parse_args(arguments)
    build = factory_of(options.factory)
    trainer, loader = build()
    reports: list[Any] = [
        certify(trainer, next(iter(loader)), microbatch_size=options.microbatch_size)
    ]
    if options.interruption:
        steps = options.interruption
        reports.append(certify.interruption(build, steps=steps, at=max(1, steps // 3)))
    sys.stdout.write("".join(f"{report}\n" for report in reports))
    return 0 if all(report.passed for report in reports) else 1


def factory_of(name: str) -> Callable[[], tuple[Trainer, Iterable[Any]]]:
    """Return the function that `module:function` names.

    Raises:
        ValueError: if the name has another form, or the module has no such function.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not function_name:
        raise ValueError(f"the factory must be module:function, got {name!r}")
    factory = getattr(importlib.import_module(module_name), function_name, None)
    if factory is None:
        raise ValueError(
            f"the factory must be a function of {module_name}, which has no {function_name!r}"
        )
    found: Callable[[], tuple[Trainer, Iterable[Any]]] = factory
    return found


if __name__ == "__main__":
    raise SystemExit(main())
