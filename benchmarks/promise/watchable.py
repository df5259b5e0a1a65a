"""The training to observe, in several libraries, with and without validation and logging."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from benchmarks.promise.setting import (
    Sample,
    Towers,
    UsualCLIPLoss,
    contrast,
    samples,
    stacked,
)

UPDATES, BATCH, RATE = 50, 8, 0.05
VALIDATION_EVERY, LOG_EVERY = 10, 50

READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"}
"""The methods of a tensor that wait for its device."""


class Reads(TorchFunctionMode):
    """Counts how often the host reads a tensor's value while `counting`."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.counting = 0, False

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count the call, and make it."""
        self.count += self.counting and getattr(function, "__name__", "") in READS
        return function(*args, **kwargs or {})


@dataclass
class Run:
    """A run to observe.

    Attributes:
        folder: the folder of the logs.
        validation: whether to evaluate at every 10th update.
        logs: whether to attach a progress bar and TensorBoard, logging every 50 updates.
        generators: whether each loader has its own generator, as torch's notes on reproducibility
            advise.
    """

    folder: Path
    validation: bool = False
    logs: bool = False
    generators: bool = False
    reads: Reads = field(default_factory=Reads)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model, self.loss = Towers(dropout=0.1), UsualCLIPLoss()
        self.data, self.held_out = samples(UPDATES * BATCH), samples(4 * BATCH, seed=1)
        self._updates = 0
        self.model.register_forward_pre_hook(self._count)

    def _count(self, model: nn.Module, _: Any) -> None:
        """Count reads from the second to the second-to-last update: between two log points."""
        if model.training:
            self._updates += 1
            self.reads.counting = 1 < self._updates < UPDATES

    @property
    def reads_an_update(self) -> float:
        """How often the host has read a value, per update, between two log points."""
        return self.reads.count / (UPDATES - 2)

    def sgd(self) -> torch.optim.Optimizer:
        """Return an optimizer without state, so that it reads no tensor."""
        return torch.optim.SGD([*self.model.parameters(), *self.loss.parameters()], lr=RATE)

    def loaders(self) -> tuple[DataLoader[Sample], DataLoader[Sample]]:
        """Return torch's loaders: shuffled for training, in order for validation."""
        own = [torch.Generator().manual_seed(0) if self.generators else None for _ in "ab"]
        return (
            DataLoader(self.data, BATCH, shuffle=True, generator=own[0]),  # type: ignore[arg-type]
            DataLoader(self.held_out, BATCH, generator=own[1]),  # type: ignore[arg-type]
        )


def lightning(run: Run) -> None:
    """Train with Lightning: `val_check_interval`; `self.log` with its default logger and bar."""
    from lightning import seed_everything

    from benchmarks.promise.lightning_module import Module, fit

    seed_everything(0, workers=True)
    module = Module((run.model, run.loss), contrast, run.sgd(), logs=run.logs)
    train, held_out = run.loaders()
    settings: dict[str, Any] = {"default_root_dir": run.folder}
    if run.validation:
        settings |= {"val_check_interval": VALIDATION_EVERY}
    if run.logs:
        shown = {"logger": True, "enable_progress_bar": True, "log_every_n_steps": LOG_EVERY}
        settings |= shown
    fit(module, train, val_loader=held_out if run.validation else None, **settings)


def transformers(run: Run) -> None:
    """Train with transformers' Trainer: `eval_steps`; `logging_steps` with TensorBoard."""
    from transformers import Trainer, TrainingArguments

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss = run.model, run.loss

        def forward(
            self, image: Tensor, text: Tensor, *, return_loss: bool = True
        ) -> dict[str, Tensor]:
            assert return_loss  # the Trainer looks for this argument to detect a loss
            batch = {"image": image, "text": text}
            return {"loss": contrast(self.model, self.loss, batch)}

    def pairs(chosen: list[Sample]) -> Sample:
        return {key: value for key, value in stacked(chosen).items() if key != "label"}

    arguments = TrainingArguments(
        str(run.folder),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        optim="sgd",
        learning_rate=RATE,
        eval_strategy="steps" if run.validation else "no",
        eval_steps=VALIDATION_EVERY,
        logging_strategy="steps" if run.logs else "no",
        logging_steps=LOG_EVERY,
        report_to="tensorboard" if run.logs else "none",
        disable_tqdm=not run.logs,
        save_strategy="no",
        remove_unused_columns=False,
        use_cpu=True,
        seed=0,
    )
    data = {"train_dataset": run.data, "eval_dataset": run.held_out}
    Trainer(Whole(), arguments, data_collator=pairs, **data).train()


def ignite(run: Run) -> None:
    """Train with Ignite: an evaluator on an event; RunningAverage, ProgressBar, TensorBoard."""
    from ignite.engine import Engine, Events
    from ignite.handlers import ProgressBar, TensorboardLogger
    from ignite.metrics import RunningAverage
    from ignite.utils import manual_seed

    optimizer = run.sgd()

    def update(_: Engine, batch: Sample) -> Any:
        run.model.train()
        optimizer.zero_grad()
        value = contrast(run.model, run.loss, batch)
        value.backward()
        optimizer.step()
        return value.item() if run.logs else None

    def evaluate(_: Engine, batch: Sample) -> None:
        run.model.eval()
        with torch.no_grad():
            contrast(run.model, run.loss, batch)

    manual_seed(0)
    trainer, evaluator = Engine(update), Engine(evaluate)
    train, held_out = run.loaders()
    if run.validation:
        every = Events.ITERATION_COMPLETED(every=VALIDATION_EVERY)
        trainer.add_event_handler(every, lambda: evaluator.run(held_out))
    if run.logs:
        RunningAverage(output_transform=lambda value: value).attach(trainer, "loss")
        ProgressBar().attach(trainer, ["loss"])
        logger = TensorboardLogger(log_dir=str(run.folder))
        every = Events.ITERATION_COMPLETED(every=LOG_EVERY)
        logger.attach_output_handler(trainer, every, tag="train", metric_names=["loss"])
    trainer.run(train, max_epochs=1)


def diptych(run: Run) -> None:
    """Train with Diptych: `Evaluation`; `default_handlers`, which do more than the others."""
    from diptych.engine import Trainer, tasks
    from diptych.handlers import Evaluation, default_handlers

    trainer = Trainer(
        run.model,
        run.loss,
        run.sgd(),
        task=tasks.image_text,
        device="cpu",
        seed=0,
        log_every=LOG_EVERY,
    )
    train, held_out = run.loaders()
    if run.validation:
        trainer.attach(Evaluation(held_out, every=VALIDATION_EVERY))
    if run.logs:
        trainer.attach(*default_handlers(run.folder))
    trainer.run(train, max_epochs=1)
