"""The shared model and loss as a LightningModule, and a Lightning trainer without logs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from benchmarks.promise.setting import Sample

Step = Callable[[nn.Module, nn.Module, Sample], Tensor]


class Module(LightningModule):
    """Model and loss, trained by Lightning; `logs`: whether to log the loss (progress bar too)."""

    def __init__(
        self,
        parts: tuple[nn.Module, nn.Module],
        step: Step,
        optimizer: torch.optim.Optimizer,
        *,
        logs: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.loss = parts
        self._step, self._optimizer, self._logs = step, optimizer, logs

    def training_step(self, batch: Sample, _: int) -> Tensor:
        """Return the loss of a batch."""
        value = self._step(self.model, self.loss, batch)
        if self._logs:
            self.log("train/loss", value, prog_bar=True)
        return value

    def validation_step(self, batch: Sample, _: int) -> Tensor:
        """Return the loss of a held-out batch."""
        return self._step(self.model, self.loss, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer that was given."""
        return self._optimizer


def fit(
    module: Module,
    loader: Iterable[Any],
    *,
    val_loader: Iterable[Any] | None = None,
    ckpt_path: str | None = None,
    **settings: Any,
) -> None:
    """Train for one epoch on the CPU, unless `settings` override this."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(**{"accelerator": "cpu", "max_epochs": 1, **quiet, **settings})
    trainer.fit(module, loader, val_loader, ckpt_path=ckpt_path)
