"""An event that an engine does not fire is an error that names the one that was meant."""

from __future__ import annotations

import pytest
from ignite.engine import Events

from diptych.engine.loop.event_names import check_event
from tests.engine.models import trainer_of


@pytest.mark.parametrize(
    ("event", "meant"),
    [
        ("epoch_completed", "Events.EPOCH_COMPLETED"),
        ("EPOCH_ENDED", "Events.EPOCH_COMPLETED"),
        ("on_epoch_end", "Events.EPOCH_COMPLETED"),
        ("on_train_epoch_start", "Events.EPOCH_STARTED"),
        ("on_train_batch_end", "Events.ITERATION_COMPLETED"),
        ("on_step_end", "Events.ITERATION_COMPLETED"),
        ("on_batch_begin", "Events.ITERATION_STARTED"),
        ("on_fit_start", "Events.STARTED"),
        ("on_train_end", "Events.COMPLETED"),
        ("on_validation_end", "EvaluationEvents.EVALUATED"),
        ("on_evaluate", "EvaluationEvents.EVALUATED"),
        ("on_before_optimizer_step", "StepEvents.GRADIENTS_READY"),
        ("on_after_backward", "StepEvents.GRADIENTS_READY"),
        ("on_save_checkpoint", "RunEvents.SAVED"),
        ("LOSS_COMPUTE", "StepEvents.LOSS_COMPUTED"),
    ],
)
def test_the_nearest_event_is_named(event, meant):
    with pytest.raises(ValueError, match=f"Did you mean {meant}"):
        trainer_of().add_event_handler(event, print)


def test_a_name_that_resembles_none_leads_to_the_list():
    with pytest.raises(ValueError, match=r"got colour\. diptych\.engine\.events shows all"):
        trainer_of().add_event_handler("colour", print)


def test_the_name_of_an_event_is_that_event():
    calls = []
    trainer = trainer_of()
    trainer.add_event_handler("COMPLETED", lambda: calls.append("completed"))
    trainer.fire_event(Events.COMPLETED)
    assert calls == ["completed"]
    check_event(Events.EPOCH_COMPLETED(every=2), [Events.EPOCH_COMPLETED])
