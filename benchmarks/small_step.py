"""The cost of a trainer where the host is the limit: a small step, or none, beside a raw loop.

    OMP_NUM_THREADS=1 python benchmarks/small_step.py --peers /path/to/peers/bin/python

Two MLP towers of 2 and 8 layers, CLIP's loss, batches of 64 that are already on the device, AdamW.
All loops run in turn in one process with the same loss, until the turns are done or `--seconds` are
over; the figure is the median of their turns.
`--empty` leaves the step out: what remains is the cost of the engine. Diptych's step still fires
its four events and publishes five values, as the real one does. `--calls` counts the calls of
Python functions instead, which no other work on the machine changes.
Libraries that this interpreter lacks are measured with another one, beside a raw loop of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH, BATCH, LOG_EVERY = 64, 64, 50

WARM_UP = 20
"""Updates before the time is taken; the first turn of all loops is not counted."""

LIGHTNING = "lightning" if importlib.util.find_spec("lightning") else "pytorch_lightning"


class Batches:
    """One batch many times; takes the time from one request for a batch to a later one.

    What is due at the start and at the end of a run is no part of a step.

    Args:
        updates: requests between the two.
        calls: whether to count calls of Python functions instead.

    Attributes:
        cost: seconds of an update, or calls in millions, so that both are printed alike.
    """

    def __init__(self, updates: int, *, calls: bool = False) -> None:
        self._updates, self._counts = updates, calls
        self._batch = tuple(torch.randn(BATCH, WIDTH, device=DEVICE) for _ in range(2))
        self._calls = 0
        self.cost = 0.0

    def __len__(self) -> int:
        return WARM_UP + self._updates + 1

    def __iter__(self) -> Iterator[Any]:
        start = 0.0
        for number in range(len(self)):
            if number == WARM_UP:
                start = _now()
                sys.setprofile(self._count if self._counts else None)
            if number == WARM_UP + self._updates:
                sys.setprofile(None)
                spent = self._calls / 1e6 if self._counts else _now() - start
                self.cost = spent / self._updates
            yield self._batch

    def _count(self, _: object, event: str, __: object) -> None:
        self._calls += event == "call"


def _now() -> float:
    """Return the time of the process; with a GPU that of the clock, once the GPU is ready."""
    if DEVICE.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


Loop = Callable[[Batches], object]
"""Makes an update with each batch."""


class Towers(nn.Module):
    """Two MLP towers of 2 and 8 layers."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = _tower(2), _tower(8)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of both."""
        return self.image(image), self.text(text)


def _tower(layers: int) -> nn.Module:
    pairs = ((nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(layers))
    return nn.Sequential(*(part for pair in pairs for part in pair))


class PlainLoss(nn.Module):
    """CLIP's loss as most people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(2.66))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Return the loss."""
        image, text = nn.functional.normalize(image), nn.functional.normalize(text)
        logits = self.log_scale.exp() * image @ text.T
        labels = torch.arange(len(logits), device=logits.device)
        loss = nn.functional.cross_entropy
        return (loss(logits, labels) + loss(logits.T, labels)) / 2


class Parts:
    """A model, its loss and optimizer.

    Args:
        empty: whether the step does nothing.
    """

    def __init__(self, *, empty: bool) -> None:
        torch.manual_seed(0)
        self.empty, self.value = empty, torch.zeros((), device=DEVICE)
        self.model, self.loss = Towers().to(DEVICE), PlainLoss().to(DEVICE)
        weights = [*self.model.parameters(), *self.loss.parameters()]
        self.optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=DEVICE.type == "cuda" or None)

    def step(self, _: object, batch: Any) -> Tensor:
        """Make an update; return its loss."""
        if self.empty:
            return self.value
        self.optimizer.zero_grad(set_to_none=True)
        loss: Tensor = self.loss(*self.model(*batch))
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def raw(parts: Parts, _: Path) -> Loop:
    """Return a Python loop."""

    def run(batches: Batches) -> None:
        for batch in batches:
            parts.step(None, batch)

    return run


