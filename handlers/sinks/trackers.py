"""The run's values at a service that keeps many runs: W&B, MLflow, ClearML, by Ignite's loggers."""

from __future__ import annotations

import importlib.util
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
from ignite.engine import Events

from diptych.engine.distributed.collectives import rank
from diptych.engine.events import MetricsEvents, RunEvents
from diptych.handlers.sinks.hyperparameters import Value, hyperparameters
from diptych.handlers.sinks.run_directory import run_settings

if TYPE_CHECKING:
    from diptych.engine.trainer import Trainer

PARAMETERS_AT_ONCE, PARAMETER_LENGTH = 100, 500  # what MLflow takes


@attrs.define(eq=False)
class Tracker(ABC):
    """What the handlers of the three services share: when a run is opened, fed and closed.

    The run at the service is opened when training starts, on rank 0 alone. It gets the columns of
    TensorBoard's HParams, the whole of `settings.json`, and every record under its tags. A run that
    is resumed from a checkpoint goes on in the same run at the service; what was logged after the
    checkpoint comes again, with the same values. A run that fails is closed as failed.
    """

    project: str
    name: str | None = attrs.field(default=None, kw_only=True)
    options: Mapping[str, Any] = attrs.field(factory=dict, kw_only=True)
    _run: str = attrs.field(default="", init=False, repr=False)
    _logger: Any = attrs.field(default=None, init=False, repr=False)
    _running: bool = attrs.field(default=False, init=False, repr=False)
    _failed: bool = attrs.field(default=False, init=False, repr=False)

    package: ClassVar[str]

    def __attrs_post_init__(self) -> None:
        self._check_package()

    def attach(self, trainer: Trainer) -> None:
        """Give the trainer's records to the service."""
        if rank() == 0:
            trainer.add_event_handler(Events.STARTED, self._start)
            trainer.add_event_handler(MetricsEvents.LOGGED, self._log)
            trainer.add_event_handler(Events.EXCEPTION_RAISED, self._fail)
            trainer.add_event_handler(RunEvents.RELEASE, self._end)

    def state_dict(self) -> dict[str, str]:
        """Return the run's name at the service, "" before there is one."""
        return {"run": self._run}

    def load_state_dict(self, state_dict: Mapping[str, str]) -> None:
        """Go on in the run of a state that `state_dict` returned."""
        self._run = state_dict["run"]

    def _check_package(self) -> None:
        if importlib.util.find_spec(self.package) is None:
            raise ImportError(
                f"{type(self).__name__} needs the package {self.package}: pip install "
                f"'diptych[{self.package}]'"
            )

    def _start(self, trainer: Trainer) -> None:
        self._running, self._failed = True, False
        self._open_for(trainer)

    def _open_for(self, trainer: Trainer) -> None:
        if self._logger is not None:
            return
        if trainer.state.iteration == 0:
            self._run = ""
        self._logger, self._run = self._open(self._run)
        settings = run_settings(trainer)
        self._describe(hyperparameters(settings), settings)

    def _log(self, trainer: Trainer) -> None:
        record = trainer.metrics.record
        if record.values:
            self._open_for(trainer)  # an evaluation may come before the start, or after the end
            self._write(dict(record.values), record.step)
            if trainer.state.iteration and not self._running:
                self._end(trainer)

    def _fail(self, *_: object) -> None:
        self._failed = True

    def _end(self, _: Trainer) -> None:
        self._running = False
        if self._logger is not None:
            self._close(failed=self._failed)
            self._logger = None

    @abstractmethod
    def _open(self, run: str) -> tuple[Any, str]:
        """Open a run, the one of this name where there is one; return a logger and its name."""

    @abstractmethod
    def _describe(self, parameters: Mapping[str, Value], settings: Mapping[str, Any]) -> None:
        """Hand over what runs are compared by, and all settings."""

    @abstractmethod
    def _write(self, values: Mapping[str, float], step: int) -> None:
        """Hand over a record."""

    @abstractmethod
    def _close(self, *, failed: bool) -> None:
        """Close the run."""


@attrs.define(eq=False)
class WandB(Tracker):
    """Gives every record and the settings to Weights & Biases, by Ignite's `WandBLogger`.

    ```python
    trainer.attach(WandB("emoji", options={"mode": "offline"}))
    ```

    The config holds the columns of TensorBoard's HParams and, as `settings`, all that
    `settings.json` holds; the summary the last value of every tag. A resumed run goes on under its
    id; W&B drops the steps that it has already, whose values are the same. A run that fails ends
    with exit code 1.

    Event: `STARTED`, `MetricsEvents.LOGGED`, `EXCEPTION_RAISED`, `RELEASE`. Rank 0 alone.
    Cost: a second or two at the start and the end; at a log point some 100 microseconds, W&B's own
        process sends it.

    Args:
        project: of W&B.
        name: of the run; None: W&B makes one up.
        options: more arguments of `wandb.init`.

    Raises:
        ImportError: if the extra `wandb` is not installed.
    """

    package = "wandb"

    def _open(self, run: str) -> tuple[Any, str]:
        from ignite.handlers.wandb_logger import WandBLogger  # noqa: PLC0415 - an extra

        resumed = {"id": run, "resume": "allow"} if run else {}
        logger = WandBLogger(project=self.project, name=self.name, **resumed, **self.options)
        return logger, logger.run.id

    def _describe(self, parameters: Mapping[str, Value], settings: Mapping[str, Any]) -> None:
        config = {**parameters, "settings": settings}
        self._logger.config.update(config, allow_val_change=True)

    def _write(self, values: Mapping[str, float], step: int) -> None:
        self._logger.log(values, step=step)

    def _close(self, *, failed: bool) -> None:
        self._logger.finish(exit_code=int(failed))


