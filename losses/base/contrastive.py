"""BaseContrastiveLoss: base of the losses on pairs of features."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from diptych.losses.base.gather import GlobalBatch, global_batch
from diptych.losses.base.loss import Loss, sum_of_terms
from diptych.losses.base.normalization import normalize, normalize_in_float32
from diptych.losses.base.positives import with_own_groups
from diptych.losses.base.temperature import Temperature
from diptych.losses.base.validation import HALF, check_groups, check_pair, working_dtype


class Pairs(NamedTuple):
    """This rank's validated pairs and their place in the global batch.

    Attributes:
        first: [b, D], float32 or float64, normalised if the loss normalises.
        second: [b, D], likewise.
        groups: Integer ids [b], or None. A sample without a group has an id of its own.
        batch: Sizes of all ranks; gathers with gradient.
        dtype: The dtype in which the features entered.
        normalize: Whether the sides are still in half precision and not normalised, because
            `contrast` normalises them without a copy on an accelerator.
    """

    first: Tensor
    second: Tensor
    groups: Tensor | None
    batch: GlobalBatch
    dtype: torch.dtype
    normalize: bool = False


class BaseContrastiveLoss(Loss):
    """Base of the losses that are called ``loss(first, second, groups=None)``.

    A subclass defines one of two methods:

    - `objective(pairs)`, as the losses of this package do. The sides are validated, float32 (or
      float64) and normalised; autocast is off. The method computes this rank's rows against all
      ranks' columns and returns the named terms.
    - `forward(first, second, groups=None)` with `normalize_features` and `compute_similarity`:
      shorter to write. `compute_similarity` returns the matrix of the *global* batch, so that code
      written for one process is exact on many, at the cost of B x B memory on each.

    Args:
        temperature: tau, > 0.
        learn_temperature: Whether ln(1 / tau) is a parameter. Give it no weight decay.
        min_logit_scale: Lower bound of a learned 1 / tau; None: unbounded.
        max_logit_scale: Upper bound of a learned 1 / tau; None: unbounded.
        normalize: Whether features are divided by their L2 norm.

    Attributes:
        couples_samples: True: the loss of a batch is more than a mean over its samples.
        negatives_in_batch: True: a trainer reports a first batch of one pair.
        sides: Names of the two inputs in error messages.
        normalizes_late: Whether `objective` passes `Pairs.normalize` on to `contrast`.
    """

    couples_samples: ClassVar[bool] = True
    negatives_in_batch: ClassVar[bool] = True
    sides: ClassVar[tuple[str, str]] = ("first", "second")
    normalizes_late: ClassVar[bool] = False
    bias: nn.Parameter | float  # only in losses that have one

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        learn_temperature: bool = False,
        min_logit_scale: float | None = 1.0,
        max_logit_scale: float | None = 100.0,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.temperature = Temperature(
            temperature,
            learn=learn_temperature,
            min_scale=min_logit_scale,
            max_scale=max_logit_scale,
        )
        self.normalize = normalize

    def forward(self, first: Tensor, second: Tensor, groups: Tensor | None = None) -> Tensor:
        """Return the loss, a scalar that averages over ranks to that of the global batch.

        Args:
            first: [b, D], floating point.
            second: [b, D], floating point.
            groups: Integers [b]; pairs with equal ids match one another. -100: no group.

        Raises:
            ValueError: If shapes do not fit, or the global batch is below `minimum_batch`.
            TypeError: If features are not floating point or groups not integers.
        """
        return sum_of_terms(self.terms(first, second, groups))

    def terms(
        self, first: Tensor, second: Tensor, groups: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the named, weighted parts whose sum is the loss. Arguments as for `forward`."""
        if not self._overrides("objective"):
            if self._overrides("forward"):
                inputs = (first, second) if groups is None else (first, second, groups)
                return {"contrastive": self(*inputs)}
            raise NotImplementedError(f"{type(self).__name__} must define objective or forward")
        pairs = self.prepare(first, second, groups)
        with torch.autocast(first.device.type, enabled=False):
            return self.objective(pairs)

    def objective(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return the named terms of prepared pairs; they average over ranks to the global ones."""
        raise NotImplementedError

    def normalize_features(self, features: Tensor) -> Tensor:
        """Return features [n, D] in float32 (or float64), at unit L2 norm if the loss normalises.

        A zero vector stays zero and gets no gradient.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(working_dtype(features))
            return normalize(features) if self.normalize else features

    def compute_similarity(self, first: Tensor, second: Tensor) -> Tensor:
        """Return similarity / temperature of every pair in the global batch, [B, B].

        Both sides are normalised and, in a process group, gathered with gradient. Every rank holds
        the whole matrix, so that a loss computed from it is the global one.

        Args:
            first: [b, D].
            second: [b, D].
        """
        pairs = self.prepare(first, second, None)
        with torch.autocast(first.device.type, enabled=False):
            sides = (pairs.first, pairs.second)
            if pairs.normalize:
                sides = normalize_in_float32(pairs.first), normalize_in_float32(pairs.second)
            rows, columns = (pairs.batch.gather(side) for side in sides)
            return self.temperature.scale(rows) * (rows @ columns.T)

    def prepare(self, first: Tensor, second: Tensor, groups: Tensor | None) -> Pairs:
        """Validate, convert and normalise the inputs, and exchange the batch sizes of all ranks."""
        check_pair(self.sides, first, second)
        size, dim = first.shape
        check_groups("groups", groups, size)
        batch = global_batch(size, feature_dimension=dim, groups_given=int(groups is not None))
        if batch.total < self.minimum_batch:
            raise ValueError(
                f"{type(self).__name__} needs a global batch of at least {self.minimum_batch},"
                f" got {batch.total}. Use larger batches, or drop the last, incomplete one."
            )
        if groups is not None:
            groups = with_own_groups(groups, batch)
        if self._normalizes_late(first, second):
            return Pairs(first, second, groups, batch, first.dtype, normalize=True)
        dtype = working_dtype(first, second)
        with torch.autocast(first.device.type, enabled=False):
            sides = [self.normalize_features(side.to(dtype)) for side in (first, second)]
        return Pairs(sides[0], sides[1], groups, batch, first.dtype)

    def _normalizes_late(self, first: Tensor, second: Tensor) -> bool:
        """Return whether features go to `contrast` in half precision, not normalised."""
        if not self.normalize:
            return False
        # `normalizes_late` holds only for the `objective` of the class that sets it.
        author = next(cls for cls in type(self).__mro__ if "objective" in vars(cls))
        half = first.dtype == second.dtype and first.dtype in HALF
        return half and vars(author).get("normalizes_late", False)

    def scalars(self) -> dict[str, Tensor]:
        """Return a learned temperature and its log scale, detached, for logs."""
        return self.temperature.scalars() if self.temperature.learned else {}

    def share_bias(self, find: Callable[[], nn.Parameter]) -> None:
        """Use a model's own logit bias, if the loss has a `bias`; see `share_logit_scale`.

        Args:
            find: Returns the model's parameter, or raises if there is none.
        """
        if hasattr(self, "bias"):
            self.bias = find()

    def _overrides(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(BaseContrastiveLoss, method)
