"""The values that `Throughput` publishes, on a simulated clock."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Events
from torch import nn

from diptych.engine import Trainer, tasks
from diptych.handlers import Throughput
from tests.handlers.runs import EPOCH_LENGTH, Stop, kept_records, stop_at

WAIT, STEP, SIZE = 1.0, 3.0, 8


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("throughput", "data_wait"):
        monkeypatch.setattr(f"diptych.handlers.performance.{module}.perf_counter", clock)
    return clock


class SlowLoader:
    """Gives every batch after a second."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __len__(self) -> int:
        return EPOCH_LENGTH

    def __iter__(self) -> Iterator[int]:
        for index in range(EPOCH_LENGTH):
            self.clock.advance(WAIT)
            yield index


def make_trainer(clock: Clock, *, last_size: int = SIZE, seconds: float = STEP) -> Trainer:
    """Return a trainer whose steps take three seconds; an epoch's last may see fewer samples."""

    def step(trainer: Trainer, index: int) -> SimpleNamespace:
        clock.advance(seconds)
        trainer.metrics.update({"train/loss": 0.5})
        return SimpleNamespace(batch_size=last_size if index == EPOCH_LENGTH - 1 else SIZE)

    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model,
        nn.MSELoss(),
        optimizer,
        task=tasks.classification,
        device="cpu",
        log_every=4,
        step=step,
    )
    return trainer.attach(Throughput(patience=2))


def test_speed_is_samples_over_all_the_time_and_data_its_part_of_waiting(clock):
    trainer = make_trainer(clock)
    records = kept_records(trainer)

    trainer.run(SlowLoader(clock), max_epochs=1)

    assert [record.step for record in records] == [4, 6]
    for record in records:
        assert record.values["time/step"] == WAIT + STEP
        assert record.values["time/data"] == WAIT
        assert record.values["time/samples_per_second"] == SIZE / (WAIT + STEP)


def test_a_smaller_last_batch_counts_with_its_own_size(clock):
    trainer = make_trainer(clock, last_size=2)
    records = kept_records(trainer)

    trainer.run(SlowLoader(clock), max_epochs=2)

    speeds = {record.step: record.values["time/samples_per_second"] for record in records}
    assert speeds[6] == (SIZE + 2) / (2 * (WAIT + STEP))
    assert speeds[8] == SIZE / (WAIT + STEP)


def test_time_between_two_epochs_does_not_count(clock):
    trainer = make_trainer(clock)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: clock.advance(1000))
    records = kept_records(trainer)

    trainer.run(SlowLoader(clock), max_epochs=2)

    assert {record.values["time/step"] for record in records} == {WAIT + STEP}


def test_an_evaluation_does_not_reset_the_count(clock):
    trainer = make_trainer(clock)
    trainer.every(3, lambda t: t.metrics.report(t.state.iteration, {"val/loss": 0.1}))
    records = kept_records(trainer)

    trainer.run(SlowLoader(clock), max_epochs=1)

    (logged,) = [r for r in records if r.step == 4]
    assert logged.values["time/step"] == WAIT + STEP


def test_a_pause_between_two_runs_does_not_count(clock):
    trainer = make_trainer(clock)
    records = kept_records(trainer)
    stop_at(trainer, 2)
    data = SlowLoader(clock)
    with pytest.raises(Stop):
        trainer.run(data, max_epochs=1)
    clock.advance(1000)

    trainer.run(data, max_epochs=1)

    assert records[0].values["time/step"] < 2 * (WAIT + STEP)


def test_a_run_that_waits_for_its_loader_causes_one_warning(clock, caplog):
    trainer = make_trainer(clock)

    trainer.run(SlowLoader(clock), max_epochs=8)

    (finding,) = trainer.handlers[0].findings
    # Log points at 4, 6, 8, 12; the waits of ten iterations make ten seconds.
    assert (finding.rule, finding.step) == ("waiting for data", 12)
    assert "25% of the time" in finding.evidence
    assert caplog.messages == [str(finding)]
    assert trainer.findings == [finding]  # which TensorBoard shows


def test_a_loader_that_takes_a_fifth_of_the_time_is_tolerated(clock, caplog):
    trainer = make_trainer(clock, seconds=4 * WAIT)

    trainer.run(SlowLoader(clock), max_epochs=8)

    assert (trainer.handlers[0].findings, caplog.messages) == ([], [])


def test_another_run_of_the_trainer_is_judged_separately(clock):
    trainer = make_trainer(clock)
    for _ in range(2):
        trainer.state.max_epochs = None
        trainer.run(SlowLoader(clock), max_epochs=8)

    (finding,) = trainer.handlers[0].findings
    assert finding.step == 12


@pytest.mark.parametrize("argument", [{"tolerated_wait": 0.0}, {"patience": 0}])
def test_an_argument_out_of_range_is_refused(argument):
    with pytest.raises(ValueError, match=f"{next(iter(argument))} must be"):
        Throughput(**argument)


def test_the_speed_is_that_of_all_ranks(clock, monkeypatch):
    monkeypatch.setattr("diptych.handlers.performance.throughput.world_size", lambda: 3)
    trainer = make_trainer(clock)
    records = kept_records(trainer)

    trainer.run(SlowLoader(clock), max_epochs=1)

    assert records[0].values["time/samples_per_second"] == 3 * SIZE / (WAIT + STEP)


@pytest.mark.gpu
def test_memory_is_published_on_cuda_and_the_queued_work_is_waited_for():
    model = nn.Linear(4096, 4096).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output = SimpleNamespace(batch_size=1)

    def step(trainer: Trainer, batch: torch.Tensor) -> SimpleNamespace:
        value = batch
        for _ in range(50):
            value = torch.tanh(value @ batch)
        trainer.metrics.update({"train/loss": value.mean()})
        return output

    trainer = Trainer(
        model,
        nn.MSELoss(),
        optimizer,
        task=tasks.classification,
        device="cuda",
        log_every=5,
        step=step,
    ).attach(Throughput())
    records = kept_records(trainer)
    batch = torch.randn(4096, 4096, device="cuda")
    trainer.run([batch] * 5, max_epochs=2)  # the second epoch without the first one's warm-up
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(5):
        step(trainer, batch)
    end.record()
    end.synchronize()

    values = records[-1].values
    assert values["time/step"] == pytest.approx(start.elapsed_time(end) / 1000 / 5, rel=0.3)
    assert 0 < values["memory/allocated"] <= values["memory/reserved"]
