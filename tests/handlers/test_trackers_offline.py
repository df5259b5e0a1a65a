"""The records of the tracking services in their offline modes; needs their packages."""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from diptych.handlers import read_records

# The packages that read the stores warn of each other; each run has its own process.
pytestmark = pytest.mark.filterwarnings("default")

ROOT = Path(__file__).resolve().parents[2]


class TrackedRun(NamedTuple):
    """A run at a service: (step, tag) to value, its settings, and whether it failed."""

    run: str
    points: dict[tuple[int, str], float]
    settings: dict[str, Any]
    all_settings: str
    failed: bool


def of_wandb(folder: Path) -> list[TrackedRun]:
    return [_wandb_run(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]


def _wandb_run(path: Path) -> TrackedRun:
    from wandb.proto import wandb_internal_pb2

    points, settings, failed = {}, {}, False
    for data in _wandb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
        step = items.pop("_step", 0)
        points |= {(step, tag): v for tag, v in items.items() if not tag.startswith("_")}
        settings |= {item.key: json.loads(item.value_json) for item in record.config.update}
        failed |= bool(record.exit.exit_code)
    name = path.stem.removeprefix("run-")
    return TrackedRun(name, points, settings, json.dumps(settings["settings"]), failed)


def _wandb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format, after a header of seven bytes."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last piece
            yield whole
            whole = b""


def of_mlflow(folder: Path) -> list[TrackedRun]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("pairs")
    tracked = []
    for run in client.search_runs([experiment.experiment_id], order_by=["start_time"]):
        points = {
            (point.step, tag.replace("_1", "@1")): point.value
            for tag in run.data.metrics
            for point in client.get_metric_history(run.info.run_id, tag)
        }
        artifact = next(folder.rglob(f"{run.info.run_id}/artifacts/settings.json")).read_text()
        failed = run.info.status == "FAILED"
        tracked.append(TrackedRun(run.info.run_id, points, run.data.params, artifact, failed))
    return tracked


def of_clearml(folder: Path) -> list[TrackedRun]:
    sessions = sorted(folder.rglob("offline-*.zip"), key=lambda path: path.stat().st_mtime)
    return [_clearml_session(path) for path in sessions]


def _clearml_session(path: Path) -> TrackedRun:
    with zipfile.ZipFile(path) as archive:
        lines = archive.read("metrics.jsonl").decode().splitlines()
        task = json.loads(archive.read("task.json"))
    points = {
        (event["iter"], f"{event['metric']}/{event['variant']}"): event["value"]
        for line in lines
        for event in json.loads(line)
    }
    settings = {name: p["value"] for name, p in task["hyperparams"]["settings"].items()}
    whole = task["configuration"]["settings"]["value"]
    return TrackedRun(path.stem, points, settings, whole, task.get("status") == "failed")


SERVICES = {"wandb": of_wandb, "mlflow": of_mlflow, "clearml": of_clearml}


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest) -> str:
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"needs the extra {request.param}")
    return request.param


def track(service: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.handlers.tracked", service, folder, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def logged(folder: Path) -> dict[tuple[int, str], float]:
    records = read_records(folder)
    return {(r.step, tag): value for r in records for tag, value in r.values.items()}


@pytest.mark.slow
def test_a_completed_run_has_every_value_and_its_settings(service, tmp_path):
    done = track(service, tmp_path)

    assert done.returncode == 0, done.stderr
    (tracked,) = SERVICES[service](tmp_path)
    assert tracked.points == pytest.approx(logged(tmp_path))
    assert (18, "val/recall@1") in tracked.points
    assert tracked.settings["trainer/precision"] == "fp32"
    assert float(tracked.settings["optimizer/lr"]) == 0.1
    assert "CrossEntropyLoss" in tracked.all_settings
    assert not tracked.failed


@pytest.mark.slow
def test_a_failed_run_is_closed_as_failed_and_completed_when_it_is_resumed(service, tmp_path):
    failed = track(service, tmp_path, "--stop")
    assert "out of luck" in failed.stderr
    (first,) = SERVICES[service](tmp_path)
    assert first.failed or service == "clearml"  # whose offline session knows no status
    done = track(service, tmp_path)

    assert done.returncode == 0, done.stderr
    tracked = SERVICES[service](tmp_path)
    points = {key: value for part in tracked for key, value in part.points.items()}
    assert points == pytest.approx(logged(tmp_path))
    assert len({part.run for part in tracked}) == (2 if service == "clearml" else 1)
    assert not tracked[-1].failed
