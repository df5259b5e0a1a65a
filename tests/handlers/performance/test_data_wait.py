"""The time spent waiting for data, on a host and on a simulated device."""

from __future__ import annotations

import pytest
import torch

from diptych.handlers.performance import data_wait
from diptych.handlers.performance.data_wait import DataWaitRule, DeviceWait, HostWait


class Device:
    """A device with a queue, and the host's clock beside it.

    Attributes:
        now: the host's time, in seconds.
        busy_until: when the device is done with what was queued so far.
    """

    def __init__(self) -> None:
        self.now = self.busy_until = 100.0

    def queue(self, seconds: float) -> None:
        self.busy_until = max(self.now, self.busy_until) + seconds


class Event:
    """A CUDA event as its documentation describes it."""

    def __init__(self, device: Device) -> None:
        self.device, self.time = device, 0.0

    def record(self, _: object) -> None:
        self.time = max(self.device.now, self.device.busy_until)

    def query(self) -> bool:
        return self.device.now >= self.time

    def elapsed_time(self, end: Event) -> float:
        assert end.query(), "read before the device has come to it"
        return 1000 * (end.time - self.time)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    return device


@pytest.fixture
def wait(device: Device) -> DeviceWait:
    return DeviceWait(torch.device("cuda"))


def fetch(device: Device, wait: DeviceWait, seconds: float) -> None:
    wait.start()
    device.now += seconds
    wait.stop()


def test_a_host_that_waits_while_the_device_computes_costs_nothing(device, wait):
    device.queue(5.0)
    fetch(device, wait, 3.0)
    device.now += 10.0
    assert wait.read() == 0.0


def test_what_the_device_waits_after_its_work_counts(device, wait):
    device.queue(1.0)
    fetch(device, wait, 3.0)
    assert wait.read() == 2.0


def test_a_device_without_work_waits_all_the_time(device, wait):
    for _ in range(3):
        fetch(device, wait, 3.0)
        device.queue(0.5)
        device.now += 1.0
    assert wait.read() == 9.0


def test_waits_that_the_device_has_not_come_to_are_read_later(device, wait):
    device.queue(5.0)
    fetch(device, wait, 1.0)
    fetch(device, wait, 9.0)
    assert wait.read() == 5.0
    device.queue(2.0)
    fetch(device, wait, 1.0)
    assert wait.read() == 5.0
    device.now += 1.0
    assert wait.read() == 5.0


def test_a_cleared_wait_begins_at_nothing(device, wait):
    fetch(device, wait, 3.0)
    wait.start()
    wait.clear()
    wait.stop()
    assert wait.read() == 0.0


def test_a_stop_without_a_start_is_no_wait(device, wait):
    wait.stop()
    assert wait.read() == 0.0


def test_on_the_host_every_wait_counts(monkeypatch):
    times = iter([1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr(data_wait, "perf_counter", lambda: next(times))
    wait = HostWait()
    for _ in range(2):
        wait.start()
        wait.stop()
    wait.stop()
    assert wait.read() == 2.5


def test_a_rule_fires_once_when_enough_log_points_in_a_row_say_so():
    rule = DataWaitRule(share=0.25, patience=2)
    fired = [rule.judge(step, waited, 20.0) for step, waited in enumerate([6, 5, 6, 6, 6])]
    assert [finding is not None for finding in fired] == [False, False, False, True, False]
    assert "30% of the time (12 of 40 s, 2 log points in a row)" in fired[3].evidence


def test_a_rule_is_silent_about_a_few_seconds():
    rule = DataWaitRule(share=0.25, patience=2)
    fired = [rule.judge(step, 4.0, 5.0) is not None for step in range(3)]
    assert fired == [False, False, True]
