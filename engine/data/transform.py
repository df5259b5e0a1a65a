"""Batch transforms: what is done to a whole batch on the device before the model sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diptych.engine.distributed.collectives import rank
from diptych.engine.errors import BatchError
from diptych.engine.random_state import mixed, seeded_random_state

Transform = Callable[[Any], Any]
"""Returns a batch for a batch, and leaves the one that it is given as it is."""


def transformed(
    transform: Transform | None,
    batch: Any,
    device: torch.device,
    *,
    seed: int | None,
    epoch: int,
    iteration: int,
) -> Any:
    """Return what a transform makes of a batch on the device, without a graph.

    Whatever it draws, from Python's, NumPy's, torch's or the device's global generator, is a
    function of seed, epoch, iteration and rank; the generators are then as they were.

    Args:
        transform: None leaves the batch as it is.
        batch: on the device.
        device: whose generator is seeded.
        seed: the run's; None counts as 0.
        epoch: counted from 1.
        iteration: counted from 1, over all epochs.

    Raises:
        BatchError: if the transform returns nothing.
    """
    if transform is None:
        return batch
    with torch.no_grad(), seeded_random_state(mixed(seed or 0, epoch, iteration, rank()), device):
        result = transform(batch)
    if result is None:
        raise BatchError("transform must return the batch that the model is to see, got None")
    return result


def placed_transform(transform: Any, step: Any, device: torch.device) -> Transform | None:
    """Return the transform, on the device where it is a module.

    Raises:
        TypeError: if it is not callable.
        ValueError: if there is one, and the step is a plain function, which would not call it.
    """
    if transform is None:
        return None
    if not callable(transform):
        raise TypeError(f"transform must be a function of a batch, got {transform!r}")
    if step is not None and not isinstance(step, type):
        raise ValueError(
            f"transform needs a TrainStep, got the function {step!r} as step: call the transform "
            "there, or make a subclass of TrainStep"
        )
    return transform.to(device) if isinstance(transform, nn.Module) else transform


class OnKeys(nn.Module):
    """A transform of single tensors, such as kornia's augmentations, as one of a mapping batch.

    ```python
    augmentation = nn.Sequential(RandomHorizontalFlip(), ColorJiggle(0.2, 0.2, 0.2, 0.1))
    trainer = Trainer(model, loss, optimizer, task=tasks.image_text,
                      transform=OnKeys(augmentation, "image"))
    ```

    Args:
        transform: takes and returns a tensor [B, ...]. A module goes to the trainer's device.
        keys: entries of the batch, each transformed on its own, in this order, with draws of its
            own. The others stay as they are.

    Raises:
        TypeError: if the transform is not callable.
        ValueError: if there is no key.
        BatchError: when it is called: if the batch is no mapping, or lacks a key.
    """

    def __init__(self, transform: Callable[[Tensor], Tensor], *keys: str) -> None:
        super().__init__()
        if not callable(transform):
            raise TypeError(f"transform must be a function of a tensor, got {transform!r}")
        if not keys:
            raise ValueError('keys must name at least one entry of the batch, such as "image"')
        self.transform, self.keys = transform, keys

    def forward(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch with the entries under `keys` transformed."""
        if not isinstance(batch, Mapping):
            raise BatchError(f"OnKeys needs a batch that is a mapping, got {type(batch).__name__}")
        missing = [key for key in self.keys if key not in batch]
        if missing:
            raise BatchError(
                f"a batch must hold {', '.join(self.keys)} to transform, got {', '.join(batch)}"
            )
        return {**batch, **{key: self.transform(batch[key]) for key in self.keys}}
