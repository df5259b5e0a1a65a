"""`ToLogger` passes every record to a function, and closes the logger at the end of a run."""

from __future__ import annotations

import pytest

from diptych.handlers import ToLogger
from tests.handlers.runs import Stop, kept_records, loader, make_trainer, report_each_epoch, stop_at


class Logger:
    """Imitates an Ignite logger."""

    def __init__(self) -> None:
        self.written: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        assert not self.closed
        self.written.append((step, values))

    def close(self) -> None:
        self.closed += 1


def test_every_record_arrives_with_its_step_and_the_logger_is_closed_last():
    logger, trainer = Logger(), make_trainer()
    records = kept_records(trainer)
    report_each_epoch(trainer, 0.5, 0.75)
    trainer.attach(ToLogger(logger.log_metrics, close=logger.close))

    trainer.run(loader(), max_epochs=2)

    assert logger.written == [(record.step, record.values) for record in records]
    assert any("val/recall@1" in values for _, values in logger.written)
    assert logger.closed == 1


def test_a_run_that_fails_closes_the_logger():
    logger, trainer = Logger(), make_trainer()
    trainer.attach(ToLogger(logger.log_metrics, close=logger.close))
    stop_at(trainer, 5)

    with pytest.raises(Stop):
        trainer.run(loader(), max_epochs=2)

    assert logger.closed == 1


def test_a_logger_gets_a_copy_of_the_values():
    trainer = make_trainer().attach(ToLogger(lambda values, _: values.clear()))

    trainer.run(loader(), max_epochs=1)

    assert trainer.metrics.record.values


@pytest.mark.parametrize("wrong", [{"write": "log"}, {"write": print, "close": 1}])
def test_an_argument_that_is_not_callable_is_refused(wrong):
    with pytest.raises(TypeError, match="callable"):
        ToLogger(**wrong)
