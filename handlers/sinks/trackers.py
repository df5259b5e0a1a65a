"""Sinks for tracking services: W&B, MLflow and ClearML, through Ignite's loggers."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
from ignite.engine import Events

from diptych.engine.events import Outcome
from diptych.handlers.extras import check_extra
from diptych.handlers.sinks.hyperparameters import hyperparameters
from diptych.handlers.sinks.run_record import run_settings
from diptych.handlers.sinks.sink import Sink

if TYPE_CHECKING:
    from diptych.engine.metrics.metrics_collector import Record
    from diptych.engine.trainer import Trainer

# MLflow's limits: parameters in one request, and characters of a value.
PARAMETERS_AT_ONCE, PARAMETER_LENGTH = 100, 500


@attrs.define(eq=False)
class Tracker(Sink):
    """The base class of the three services' sinks: it opens, feeds and closes a run there.

    The run is opened when training starts. It gets the columns of TensorBoard's HParams, the
    content of `settings.json`, and every record under its tags. A training that resumes from a
    checkpoint continues the same run; records after the checkpoint are logged again, with the same
    values. A training that fails closes its run as failed.
    """

    project: str
    name: str | None = attrs.field(default=None, kw_only=True)
    options: Mapping[str, Any] = attrs.field(factory=dict, kw_only=True)
    _run: str = attrs.field(default="", init=False, repr=False)
    _logger: Any = attrs.field(default=None, init=False, repr=False)
    _is_described: bool = attrs.field(default=False, init=False, repr=False)

    leaves_traces = True
    package: ClassVar[str]

    def __attrs_post_init__(self) -> None:
        self._check_package()

    @property
    def role(self) -> str:
        """The project."""
        return self.project

    def state_dict(self) -> dict[str, str]:
        """Return the run's id at the service; "" before it has one."""
        return {"run": self._run}

    def load_state_dict(self, state_dict: Mapping[str, str]) -> None:
        """Load a state that `state_dict` returned, to continue its run."""
        self._run = state_dict["run"]

    def _check_package(self) -> None:
        check_extra(self.package, self.package, needed_by=type(self).__name__)

    def listen(self, trainer: Trainer) -> None:
        """Send each record; open the run when training starts."""
        super().listen(trainer)
        trainer.add_event_handler(Events.STARTED, self._open_run)

    def _open_run(self, trainer: Trainer) -> None:
        if self._logger is None:
            if trainer.state.iteration == 0:
                self._run = ""
            self._logger, self._run = self._open(self._run)
            self._is_described = False
        if not self._is_described:  # the service may fail between the two
            settings = run_settings(trainer)
            self._describe(hyperparameters(settings, trainer.handlers), settings)
            self._is_described = True

    def write_record(self, trainer: Trainer, record: Record) -> None:
        """Send the record; open the run first if it is closed."""
        self._open_run(trainer)
        self._send(dict(record.values), record.step)

    def close_destination(self, trainer: Trainer) -> None:
        """Close the run, as failed if the training failed."""
        if self._logger is not None:
            try:
                self._close_run(failed=trainer.outcome is Outcome.FAILED)
            finally:
                self._logger = None

    @abstractmethod
    def _open(self, run: str) -> tuple[Any, str]:
        """Open the run with an id, or a new run if the id is ""; return a logger and the id."""

    @abstractmethod
    def _describe(self, parameters: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Send the values by which runs are compared, and all settings."""

    @abstractmethod
    def _send(self, values: Mapping[str, float], step: int) -> None:
        """Send a record."""

    @abstractmethod
    def _close_run(self, *, failed: bool) -> None:
        """Close the run."""


@attrs.define(eq=False)
class WandB(Tracker):
    """Logs every record and the settings to Weights & Biases, through Ignite's `WandBLogger`.

    ```python
    trainer.attach(WandB("emoji", options={"mode": "offline"}))
    ```

    The config holds the columns of TensorBoard's HParams and, under `settings`, the content of
    `settings.json`; the summary holds the last value of every tag. A resumed training continues the
    run under its id; W&B drops the steps that it already has, whose values are the same. A training
    that fails ends its run with exit code 1.

    Event: `STARTED`, `MetricsEvents.LOGGED`, `RunEvents.ENDED`. Runs on rank 0 only.
    Cost: a second or two at the start and the end; about 100 microseconds at a log point, since
        W&B's own process sends the values.

    Args:
        project: the W&B project.
        name: of the run; None: W&B chooses one.
        options: further arguments of `wandb.init`.

    Raises:
        ImportError: if the extra `wandb` is not installed.
    """

    package = "wandb"

    def _open(self, run: str) -> tuple[Any, str]:
        from ignite.handlers.wandb_logger import WandBLogger  # noqa: PLC0415 - an extra

        resumed = {"id": run, "resume": "allow"} if run else {}
        logger = WandBLogger(project=self.project, name=self.name, **resumed, **self.options)
        return logger, logger.run.id

    def _describe(self, parameters: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        config = {**parameters, "settings": settings}
        self._logger.config.update(config, allow_val_change=True)

    def _send(self, values: Mapping[str, float], step: int) -> None:
        self._logger.log(values, step=step)

    def _close_run(self, *, failed: bool) -> None:
        self._logger.finish(exit_code=int(failed))


@attrs.define(eq=False)
class MLflow(Tracker):
    """Logs every record and the settings to MLflow, through Ignite's `MLflowLogger`.

    ```python
    trainer.attach(MLflow("emoji", tracking_uri="sqlite:///mlflow.db"))
    ```

    The parameters are the columns of TensorBoard's HParams; the artifact `settings.json` holds all
    settings. MLflow's names cannot contain @: `val/recall@1` becomes `val/recall_1`. A resumed
    training continues its MLflow run, whose parameters keep their first values; points that are
    logged again appear twice. A training that fails gives its run the status FAILED.

    Event: `STARTED`, `MetricsEvents.LOGGED`, `RunEvents.ENDED`. Runs on rank 0 only.
    Cost: a second or two for the import; one request to the store at a log point, which takes a few
        milliseconds if the store is a file.

    Args:
        project: the experiment; created if missing.
        name: of the run; None: MLflow chooses one.
        options: further arguments of `mlflow.start_run`.
        tracking_uri: of the store; None: MLflow's current setting.

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

    def _describe(self, parameters: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        known = self._logger.MlflowClient().get_run(self._run).data.params
        texts = {_mlflow_name(name): str(v)[:PARAMETER_LENGTH] for name, v in parameters.items()}
        new = [item for item in texts.items() if item[0] not in known]
        for start in range(0, len(new), PARAMETERS_AT_ONCE):
            self._logger.log_params(dict(new[start : start + PARAMETERS_AT_ONCE]))
        self._logger.log_dict(dict(settings), "settings.json")

    def _send(self, values: Mapping[str, float], step: int) -> None:
        named = {_mlflow_name(tag): value for tag, value in values.items()}
        self._logger.log_metrics(named, step=step)

    def _close_run(self, *, failed: bool) -> None:
        self._logger.end_run("FAILED" if failed else "FINISHED")


def _mlflow_name(tag: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", tag)


@attrs.define(eq=False)
class ClearML(Tracker):
    """Logs every record and the settings to ClearML, through Ignite's `ClearMLLogger`.

    ```python
    ClearMLLogger.set_bypass_mode(True)  # offline
    trainer.attach(ClearML("emoji", name="first try"))
    ```

    The hyperparameters are the columns of TensorBoard's HParams; the configuration object
    `settings` holds all settings. The title of a scalar is its tag without the last part. Values
    that are not finite are left out, because ClearML would show them as 0. A resumed training
    continues its task; offline, it starts a new session. A training that fails gives its task the
    status failed.

    Event: `STARTED`, `MetricsEvents.LOGGED`, `RunEvents.ENDED`. Runs on rank 0 only.
    Cost: a few seconds at the start and the end; a few milliseconds at a log point, since a thread
        sends the values.

    Args:
        project: the ClearML project.
        name: of the task; None: the script's name.
        options: further arguments of `Task.init`. By default ClearML does not capture torch's and
            TensorBoard's values, since it would get each value twice.

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
        task.set_initial_iteration(0)  # a continued task would add its last step to every step
        return logger, task.id

    def _describe(self, parameters: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        task = self._logger.get_task()
        task.connect(dict(parameters), name="settings")
        task.connect_configuration(dict(settings), name="settings")

    def _send(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            if math.isfinite(value):
                title, _, series = tag.rpartition("/")
                self._logger.report_scalar(title or series, series, value, step)

    def _close_run(self, *, failed: bool) -> None:
        if failed:
            self._logger.get_task().mark_failed(status_reason="the run raised an error")
        self._logger.close()
