"""Trackers open, feed and close their run; another file tests the services, offline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import pytest

from diptych.handlers import CheckpointManager, ClearML, MLflow, WandB
from diptych.handlers.sinks.trackers import Tracker
from tests.handlers.runs import Stop, kept_records, loader, make_trainer, report_each_epoch, stop_at


@attrs.define(eq=False)
class Noted(Tracker):
    """Records the calls that a service would get."""

    package = "torch"
    calls: list[tuple[Any, ...]] = attrs.field(factory=list, kw_only=True)

    def _open(self, run: str) -> tuple[Any, str]:
        self.calls.append(("open", run))
        return object(), run or "new"

    def _describe(self, parameters: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.calls.append(("describe", parameters["trainer/precision"], settings["iteration"]))

    def _send(self, values: Mapping[str, float], step: int) -> None:
        self.calls.append(("write", step, dict(values)))

    def _close_run(self, *, failed: bool) -> None:
        self.calls.append(("close", failed))


def written(tracker: Noted) -> list[tuple[int, dict[str, float]]]:
    return [call[1:] for call in tracker.calls if call[0] == "write"]


def test_a_run_is_opened_gets_its_settings_and_every_record_and_is_closed():
    trainer, tracker = make_trainer(), Noted("pairs")
    records = kept_records(trainer)
    report_each_epoch(trainer, 0.5, 0.75)
    trainer.attach(tracker)

    trainer.run(loader(), max_epochs=2)

    assert tracker.calls[:2] == [("open", ""), ("describe", "fp32", 0)]
    assert written(tracker) == [(record.step, record.values) for record in records]
    assert any("val/recall@1" in values for _, values in written(tracker))
    assert tracker.calls[-1] == ("close", False)
    assert [call[0] for call in tracker.calls].count("close") == 1


def test_a_run_that_fails_is_closed_as_failed():
    trainer, tracker = make_trainer(), Noted("pairs")
    trainer.attach(tracker)
    stop_at(trainer, 5)

    with pytest.raises(Stop):
        trainer.run(loader(), max_epochs=2)

    assert tracker.calls[-1] == ("close", True)


def test_a_resumed_training_continues_the_run_of_its_checkpoint(tmp_path: Path):
    first = make_trainer().attach(Noted("pairs"), CheckpointManager(tmp_path, every=4))
    stop_at(first, 9)
    with pytest.raises(Stop):
        first.run(loader(), max_epochs=2)
    tracker = Noted("pairs")

    make_trainer().attach(tracker, CheckpointManager(tmp_path)).run(loader(), max_epochs=2)

    assert tracker.calls[:2] == [("open", "new"), ("describe", "fp32", 8)]
    assert [step for step, _ in written(tracker)] == [12]


def test_a_training_that_starts_over_opens_a_new_run():
    tracker = Noted("pairs")
    for _ in range(2):
        make_trainer().attach(tracker).run(loader(), max_epochs=1)

    assert [call for call in tracker.calls if call[0] == "open"] == [("open", ""), ("open", "")]


def test_a_record_after_the_end_still_arrives_and_the_run_is_closed_again():
    trainer, tracker = make_trainer(), Noted("pairs")
    trainer.attach(tracker).run(loader(), max_epochs=1)

    trainer.metrics.report(trainer.state.iteration, {"test/accuracy": 0.5})

    assert [call[0] for call in tracker.calls[-4:]] == ["open", "describe", "write", "close"]
    assert tracker.calls[-4] == ("open", "new")


@pytest.mark.parametrize("service", [WandB, MLflow, ClearML])
def test_without_the_services_package_the_extra_is_named(service, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)

    with pytest.raises(ImportError, match=rf"{service.__name__} .*diptych\[{service.package}\]"):
        service("pairs")


def test_mlflow_gets_valid_names_and_parameters_in_small_requests(monkeypatch):
    sent: list[Any] = []
    mlflow = MLflow.__new__(MLflow)
    mlflow._run, mlflow._logger = "a", ModuleType("mlflow")
    run = type("Run", (), {"data": type("Data", (), {"params": {"trainer/seed": "1"}})})
    client = type("Client", (), {"get_run": lambda self, name: run})
    mlflow._logger.MlflowClient = client
    mlflow._logger.log_params = sent.append
    mlflow._logger.log_dict = lambda settings, name: sent.append(name)
    mlflow._logger.log_metrics = lambda values, step: sent.append((step, values))

    parameters = {"trainer/seed": 2, **{f"h@{i}": "x" * 900 for i in range(130)}}
    mlflow._describe(parameters, {})
    mlflow._send({"val/recall@1": 0.5}, 4)

    assert [len(portion) for portion in sent[:2]] == [100, 30]
    assert sent[0]["h_0"] == "x" * 500
    assert "trainer/seed" not in sent[0]  # it was given before, and MLflow keeps that
    assert sent[2:] == ["settings.json", (4, {"val/recall_1": 0.5})]


def test_clearml_gets_finite_values_only():
    sent: list[Any] = []
    clearml = ClearML.__new__(ClearML)
    clearml._logger = ModuleType("clearml")
    clearml._logger.report_scalar = lambda *place: sent.append(place)

    clearml._send({"val/a/b": 0.5, "loss": 1.0, "train/loss": float("nan")}, 4)

    assert sent == [("val/a", "b", 0.5, 4), ("loss", "loss", 1.0, 4)]


@attrs.define(eq=False)
class Unreliable(Tracker):
    """A tracker whose service is out of reach for its first calls of a kind."""

    package = "torch"
    failing: str = attrs.field(kw_only=True)
    failures: int = attrs.field(default=3, kw_only=True)
    seen: list[Any] = attrs.field(factory=list, init=False)

    def _reach(self, call: str, what: object) -> None:
        if call == self.failing and self.failures:
            self.failures -= 1
            raise RuntimeError(f"{call}: the service is out of reach")
        self.seen.append((call, what))

    def _open(self, run: str) -> tuple[Any, str]:
        self._reach("open", run)
        return self, run or "new"

    def _describe(self, parameters: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self._reach("describe", settings["trainer"]["seed"])

    def _send(self, values: Mapping[str, float], step: int) -> None:
        self._reach("send", step)

    def _close_run(self, *, failed: bool) -> None:
        self._reach("close", failed)


@pytest.mark.parametrize("failing", ["open", "describe", "send", "close"])
def test_a_service_that_is_out_of_reach_for_a_while_gets_everything_once(failing, caplog):
    trainer = make_trainer(log_every=1).attach(service := Unreliable("pairs", failing=failing))

    trainer.run(loader(), max_epochs=2)

    calls = [call for call in service.seen if call[0] != "send"]
    expected = [("open", ""), ("describe", 5), ("close", False)]
    assert calls == (expected[:2] if failing == "close" else expected)
    assert sorted(step for call, step in service.seen if call == "send") == list(range(1, 13))
    assert service.unwritten == {}
    assert "the service is out of reach" in caplog.text
