"""BaseContrastiveLoss: what every loss on pairs of features shares."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from diptych.losses.base.gather import GlobalBatch, global_batch
from diptych.losses.base.temperature import Temperature
from diptych.losses.base.validation import HALF, check_groups, check_pair, working_dtype


class Pairs(NamedTuple):
    """This rank's pairs, ready to be computed with, and their place in the global batch.

    Attributes:
        first: [b, D], float32 or float64, normalised if the loss normalises.
        second: [b, D], likewise.
        groups: Integer ids [b], or None.
        batch: Sizes of all ranks; gathers with gradient.
        dtype: What the features came in.
        normalize: Whether the sides are as they came, in half precision, and `contrast` is to
            normalise them: on an accelerator it does so without a copy.
    """

    first: Tensor
    second: Tensor
    groups: Tensor | None
    batch: GlobalBatch
    dtype: torch.dtype
    normalize: bool = False


def normalize(features: Tensor, epsilon: float = 1e-12) -> Tensor:
    """Return features divided by their L2 norm along the last dimension.

    A vector whose norm is at most `epsilon` has no direction: it becomes zero and gets a zero
    gradient, where `F.normalize` would give one of 1 / epsilon.
    """
    unit: Tensor = _Normalize.apply(features, epsilon)  # type: ignore[no-untyped-call]
    return unit


class _Normalize(torch.autograd.Function):
    """`normalize`, whose backward holds one copy of the features where autograd's holds four."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, epsilon: float) -> Tensor:
        unit = features / _divisor(features, epsilon)
        ctx.save_for_backward(features, unit)
        ctx.epsilon = epsilon
        return unit

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        features, unit = ctx.saved_tensors
        norm = _divisor(features, ctx.epsilon)
        along = torch.linalg.vecdot(gradients[0], unit)[..., None]
        across = torch.addcmul(gradients[0], along, unit, value=-1)
        # A second derivative needs what stands here; otherwise it is overwritten.
        return across / norm if torch.is_grad_enabled() else across.div_(norm), None


def normalized(features: Tensor) -> Tensor:
    """Return features at unit norm in float32, or float64 if they came in it."""
    return normalize(features.to(working_dtype(features)))


def _divisor(features: Tensor, epsilon: float) -> Tensor:
    """Return the norm of each row, its dimension kept; infinite where there is no direction."""
    norm: Tensor = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return norm.masked_fill(norm <= epsilon, torch.inf)


