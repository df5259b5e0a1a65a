"""The default handlers on a disk that is full for a while: does the run go on, and end the same?

Usage: python -m benchmarks.full_disk

The kernel refuses to let any file of the process grow from iteration 7 to 21 of 36 (a limit of the
process, which needs no rights, takes the place of a small disk). The script fails if the run ends
early, or with other weights or other lines in `metrics.jsonl`.
"""

from __future__ import annotations

import logging
import resource
import sys
import tempfile
from pathlib import Path

import torch
from ignite.engine import Events
from torch import nn

from diptych.engine import SeededLoader, Trainer, tasks
from diptych.handlers import default_handlers
from diptych.losses import CrossEntropyLoss

FIRST, LAST, EPOCHS = 7, 21, 6


def train(directory: Path, *, full: bool) -> tuple[int, dict[str, torch.Tensor], bytes]:
    """Return iterations, weights and the content of `metrics.jsonl`."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(48, 8, generator=generator), torch.randint(4, (48,), generator=generator)
    )
    model = nn.Linear(8, 4)
    trainer = Trainer(
        model,
        CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        task=tasks.classification,
        seed=0,
        log_every=1,
        device="cpu",
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    if full:
        trainer.add_event_handler(Events.ITERATION_STARTED(once=FIRST), lambda: limit(0))
        trainer.add_event_handler(Events.ITERATION_STARTED(once=LAST), lambda: limit(soft))
    handlers = [h for h in default_handlers(directory, every=2) if type(h).__name__ not in SHOWN]
    trainer.attach(*handlers)
    try:
        trainer.run(SeededLoader(data, 8, seed=0), max_epochs=EPOCHS)
    finally:
        limit(soft)
    lines = (directory / "metrics.jsonl").read_bytes()
    return trainer.state.iteration, dict(model.state_dict()), lines


SHOWN = ("ProgressBar", "RunCard")


def outcome() -> tuple[bool, str]:
    """Return whether the run is the undisturbed one, and that in words."""
    logger = logging.getLogger("diptych")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as folder:
            whole = train(Path(folder) / "whole", full=False)
            found = train(Path(folder) / "full", full=True)
    except Exception as error:  # noqa: BLE001 - whatever ends the run is the outcome
        return False, f"full disk: the run ended with {error!r}"
    finally:
        logger.setLevel(level)
    weights = all(torch.equal(found[1][name], value) for name, value in whole[1].items())
    lines = found[2] == whole[2]
    words = (
        f"full disk from iteration {FIRST} to {LAST}: {found[0]} of {whole[0]} iterations, "
        f"{'the same' if weights else 'other'} weights, {'the same' if lines else 'other'} metrics"
    )
    return weights and lines and found[0] == whole[0], words


def main() -> int:
    """Print the outcome; return 1 if the run is not the undisturbed one."""
    same, words = outcome()
    print(words)
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
