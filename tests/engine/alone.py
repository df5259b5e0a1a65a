"""Acts of one rank of two alone, which end the run of both, for the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Events

from diptych.engine import Trainer, process_group
from diptych.engine.state.run_state import run_state
from diptych.handlers import RetrievalRecall
from tests.engine.lost_ranks import error_of, evaluate, in_a_group, update
from tests.engine.models import paired, trainer_of

TIMEOUT = 3.0
"""Seconds that the ranks wait for one another."""


def only_on(rank: int, at: int, act: Callable[[Trainer], object]) -> Callable[[Path], None]:
    """Return a case in which one rank does something before an iteration."""

    def case(_: Path) -> None:
        torch.manual_seed(0)
        trainer = trainer_of()
        if dist.get_rank() == rank:
            trainer.add_event_handler(Events.ITERATION_STARTED(once=at), act)
        trainer.run([paired(4)] * 4, max_epochs=1)

    return case


def freeze(trainer: Trainer) -> None:
    trainer.model.image[0].requires_grad_(False)


def evaluate_alone(_: Trainer) -> None:
    evaluate([paired(4, torch.float32)], RetrievalRecall(k=(1,)))


class PlantedError(RuntimeError):
    """An error of a user's code."""


def fail(*_: Any) -> None:
    raise PlantedError("planted")


class Unattachable:
    """A handler that cannot be attached on the second rank."""

    def attach(self, _: Trainer) -> None:
        if dist.get_rank() == 1:
            fail()


def failing_attach(_: Path) -> None:
    torch.manual_seed(0)
    with process_group():
        update(trainer_of().attach(Unattachable()))


class FailingLoader:
    """A loader that fails on the second rank after a batch."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        yield paired(4)
        if dist.get_rank() == 1:
            fail()
        yield from [paired(4)] * 2


def failing_loader(_: Path) -> None:
    torch.manual_seed(0)
    trainer_of().run(FailingLoader())


PLANTED = "Rank 1 failed with tests.engine.alone.PlantedError: planted"
FROZEN = "agreeing on the trainable parameters (frozen on rank 1: image.0.weight, image.0.bias)"
END = "the end of a run (after iteration 2)"
BOTH_END: dict[str, tuple[Callable[[Path], object], tuple[str, str]]] = {
    "freezes": (
        only_on(1, 2, freeze),
        (f"at: averaging gradients. Rank 1 waits at: {FROZEN}", f"at: {FROZEN}. Rank 0 "),
    ),
    "evaluates": (
        only_on(1, 2, evaluate_alone),
        ("at: averaging gradients. Rank 1 waits at: an evaluation", "at: an evaluation. Rank 0 "),
    ),
    "takes a state": (
        only_on(0, 3, run_state),
        ("at: taking the state of the run. Rank 1 ", "Rank 0 waits at: taking the state"),
    ),
    "fails in attach": (failing_attach, (f"at: the start of a run. {PLANTED}", "planted")),
    "fails in the loader": (failing_loader, (PLANTED, "planted")),
    "fails in a handler": (only_on(1, 2, fail), (PLANTED, "planted")),
    "stops": (
        only_on(1, 2, lambda trainer: trainer.terminate()),
        (f"at: averaging gradients. Rank 1 waits at: {END}", f"at: {END}. Rank 0 waits at: "),
    ),
    "stops an epoch": (
        only_on(0, 2, lambda trainer: trainer.terminate_epoch()),
        ("at: the end of an epoch (after iteration 2)", "Rank 0 waits at: the end of an epoch"),
    ),
}
"""Name: a case that goes wrong on one rank, and parts of the errors of both."""


def work(rank: int, folder: str) -> None:
    """Run every case as one of the two ranks, each in a group of its own; save the errors."""
    torch.set_num_threads(1)
    place = Path(folder)
    found = {
        name: in_a_group(name, rank, place, lambda f=case: error_of(f, place), seconds=TIMEOUT)
        for name, (case, _) in BOTH_END.items()
    }
    torch.save(found, place / f"{rank}.pt")
