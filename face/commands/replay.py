"""Repeat an update that a LossGuard recorded, up to its gradients.

The factory builds the trainer of the run, or a tuple that begins with it, with the same model,
loss, task, optimizer and settings. Weights, buffers, random state and batch come from the record;
attached handlers do not act. The exit code is 1 if a value differs. A record of N ranks needs N
ranks: `torchrun --nproc-per-node N -m diptych replay ...`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from diptych.commands.factory import find_factory
from diptych.engine.distributed.process_group import process_group
from diptych.handlers.loss_guard.fault_records import NAME
from diptych.handlers.loss_guard.replay import TOLERANCE, replay, report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("record", type=Path, metavar="RECORD", help=f"a file {NAME.pattern}")
    parser.add_argument(
        "--factory", required=True, metavar="module:function", help="returns the trainer"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        metavar="X",
        help="largest relative difference that counts as equal (%(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Print recorded and reproduced values; return 1 if one differs, else 0."""
    factory = find_factory(options.factory)
    with process_group():
        replayed = replay(options.record, factory)
    sys.stdout.write("\n".join(report(replayed, options.tolerance)) + "\n")
    return 1 if replayed.differing(options.tolerance) else 0
