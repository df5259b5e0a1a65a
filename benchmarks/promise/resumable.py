"""The training to interrupt, in several libraries, saved and resumed as documented."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.promise.setting import (
    IMAGE,
    Sample,
    Towers,
    UsualCLIPLoss,
    contrast,
    samples,
    stacked,
)

SAMPLES, BATCH, EPOCHS, EVERY, WORKERS, RATE = 64, 8, 3, 4, 2, 1e-2


class Augmented(list[Sample]):
    """Samples whose images get random noise when they are read, like a random augmentation."""

    def __getitem__(self, index: Any) -> Any:
        sample = super().__getitem__(index)
        return {**sample, "image": sample["image"] + 0.3 * torch.randn(IMAGE)}


@dataclass
class Run:
    """A run to interrupt: its folder, model, loss and data.

    Attributes:
        folder: the folder of its checkpoints.
        augmented: whether samples are augmented at random when they are read.
        tick: called after each update, with the number of updates so far.
    """

    folder: Path
    augmented: bool
    tick: Callable[[int], None] = int

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model, self.loss = Towers(dropout=0.1), UsualCLIPLoss()
        plain = samples(SAMPLES)
        self.data = Augmented(plain) if self.augmented else plain

    def adam(self) -> torch.optim.Optimizer:
        """Return an optimizer that has state."""
        return torch.optim.AdamW([*self.model.parameters(), *self.loss.parameters()], lr=RATE)


def lightning(run: Run, loader: Callable[..., Any] = DataLoader) -> None:
    """Train with Lightning: `ModelCheckpoint(save_last=True)` and `ckpt_path="last"`."""
    from lightning import Callback, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint

    from benchmarks.promise.lightning_module import Module, fit

    class Tick(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            run.tick(trainer.global_step)

    seed_everything(0, workers=True)
    fit(
        Module((run.model, run.loss), contrast, run.adam()),
        loader(run.data, batch_size=BATCH, shuffle=True, num_workers=WORKERS),
        ckpt_path="last",
        max_epochs=EPOCHS,
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(run.folder, every_n_train_steps=EVERY, save_last=True), Tick()],
    )


def lightning_stateful(run: Run) -> None:
    """Train with Lightning and torchdata's `StatefulDataLoader`, which Lightning restores."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    lightning(run, StatefulDataLoader)


def transformers(run: Run) -> None:
    """Train with transformers' Trainer and `resume_from_checkpoint`."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    class Tick(TrainerCallback):
        def on_step_end(self, _: Any, state: Any, __: Any, **___: Any) -> None:
            run.tick(state.global_step)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.loss = run.model, run.loss

        def forward(self, **batch: Tensor) -> dict[str, Tensor]:
            return {"loss": contrast(self.model, self.loss, batch)}

    arguments = TrainingArguments(
        str(run.folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        dataloader_num_workers=WORKERS,
        save_strategy="steps",
        save_steps=EVERY,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    last = get_last_checkpoint(run.folder) if run.folder.exists() else None
    trainer = Trainer(
        Whole(), arguments, train_dataset=run.data, data_collator=stacked, callbacks=[Tick()]
    )
    trainer.train(resume_from_checkpoint=last)


def ignite(run: Run, *, deterministic: bool = False) -> None:
    """Train with Ignite: `Checkpoint` of trainer, model, loss and optimizer, and `load_objects`."""
    from ignite.engine import DeterministicEngine, Engine, Events
    from ignite.handlers import Checkpoint, DiskSaver
    from ignite.utils import manual_seed

    optimizer = run.adam()

    def update(_: Engine, batch: Sample) -> None:
        optimizer.zero_grad()
        contrast(run.model, run.loss, batch).backward()
        optimizer.step()

    manual_seed(0)
    trainer = (DeterministicEngine if deterministic else Engine)(update)
    parts = {"trainer": trainer, "model": run.model, "loss": run.loss, "optimizer": optimizer}
    saver = DiskSaver(str(run.folder), create_dir=True, require_empty=False)
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED(every=EVERY),
        Checkpoint(parts, saver, n_saved=2, global_step_transform=lambda e, _: e.state.iteration),
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: run.tick(e.state.iteration))
    saved = {int(path.stem.rpartition("_")[2]): path for path in run.folder.glob("*.pt")}
    if saved:
        Checkpoint.load_objects(parts, loaded(saved[max(saved)]))
    data = DataLoader(run.data, batch_size=BATCH, shuffle=True, num_workers=WORKERS)
    trainer.run(data, max_epochs=EPOCHS)


def loaded(path: Path) -> Any:
    """Return a checkpoint that may contain NumPy's random state, as DeterministicEngine's does."""
    import numpy as np
    from numpy._core.multiarray import _reconstruct

    kinds = [_reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    with torch.serialization.safe_globals(kinds):
        return torch.load(path, weights_only=True)


def diptych(run: Run) -> None:
    """Train with Diptych: `CheckpointManager` with the same folder each time, `SeededLoader`."""
    from diptych.engine import SeededLoader, Trainer, tasks
    from diptych.handlers import CheckpointManager

    trainer = Trainer(run.model, run.loss, run.adam(), task=tasks.image_text, device="cpu", seed=0)
    trainer.attach(CheckpointManager(run.folder, every=EVERY))
    trainer.add_event_handler("ITERATION_COMPLETED", lambda e: run.tick(e.state.iteration))
    trainer.run(SeededLoader(run.data, BATCH, num_workers=WORKERS), max_epochs=EPOCHS)