class BaseContrastiveLoss(nn.Module):
    """Base of the losses that are called ``loss(first, second, groups=None)``.

    A subclass writes one method, whichever suits it:

    - `objective(pairs)`, as the losses of this package do: the sides come validated, in float32 (or
      float64), normalised, under no autocast. It computes this rank's rows against everybody's
      columns and returns the named terms.
    - `forward(first, second, groups=None)`, with `normalize_features` and `compute_similarity`:
      the short way. `compute_similarity` returns the matrix of the *global* batch, so that what
      is written for one process is exact on many, at the cost of B x B memory on each.

    Args:
        temperature: tau, > 0.
        learn_temperature: Whether ln(1 / tau) is a parameter. Give it no weight decay.
        min_logit_scale: Lower bound of a learned 1 / tau; None: unbounded.
        max_logit_scale: Upper bound of a learned 1 / tau; None: unbounded.
        normalize: Whether features are divided by their L2 norm.

    Attributes:
        couples_samples: True: the loss of a batch is no mean over its samples.
        symmetric: Whether swapping the sides leaves the value unchanged.
        minimum_batch: The least global batch for which the loss is defined.
        sides: What error messages call the two inputs.
        normalizes_late: Whether `objective` hands `Pairs.normalize` on to `contrast`.
        without_gradient: Names of inputs through which, by the paper, no gradient flows.
    """

    couples_samples: ClassVar[bool] = True
    symmetric: ClassVar[bool] = False
    minimum_batch: ClassVar[int] = 1
    sides: ClassVar[tuple[str, str]] = ("first", "second")
    normalizes_late: ClassVar[bool] = False
    without_gradient: ClassVar[tuple[str, ...]] = ()

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
        """Return the loss, a scalar which averages over ranks to that of the global batch.

        Args:
            first: [b, D], floating point.
            second: [b, D], floating point.
            groups: Integers [b]; pairs with equal ids match one another.

        Raises:
            ValueError: If shapes do not fit, or the global batch is below `minimum_batch`.
            TypeError: If features are not floating point or groups not integers.
        """
        return total(self.terms(first, second, groups))

    def terms(
        self, first: Tensor, second: Tensor, groups: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the named, weighted parts whose sum is the loss. Arguments as for `forward`."""
        if not self._has("objective"):
            if self._has("forward"):
                inputs = (first, second) if groups is None else (first, second, groups)
                return {"contrastive": self(*inputs)}
            raise NotImplementedError(
                f"{type(self).__name__} defines neither objective nor forward"
            )
        pairs = self.prepare(first, second, groups)
        with torch.autocast(first.device.type, enabled=False):
            return self.objective(pairs)

    def objective(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return the named terms for prepared pairs; they average over ranks to the global ones."""
        raise NotImplementedError

    def normalize_features(self, features: Tensor) -> Tensor:
        """Return features [n, D] in float32 (or float64) at unit L2 norm, if the loss normalises.

        A zero vector stays zero and gets no gradient.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(working_dtype(features))
            return normalize(features) if self.normalize else features

    def compute_similarity(self, first: Tensor, second: Tensor) -> Tensor:
        """Return similarity / temperature of every pair in the global batch, [B, B].

        Both sides are normalised and, in a process group, gathered with gradient: every rank holds
        the whole matrix, and a loss computed from it is the global one.

        Args:
            first: [b, D].
            second: [b, D].
        """
        pairs = self.prepare(first, second, None)
        with torch.autocast(first.device.type, enabled=False):
            sides = (pairs.first, pairs.second)
            if pairs.normalize:
                sides = normalized(pairs.first), normalized(pairs.second)
            rows, columns = (pairs.batch.gather(side) for side in sides)
            return self.temperature.scale(rows) * (rows @ columns.T)

    def prepare(self, first: Tensor, second: Tensor, groups: Tensor | None) -> Pairs:
        """Validate, convert and normalise the inputs and learn the global batch's sizes."""
        check_pair(self.sides, first, second)
        size, dim = first.shape
        if groups is not None:
            check_groups("groups", groups, size)
        batch = global_batch(size, feature_dimension=dim, groups_given=int(groups is not None))
        if batch.total < self.minimum_batch:
            raise ValueError(
                f"{type(self).__name__} needs a global batch of at least {self.minimum_batch},"
                f" got {batch.total}; use larger batches, or drop the last, incomplete one"
            )
        if self._late(first, second, batch):
            return Pairs(first, second, groups, batch, first.dtype, normalize=True)
        dtype = working_dtype(first, second)
        with torch.autocast(first.device.type, enabled=False):
            sides = [self.normalize_features(side.to(dtype)) for side in (first, second)]
        return Pairs(sides[0], sides[1], groups, batch, first.dtype)

    def _late(self, first: Tensor, second: Tensor, batch: GlobalBatch) -> bool:
        """Return whether features go to `contrast` as they came."""
        # Several ranks exchange gradients, which half precision would round once more.
        if not self.normalize or batch.world_size > 1:
            return False
        # A subclass with an objective of its own has to say so for itself.
        author = next(one for one in type(self).__mro__ if "objective" in vars(one))
        half = first.dtype == second.dtype and first.dtype in HALF
        return half and vars(author).get("normalizes_late", False)

    def scalars(self) -> dict[str, Tensor]:
        """Return detached values worth logging: a learned temperature and its log scale."""
        return self.temperature.scalars() if self.temperature.learned else {}

    @classmethod
    def example(cls) -> BaseContrastiveLoss:
        """Return a small instance for the contract test; override it if arguments are required."""
        return cls()

    def example_inputs(
        self, batch: int, *, dim: int = 8, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Return the arguments of one call, float32, for the contract test.

        Args:
            batch: Number of samples.
            dim: Features of each.
            generator: Where the numbers come from.
        """
        return tuple(torch.randn(batch, dim, generator=generator) for _ in self.sides)

    def _has(self, method: str) -> bool:
        return getattr(type(self), method) is not getattr(BaseContrastiveLoss, method)


def total(terms: dict[str, Tensor]) -> Tensor:
    """Return the sum of a loss's terms."""
    return torch.stack(list(terms.values())).sum() if len(terms) > 1 else next(iter(terms.values()))
