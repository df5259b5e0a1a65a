"""SIGRegLoss: prediction between views, with features that are kept normally distributed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diptych.losses.base.gather import GlobalBatch, sum_over_ranks
from diptych.losses.base.validation import check_at_least
from diptych.losses.base.views import ViewsLoss
from diptych.losses.registry import register_loss

LIMIT, POINTS = 5.0, 17
"""The test's integral runs over [-LIMIT, LIMIT] in POINTS points, by the trapezoidal rule."""


@register_loss("sigreg")
class SIGRegLoss(ViewsLoss):
    """Prediction of views and sketched isotropic Gaussian regularisation (LeJEPA).

    (1 - lambda) MSE(x_v, mean of the global views) + lambda SIGReg, where SIGReg is the mean over
    views and random unit directions a of the Epps-Pulley statistic
    B * integral over [-5, 5] of |phi_a(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt with
    phi_a(t) = mean_n exp(i t a.x_n): it is 0 only if the features are normally distributed with
    mean 0 and variance 1 along a. There is no teacher, no stop-gradient and no negative, and
    features are not normalised. It is >= 0. Terms: `prediction`, `sigreg`. `groups` are accepted
    and have no effect.

    The directions are a function of `seed` and of the number of calls in training mode, which is a
    buffer: they are equal on all ranks and after a resume, and no random generator is used. Call
    the loss exactly once per update. In evaluation mode the number does not change.

    Across ranks: phi is averaged over ranks, with gradient, before it is squared; V x directions x
    9 complex numbers are communicated. Exact for uneven local batches.

    Source: Balestriero and LeCun 2025, arXiv:2511.08544.

    Args:
        weight: lambda, in [0, 1]; the paper uses 0.02 to 0.05.
        directions: The number of random directions, >= 1: 256 to 1024 in the paper. Memory is
            V x b x directions x 9 numbers, three times.
        global_views: The views whose mean is predicted are the first so many; None: all.
        seed: Of the directions.

    Raises:
        ValueError: If an argument is out of range.
    """

    step: Tensor

    def __init__(
        self,
        *,
        weight: float = 0.05,
        directions: int = 256,
        global_views: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must lie in [0, 1], got {weight}")
        check_at_least("directions", directions, 1)
        if global_views is not None:
            check_at_least("global_views", global_views, 1)
        self.weight = weight
        self.directions = directions
        self.global_views = global_views
        self.seed = seed
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def symmetric(self) -> bool:
        """Whether all views are predicted."""
        return self.global_views is None

    def objective(self, views: Tensor, batch: GlobalBatch) -> dict[str, Tensor]:
        """Return the two weighted terms, and count the call if training."""
        if self.global_views is not None and len(views) < self.global_views:
            raise ValueError(
                f"first must have the {self.global_views} global views, got {len(views)} views."
                " Pass them first, or construct the loss with another number of global_views."
            )
        target = views[: self.global_views].mean(0)
        prediction = batch.mean((views - target).square().mean((0, 2)))
        directions = unit_directions(self.seed, self.step, self.directions, views.shape[2])
        statistic = epps_pulley(views @ directions.to(views.dtype), batch).mean()
        if self.training:
            self.step.add_(1)
        return {
            "prediction": (1 - self.weight) * prediction,
            "sigreg": self.weight * statistic,
        }


def epps_pulley(projected: Tensor, batch: GlobalBatch) -> Tensor:
    """Return B times the squared distance of phi to a normal one along each direction, [V, A].

    Args:
        projected: This rank's samples along A directions, [V, b, A].
        batch: Sizes of all ranks.
    """
    # The integrand is even: half of the points suffice.
    points = torch.linspace(
        0, LIMIT, POINTS // 2 + 1, device=projected.device, dtype=projected.dtype
    )
    normal = (-points.square() / 2).exp()
    weights = torch.full_like(points, 2)
    weights[0] = weights[-1] = 1
    weights = weights * normal * (LIMIT / (POINTS // 2))
    angles = projected[..., None] * points
    sums = torch.stack((angles.cos().sum(1), angles.sin().sum(1)))
    real, imaginary = sum_over_ranks(sums) / batch.total
    distances: Tensor = ((real - normal).square() + imaginary.square()) @ weights
    return batch.total * distances


def unit_directions(seed: int, step: Tensor, count: int, dim: int) -> Tensor:
    """Return random unit vectors as columns, float32 [dim, count], on the device of `step`.

    They are a function of the arguments alone, and the host does not wait for `step`: a hash of
    seed, step and position replaces a generator, and the Box-Muller transform makes it normal.
    """
    position = torch.arange(2 * dim * count, device=step.device)
    key = _hash(_hash(torch.full_like(step, seed)) ^ step)
    uniform = (_hash(_hash(position) ^ key).float() + 1) / (2**32 + 1)
    radius, angle = uniform.view(2, dim, count)
    normal: Tensor = (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
    return normal / normal.square().sum(0).sqrt()


def _hash(value: Tensor) -> Tensor:
    """Return well mixed 32 bits of each integer: two rounds of xor, shift and multiply."""
    value = value & 0xFFFFFFFF
    for factor in (0x7FEB352D, 0x846CA68B):
        value = ((value ^ (value >> 16)) * factor) & 0xFFFFFFFF
    return value ^ (value >> 16)
