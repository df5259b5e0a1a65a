"""A cadence is "epoch" or a number of iterations, and nothing else."""

from __future__ import annotations

import pytest

from diptych.handlers import Evaluation, Histograms
from diptych.handlers.cadence import call_every
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
