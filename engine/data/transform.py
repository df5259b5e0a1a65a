"""Transforms of whole batches on the device, such as augmentations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diptych.engine.distributed.collectives import rank
from diptych.engine.errors import BatchError
from diptych.engine.random_state import mixed_seed, seeded_random_state

Transform = Callable[[Any], Any]
"""A function from a batch to a new batch; it must not modify its argument."""


def apply_transform(
    transform: Transform | None,
    batch: Any,
    device: torch.device,
    *,
    seed: int | None,
    epoch: int,
    iteration: int,
) -> Any:
    """Apply a transform to a batch on the device, without a graph.

    Its random numbers, from Python's, NumPy's, torch's or the device's global generator, depend on
    seed, epoch, iteration and rank alone. The generators are restored afterwards.

    Args:
        transform: None returns the batch unchanged.
        batch: on the device.
        device: its generator is seeded, besides those of the host.
        seed: the run's; None counts as 0.
        epoch: counted from 1.
        iteration: counted from 1, over all epochs.

    Raises:
        BatchError: if the transform returns nothing.
    """
    if transform is None:
        return batch
    with (
        torch.no_grad(),
        seeded_random_state(mixed_seed(seed or 0, epoch, iteration, rank()), device),
    ):
        result = transform(batch)
    if result is None:
        raise BatchError("transform must return a batch, got None. End it with a return statement.")
    return result


def placed_transform(transform: Any, step: Any, device: torch.device) -> Transform | None:
    """Return the transform; move it to the device if it is a module.

    Raises:
        TypeError: if it is not callable.
        ValueError: if the step is a plain function, which would not call the transform.
    """
    if transform is None:
        return None
    if not callable(transform):
        raise TypeError(f"transform must be a function of a batch, got {transform!r}")
    if isinstance(transform, type):
        name = transform.__name__
        raise TypeError(
            f"transform must be a function of a batch, got the class {name}. Make an instance: "
            f"{name}(...)"
        )
    if step is not None and not isinstance(step, type):
        raise ValueError(
            f"transform needs a TrainStep, got the function {step!r} as step. Call the transform "
            "in that function, or make a subclass of TrainStep."
        )
    return transform.to(device) if isinstance(transform, nn.Module) else transform


class OnKeys(nn.Module):
    """A batch transform that applies a transform of tensors to entries of a mapping.

    ```python
    augmentation = nn.Sequential(RandomHorizontalFlip(), ColorJiggle(0.2, 0.2, 0.2, 0.1))
    trainer = Trainer(model, loss, optimizer, task=tasks.image_text,
                      transform=OnKeys(augmentation, "image"))
    ```

    Args:
        transform: a function from a tensor [B, ...] to a tensor, such as an augmentation of
            kornia. A module moves to the trainer's device.
        keys: the entries of the batch to transform, one after the other, each with random numbers
            of its own. The other entries stay unchanged.

    Raises:
        TypeError: if the transform is not callable.
        ValueError: if no key is given.
        BatchError: on a call, if the batch is not a mapping, or lacks a key.
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
            raise BatchError(f"batch must be a mapping for OnKeys, got {type(batch).__name__}")
        missing = [key for key in self.keys if key not in batch]
        if missing:
            raise BatchError(
                f"a batch must hold {', '.join(self.keys)} to transform, got {', '.join(batch)}"
            )
        return {**batch, **{key: self.transform(batch[key]) for key in self.keys}}
