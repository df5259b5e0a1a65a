"""A run that `max_iters` ends inside an epoch: its last weights are evaluated, ranked and saved."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from diptych.engine import EvaluationEvents, Trainer
from diptych.handlers import CheckpointManager, EarlyStopping, Evaluation
from tests.handlers.runs import loader, make_trainer


def weights(trainer: Trainer) -> list[Tensor]:
    """Return a copy of the model's parameters."""
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("iterations", [4, 8])
def test_the_last_weights_are_evaluated_judged_and_saved_in_any_order(tmp_path, order, iterations):
    trainer, evaluated = make_trainer(), {}
    manager = CheckpointManager(tmp_path, best="val/loss", mode="max")
    stopping = EarlyStopping(metric="val/loss", mode="max", patience=100)
    handlers = [Evaluation(loader()), manager, stopping]
    trainer.attach(*(handlers[place] for place in order))
    trainer.add_event_handler(
        EvaluationEvents.EVALUATED, lambda: evaluated.update({trainer.state.iteration: True})
    )
    trainer.run(loader(), max_iters=iterations)

    losses = trainer.metrics.get_history("val/loss")
    assert list(evaluated) == sorted({min(6, iterations), iterations})
    assert stopping.best == max(losses)
    assert losses[-1] == max(losses)  # else the assertion below proves nothing
    state = torch.load(manager.get_best_checkpoint(), weights_only=True)
    assert state["trainer"]["iteration"] == iterations
    assert state["saved"]["metrics"]["val/loss"] == losses[-1]


def test_a_run_that_is_continued_inside_the_cut_epoch_gets_the_weights_of_a_whole_one():
    whole, cut = make_trainer(), make_trainer()
    whole.run(loader(), max_iters=14)
    cut.attach(Evaluation(loader()))
    data = loader()
    for iterations in (4, 8, 14):
        cut.run(data, max_iters=iterations)

    assert len(cut.metrics.get_history("val/loss")) == 5  # at 4, 6, 8, 12 and 14
    assert all(map(torch.equal, weights(cut), weights(whole)))
    assert cut.metrics.get_history("train/loss") == whole.metrics.get_history("train/loss")


def test_a_run_of_another_process_continues_inside_the_cut_epoch(tmp_path):
    whole = make_trainer()
    whole.run(loader(), max_iters=14)
    for iterations in (4, 8, 14):
        trainer = make_trainer()
        trainer.attach(Evaluation(loader()), CheckpointManager(tmp_path, best="val/loss"))
        trainer.run(loader(), max_iters=iterations)

    assert all(map(torch.equal, weights(trainer), weights(whole)))
    assert trainer.metrics.get_history("train/loss") == whole.metrics.get_history("train/loss")
