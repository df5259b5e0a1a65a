"""A cadence is "epoch" or a number of iterations, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ignite.engine import Events
from torch import Tensor

from diptych.engine import Trainer
from diptych.handlers import CheckpointManager, EarlyStopping, Evaluation, Histograms
from diptych.handlers.cadence import call_before_first_batch, call_every
from tests.handlers.runs import loader, make_trainer


@pytest.mark.parametrize(("every", "expected"), [("epoch", [6, 12]), (5, [5, 10])])
def test_a_function_is_called_at_its_cadence(every, expected):
    trainer, calls = make_trainer(), []
    call_every(trainer, every, lambda engine: calls.append(engine.state.iteration))
    trainer.run(loader(), max_epochs=2)
    assert calls == expected


@pytest.mark.parametrize("every", [0, True, 1.5, "step"])
def test_any_other_cadence_is_refused(every):
    with pytest.raises(ValueError, match=f"every must be .*got {every!r}"):
        Evaluation([1], every=every)
    with pytest.raises(ValueError, match=f"every must be .*got {every!r}"):
        Histograms(every=every)


class Stream:
    """Batches without a length, and without an end."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield {"image": torch.zeros(2, 3), "label": torch.zeros(2, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("handler", "name"),
    [
        (lambda folder: Evaluation(loader()), "Evaluation[val]"),
        (lambda folder: EarlyStopping(metric="train/loss"), "EarlyStopping[train/loss]"),
        (CheckpointManager, "CheckpointManager"),
        (lambda folder: Evaluation(loader(), every=2), None),
        (lambda folder: CheckpointManager(folder, every=2), None),
    ],
)
def test_a_handler_that_waits_for_an_epoch_is_reported_if_none_may_end(
    handler, name, tmp_path, caplog
):
    trainer = make_trainer().attach(handler(tmp_path))
    trainer.run(Stream(), max_iters=5)
    told = [record.getMessage() for record in caplog.records if "no epoch" in record.getMessage()]
    assert len(told) == (name is not None)
    assert all(f"wait for one: {name}.\nPass epoch_length= to run" in message for message in told)
    assert trainer.state.iteration == 5


@pytest.mark.parametrize("limits", [{"epoch_length": 3}, {}])
def test_an_epoch_whose_end_is_known_is_not_reported(limits, caplog):
    trainer = make_trainer().attach(Evaluation(loader()))
    trainer.run(Stream() if limits else loader(), max_iters=4, **limits)
    assert "no epoch may end" not in caplog.text


def test_a_call_before_the_first_batch_is_made_once_a_run_and_leaves_other_counts_alone():
    class Owner:
        key = "Owner"

        def act(self, trainer: Trainer) -> None:
            calls.append(("act", trainer.state.epoch, trainer.state.iteration))

    trainer, calls, owner = make_trainer(), [], Owner()
    trainer.add_event_handler(Events.GET_BATCH_STARTED, lambda: calls.append("batch"))
    call_before_first_batch(trainer, owner.act)
    batches = loader()
    trainer.run(batches, max_iters=2)
    trainer.run(batches, max_iters=3)
    assert calls == ["batch", ("act", 1, 0), "batch", "batch", ("act", 1, 2)]
    listeners = [one for one in trainer.listeners if one.event == Events.GET_BATCH_STARTED]
    assert [listener.calls for listener in listeners] == [3]
    (waits,) = [one for one in trainer.listeners if one.owner is owner]
    assert waits.name == "Owner.await_first_batch"
