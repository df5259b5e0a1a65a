"""The overhead of an engine: process CPU time of an iteration whose step does nothing.

Every engine runs a step without a model over the same list. Diptych's step fires the four step
events and publishes five scalars, as the real step does. Libraries that this interpreter lacks are
measured with another one:

    python benchmarks/engine_overhead.py --peers /path/to/peers/bin/python
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import os
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ITERATIONS = 10_000
LOG_EVERY = 50
REPETITIONS = 5

Contender = Callable[[list[int], Path], Callable[[], object]]
"""Takes the data of an epoch and a folder; returns a function that runs one epoch."""


def raw_loop(data: list[int], _: Path) -> Callable[[], object]:
    """Return a Python loop that calls a function."""

    def step(batch: int) -> int:
        return batch

    def run() -> None:
        for batch in data:
            step(batch)

    return run


def ignite_bare(data: list[int], _: Path) -> Callable[[], object]:
    """Return an Ignite engine without handlers."""
    from ignite.engine import Engine

    engine = Engine(lambda _, batch: batch)
    return lambda: engine.run(data, max_epochs=1)


def ignite_usual(data: list[int], folder: Path) -> Callable[[], object]:
    """Return an Ignite engine with RunningAverage, ProgressBar and TensorboardLogger."""
    import torch
    from ignite.engine import Engine, Events
    from ignite.handlers import ProgressBar, TensorboardLogger
    from ignite.metrics import RunningAverage

    loss = torch.zeros(())
    engine = Engine(lambda _, __: loss)
    RunningAverage(output_transform=lambda output: output).attach(engine, "loss")
    ProgressBar().attach(engine, ["loss"])
    logger = TensorboardLogger(log_dir=str(folder))
    logger.attach_output_handler(
        engine, Events.ITERATION_COMPLETED(every=LOG_EVERY), tag="train", metric_names=["loss"]
    )

    def run() -> None:
        engine.run(data, max_epochs=1)
        logger.close()

    return run


def lightning_module() -> Any:
    """Return a module whose training step logs a value and does nothing else."""
    import torch
    from lightning import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.value = torch.zeros(())

        def training_step(self, *_: object) -> None:
            if self.trainer.loggers:
                self.log("train/loss", self.value, prog_bar=True)

        def configure_optimizers(self) -> None:
            return None

    return Module()


def lightning_bare(data: list[int], folder: Path) -> Callable[[], object]:
    """Return a Lightning trainer with logger, progress bar, checkpoints and summary turned off."""
    from lightning import Trainer

    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    return lambda: trainer.fit(lightning_module(), data)


def lightning_default(data: list[int], folder: Path) -> Callable[[], object]:
    """Return a Lightning trainer with default settings and TensorBoard, which logs one value."""
    from lightning import Trainer

    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        log_every_n_steps=LOG_EVERY,
        default_root_dir=folder,
    )
    return lambda: trainer.fit(lightning_module(), data)


def diptych_trainer() -> Any:
    """Return a trainer whose step only fires the step events and publishes five scalars."""
    import torch

    from diptych.engine import StepEvents, StepOutput, Trainer, tasks

    scalars = {f"train/{name}": torch.zeros(()) for name in ("loss", "a", "b", "c", "d")}
    output = StepOutput(scalars["train/loss"], {}, 1)

    def step(trainer: Trainer, _: int) -> StepOutput:
        trainer.fire_event(StepEvents.FORWARD_COMPLETED)
        trainer.fire_event(StepEvents.LOSS_COMPUTED)
        trainer.fire_event(StepEvents.GRADIENTS_READY)
        trainer.fire_event(StepEvents.OPTIMIZER_STEPPED)
        trainer.metrics.update_uncopied(scalars)
        return output

    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(
        model,
        torch.nn.MSELoss(),
        optimizer,
        task=tasks.classification,
        device="cpu",
        log_every=LOG_EVERY,
        step=step,
    )


def diptych_bare(data: list[int], _: Path) -> Callable[[], object]:
    """Return a Diptych trainer without handlers; it still collects the published scalars."""
    trainer = diptych_trainer()
    return lambda: trainer.run(data, max_epochs=1)


def diptych_default(data: list[int], folder: Path) -> Callable[[], object]:
    """Return a Diptych trainer with `default_handlers`: every sink, throughput and checkpoints."""
    from diptych.handlers import default_handlers

    trainer = diptych_trainer()
    trainer.attach(*default_handlers(folder))
    return lambda: trainer.run(data, max_epochs=1)


CONTENDERS: dict[str, tuple[Contender, tuple[str, ...]]] = {
    "raw loop": (raw_loop, ()),
    "Ignite bare": (ignite_bare, ("ignite",)),
    "Ignite usual": (ignite_usual, ("ignite", "tqdm", "tensorboard")),
    "Lightning bare": (lightning_bare, ("lightning",)),
    "Lightning default": (lightning_default, ("lightning", "tensorboard")),
    "Diptych bare": (diptych_bare, ("diptych",)),
    "Diptych default": (diptych_default, ("diptych", "tensorboard")),
}
"""Name to the function that builds the engine, and the packages that it needs."""


def cost(contender: Contender, repetitions: int) -> float:
    """Return the process CPU time per iteration in microseconds, the minimum of a few runs."""
    data = [0] * ITERATIONS
    times = []
    for _ in range(repetitions + 1):
        with tempfile.TemporaryDirectory() as folder, silence():
            run = contender(data, Path(folder))
            start = time.process_time()
            run()
            times.append((time.process_time() - start) / ITERATIONS * 1e6)
    return min(times[1:])  # the first run includes imports


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Suppress the engines' output; none of them then sees a terminal."""
    logging.disable(logging.WARNING)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def measured(names: list[str], repetitions: int) -> dict[str, float]:
    """Return the cost of each of these engines that this interpreter can run."""
    results = {}
    for name in names:
        contender, packages = CONTENDERS[name]
        if all(importlib.util.find_spec(package) for package in packages):
            results[name] = cost(contender, repetitions)
    return results


def measured_by(python: str, names: list[str], repetitions: int) -> dict[str, float]:
    """Return the cost of these engines, measured with another interpreter."""
    command = [python, __file__, "--json", "--repetitions", str(repetitions), "--only", *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return dict(json.loads(output.stdout))


def table(names: list[str], results: dict[str, float]) -> str:
    """Return the results as a Markdown table."""
    bare = results.get("Ignite bare")
    lines = ["| engine | us per iteration | relative to Ignite bare |", "|---|---:|---:|"]
    for name in names:
        if name not in results:
            lines.append(f"| {name} | not installed | |")
            continue
        ratio = f"{results[name] / bare:.2f}" if bare else ""
        lines.append(f"| {name} | {results[name]:.1f} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", help="an interpreter with pytorch-ignite, tqdm, lightning")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="runs per engine")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="measure only these")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    names = arguments.only or list(CONTENDERS)
    results = measured(names, arguments.repetitions)
    if arguments.json:
        print(json.dumps(results))
        return
    absent = [name for name in names if name not in results]
    if arguments.peers and absent:
        results |= measured_by(arguments.peers, absent, arguments.repetitions)
    print(table(names, results))


if __name__ == "__main__":
    main()