def raw_clipped(parts: Parts, _: Path) -> Loop:
    """Return a Python loop with a rate schedule, clipping, and an average of the weights."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    average = AveragedModel(parts.model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(parts.optimizer, 10**6)
    weights = [*parts.model.parameters(), *parts.loss.parameters()]

    def run(batches: Batches) -> None:
        for batch in batches:
            parts.optimizer.zero_grad(set_to_none=True)
            parts.loss(*parts.model(*batch)).backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            parts.optimizer.step()
            rate.step()
            average.update_parameters(parts.model)

    return run


def ignite_bare(parts: Parts, _: Path) -> Loop:
    """Return an Ignite engine without handlers."""
    from ignite.engine import Engine

    engine = Engine(parts.step)
    return lambda batches: engine.run(batches, max_epochs=1)


def ignite_usual(parts: Parts, folder: Path) -> Loop:
    """Return an Ignite engine with RunningAverage, ProgressBar and TensorboardLogger."""
    from ignite.engine import Engine, Events
    from ignite.handlers import ProgressBar, TensorboardLogger
    from ignite.metrics import RunningAverage

    engine = Engine(parts.step)
    RunningAverage(output_transform=lambda output: output).attach(engine, "loss")
    ProgressBar().attach(engine, ["loss"])
    TensorboardLogger(log_dir=str(folder)).attach_output_handler(
        engine, Events.ITERATION_COMPLETED(every=LOG_EVERY), tag="train", metric_names=["loss"]
    )
    return lambda batches: engine.run(batches, max_epochs=1)


def lightning_default(parts: Parts, folder: Path) -> Loop:
    """Return a Lightning trainer with default settings, which logs the loss."""
    lightning = importlib.import_module(LIGHTNING)

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss = parts.model, parts.loss
            self.automatic_optimization = not parts.empty

        def training_step(self, batch: Any) -> Tensor | None:
            loss = parts.value if parts.empty else self.loss(*self.model(*batch))
            self.log("train/loss", loss, prog_bar=True)
            return None if parts.empty else loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return parts.optimizer

    def run(batches: Batches) -> None:
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="gpu" if DEVICE.type == "cuda" else "cpu",
            devices=1,
            log_every_n_steps=LOG_EVERY,
            default_root_dir=folder,
        )
        trainer.fit(Module(), batches)

    return run


def features(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Return the features of both sides by name, a task."""
    return dict(zip(("image_features", "text_features"), model(*batch), strict=True))


def empty_step(parts: Parts) -> Callable[[Any, Any], Any]:
    """Return a step that fires its events, publishes five values, and does nothing else."""
    from diptych.engine import StepEvents, StepOutput

    events, values = [*StepEvents], dict.fromkeys(["train/loss", *"abcd"], parts.value)
    output = StepOutput(parts.value, {}, BATCH)

    def step(trainer: Any, _: object) -> Any:
        for event in events:
            trainer.fire_event(event)
        trainer.metrics.update_uncopied(values)
        return output

    return step


def _diptych(handlers: Callable[[Path], list[Any]]) -> Callable[[Parts, Path], Loop]:
    def build(parts: Parts, folder: Path) -> Loop:
        from diptych.engine import Trainer

        trainer = Trainer(
            parts.model,
            parts.loss,
            parts.optimizer,
            task=features,
            device=DEVICE,
            log_every=LOG_EVERY,
            step=empty_step(parts) if parts.empty else None,
        ).attach(*handlers(folder))
        return lambda batches: trainer.run(batches, max_epochs=trainer.state.epoch + 1)

    return build


def default(folder: Path) -> list[Any]:
    """Return the default handlers, which save at no iteration of this run."""
    from diptych.handlers import default_handlers

    return default_handlers(folder, every=10**9)


def unmeasured(folder: Path) -> list[Any]:
    """Return the default handlers without those that measure features and gradients."""
    from diptych.handlers import default_handlers

    return default_handlers(folder, every=10**9, health=False)


def with_optimization(folder: Path) -> list[Any]:
    """Return the default handlers, a rate, clipping, and an average of the weights."""
    from diptych.handlers import GradientClipping, LearningRate, WeightAverage

    own = [LearningRate(warmup=10, decay="cosine", total=10**6), GradientClipping(max_norm=1.0)]
    return [*own, WeightAverage(decay=0.999), *default(folder)]