@attrs.define(eq=False)
class MLflow(Tracker):
    """Gives every record and the settings to MLflow, by Ignite's `MLflowLogger`.

    ```python
    trainer.attach(MLflow("emoji", tracking_uri="sqlite:///mlflow.db"))
    ```

    The parameters are the columns of TensorBoard's HParams, the artifact `settings.json` holds all.
    MLflow's names have no @: `val/recall@1` is `val/recall_1` there. A resumed run goes on in its
    MLflow run, whose parameters stay as they were first; points that come again are there twice.
    A run that fails has the status FAILED.

    Event: `STARTED`, `MetricsEvents.LOGGED`, `EXCEPTION_RAISED`, `RELEASE`. Rank 0 alone.
    Cost: a second or two for the import; at a log point one request to the store, which takes some
        milliseconds where that is a file.

    Args:
        project: the experiment; made if it is not there.
        name: of the run; None: MLflow makes one up.
        options: more arguments of `mlflow.start_run`.
        tracking_uri: of the store; None: what MLflow is set to.

    Raises:
        ImportError: if the extra `mlflow` is not installed.
    """

    package = "mlflow"
    tracking_uri: str | None = attrs.field(default=None, kw_only=True)

    def _open(self, run: str) -> tuple[Any, str]:
        import mlflow  # noqa: PLC0415 - an extra
        from ignite.handlers.mlflow_logger import MLflowLogger  # noqa: PLC0415

        if self.tracking_uri is not None:
            mlflow.set_tracking_uri(self.tracking_uri)
        mlflow.set_experiment(self.project)
        mlflow.start_run(run_id=run or None, run_name=self.name, **self.options)
        logger = MLflowLogger()
        return logger, logger.active_run.info.run_id

    def _describe(self, parameters: Mapping[str, Value], settings: Mapping[str, Any]) -> None:
        there = self._logger.MlflowClient().get_run(self._run).data.params
        texts = {_mlflow_name(name): str(v)[:PARAMETER_LENGTH] for name, v in parameters.items()}
        new = [item for item in texts.items() if item[0] not in there]
        for start in range(0, len(new), PARAMETERS_AT_ONCE):
            self._logger.log_params(dict(new[start : start + PARAMETERS_AT_ONCE]))
        self._logger.log_dict(dict(settings), "settings.json")

    def _write(self, values: Mapping[str, float], step: int) -> None:
        named = {_mlflow_name(tag): value for tag, value in values.items()}
        self._logger.log_metrics(named, step=step)

    def _close(self, *, failed: bool) -> None:
        self._logger.end_run("FAILED" if failed else "FINISHED")


def _mlflow_name(tag: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", tag)


@attrs.define(eq=False)
class ClearML(Tracker):
    """Gives every record and the settings to ClearML, by Ignite's `ClearMLLogger`.

    ```python
    ClearMLLogger.set_bypass_mode(True)  # offline
    trainer.attach(ClearML("emoji", name="first try"))
    ```

    The hyperparameters are the columns of TensorBoard's HParams, the configuration object
    `settings` holds all. Scalars are titled by their tag up to its last part. Values that are not
    finite are left out: ClearML would show them as 0. A resumed run goes on in its task, an offline
    one in a new session. A run that fails has the status failed.

    Event: `STARTED`, `MetricsEvents.LOGGED`, `EXCEPTION_RAISED`, `RELEASE`. Rank 0 alone.
    Cost: some seconds at the start and the end; at a log point some milliseconds, a thread sends
        it.

    Args:
        project: of ClearML.
        name: of the task; None: ClearML takes the script's.
        options: more arguments of `Task.init`. Without them ClearML does not listen to torch and
            TensorBoard, since it would get every value twice.

    Raises:
        ImportError: if the extra `clearml` is not installed.
    """

    package = "clearml"

    def _open(self, run: str) -> tuple[Any, str]:
        from ignite.handlers.clearml_logger import ClearMLLogger  # noqa: PLC0415 - an extra

        known = run and not run.startswith("offline")
        options = {"auto_connect_frameworks": False, "continue_last_task": run if known else False}
        logger = ClearMLLogger(
            project_name=self.project, task_name=self.name, **{**options, **self.options}
        )
        task = logger.get_task()
        task.set_initial_iteration(0)  # a task that goes on would count from its last step
        return logger, task.id

    def _describe(self, parameters: Mapping[str, Value], settings: Mapping[str, Any]) -> None:
        task = self._logger.get_task()
        task.connect(dict(parameters), name="settings")
        task.connect_configuration(dict(settings), name="settings")

    def _write(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            if math.isfinite(value):
                title, _, series = tag.rpartition("/")
                self._logger.report_scalar(title or series, series, value, step)

    def _close(self, *, failed: bool) -> None:
        if failed:
            self._logger.get_task().mark_failed(status_reason="the run raised an error")
        self._logger.close()