LOOPS: dict[str, tuple[Callable[[Parts, Path], Loop], tuple[str, ...]]] = {
    "raw": (raw, ()),
    "raw, rate + clipping + average": (raw_clipped, ()),
    "Ignite bare": (ignite_bare, ("ignite",)),
    "Ignite usual": (ignite_usual, ("ignite", "tqdm", "tensorboard")),
    "Lightning default": (lightning_default, (LIGHTNING,)),
    "Diptych bare": (_diptych(lambda _: []), ("diptych",)),
    "Diptych default": (_diptych(default), ("diptych", "tensorboard")),
    "Diptych default, health=False": (_diptych(unmeasured), ("diptych", "tensorboard")),
    "Diptych default, rate + clipping + average": (_diptych(with_optimization), ("diptych",)),
}
"""Name to the function that builds a loop, and the packages that it needs."""

WITH_STEP = {name for name in LOOPS if "average" in name or "health" in name}
"""Loops of which nothing is left without a step."""


def measured(names: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Return the cost of an update of each loop that this interpreter can run."""
    able = [n for n in names if all(importlib.util.find_spec(p) for p in LOOPS[n][1])]
    with contextlib.ExitStack() as stack:
        stack.enter_context(silence())
        folders = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in able]
        loops = {
            name: LOOPS[name][0](Parts(empty=options.empty), folder)
            for name, folder in zip(able, folders, strict=True)
        }
        return in_turn(loops, options)


def in_turn(loops: dict[str, Loop], options: argparse.Namespace) -> dict[str, float]:
    """Run the loops in turn; return the median cost of an update of each."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    start = time.monotonic()
    for turn in range(options.turns + 1):
        for name, loop in loops.items():
            batches = Batches(options.updates, calls=options.calls)
            loop(batches)
            times[name].append(batches.cost)
        if turn and time.monotonic() - start > options.seconds * turn / (turn + 1):
            break  # the next turn would take too long
    return {name: statistics.median(values[1:]) for name, values in times.items()}


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Suppress the output of the loops; none of them then sees a terminal."""
    logging.disable(logging.WARNING)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def measured_by(python: str, names: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Return the cost of these loops, and of a raw one, measured with another interpreter."""
    sizes = ["--turns", str(options.turns), "--updates", str(options.updates)]
    sizes += ["--seconds", str(options.seconds)]
    sizes += [f"--{name}" for name in ("calls", "empty") if getattr(options, name)]
    command = [python, __file__, "--json", *sizes, "--only", "raw", *names]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    return dict(json.loads(output.stdout))


def parsed() -> argparse.Namespace:
    """Return the arguments of the command line; `only` has the names of the loops."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", help="an interpreter with pytorch-ignite, tqdm, lightning")
    parser.add_argument("--turns", type=int, default=10, help="turns of each loop")
    parser.add_argument("--updates", type=int, default=100, help="updates in a turn")
    parser.add_argument("--seconds", type=float, default=40, help="about the longest time")
    parser.add_argument("--calls", action="store_true", help="count Python calls, not the time")
    parser.add_argument("--empty", action="store_true", help="without a model's step")
    parser.add_argument("--only", nargs="+", choices=LOOPS, help="measure only these")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    left_out = WITH_STEP if options.empty else set()
    named = dict.fromkeys(["raw", *(options.only or LOOPS)])
    options.only = [name for name in named if name not in left_out]
    return options


def main() -> None:
    """Print the table."""
    options = parsed()
    names = options.only
    results = measured(names, options)
    if options.json:
        print(json.dumps(results))
        return
    ratios = {name: value / results["raw"] for name, value in results.items()}
    absent = [name for name in names if name not in results]
    if options.peers and absent:
        others = measured_by(options.peers, absent, options)
        results |= {name: others[name] for name in absent if name in others}
        ratios |= {name: others[name] / others["raw"] for name in absent if name in others}
    print_table(names, results, ratios, "Python calls" if options.calls else "us")


def print_table(
    names: list[str], results: dict[str, float], ratios: dict[str, float], unit: str
) -> None:
    """Print the results as a Markdown table."""
    print(f"on {torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'the CPU'}\n")
    print(f"| loop | {unit} per update | relative to raw |\n|---|---:|---:|")
    for name in names:
        if name in results:
            print(f"| {name} | {results[name] * 1e6:,.1f} | {ratios[name]:.3f} |")
        else:
            print(f"| {name} | not installed | |")


if __name__ == "__main__":
    main()
