"""ImageTextMatchingLoss: binary classification of pairs by a fusion network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.losses.base.gather import GlobalBatch, global_batch, sum_over_ranks
from diptych.losses.base.loss import Loss
from diptych.losses.base.normalization import normalize
from diptych.losses.base.positives import pair_positives, with_own_groups
from diptych.losses.base.projection import Projection
from diptych.losses.base.temperature import Temperature
from diptych.losses.base.validation import check_groups, check_two_views, working_dtype
from diptych.losses.registry import register_loss


class FusionHead(nn.Module):
    """A simple fusion network: a two-layer perceptron on (image, text, image * text).

    Args:
        dim: D, features of each side.
        hidden_dim: Number of features between the layers; None: D.

    Shape:
        [n, D] and [n, D] to [n, 2]: logits of "does not match" and "matches".
    """

    def __init__(self, *, dim: int, hidden_dim: int | None = None) -> None:
        super().__init__()
        self.layers = Projection(input_dim=3 * dim, output_dim=2, hidden_dim=hidden_dim or dim)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Return the logits of n pairs, [n, 2]."""
        logits: Tensor = self.layers(torch.cat((image, text, image * text), dim=-1))
        return logits


@register_loss("fusion")
class ImageTextMatchingLoss(Loss):
    """Two-way cross entropy of fused pairs: matches against hard mismatches (ALBEF, BLIP).

    The mean of -log softmax(fusion(image, text))[matches] over B + 2B pairs: each image with its
    text, each image with a text drawn from the batch, and each text with a drawn image. Similar
    samples are drawn more often: with probability softmax(cos / temperature) over the samples of
    other groups. It is >= 0 and about ln 2 at chance. If the batch has no sample of another group,
    a sample has no mismatch and the mean has fewer pairs.

    Called ``loss(image, text, groups=None)`` with features [B, D], or tokens [B, T, D] (T may
    differ between the sides; the first token is used to compare pairs). The fusion network is
    called once on all 3 b pairs of a rank, with features that are not normalised.

    The draw is made for the global batch: B numbers per direction from one generator, for any
    number of ranks and micro-batches. The generator's state is in the state dict; evaluation does
    not change it.

    Across ranks: both sides are gathered, with gradient; a rank fuses the pairs of its own images
    and texts. Exact for uneven local batches. Rank 0's draw is used on all ranks.

    Source: Li et al. 2021, arXiv:2107.07651; Li et al. 2022, arXiv:2201.12086.

    Args:
        fusion: Called (image [n, ..., D], text [n, ..., D]), returns logits [n, 2]: of "does not
            match" and "matches". The parameters of a module become parameters of the loss; see
            `FusionHead`.
        temperature: tau of the draw, > 0; the smaller, the harder the mismatches.
        generator: Source of the draw; None: a new generator, seeded with 0.

    Raises:
        TypeError: If `fusion` is not callable.
        ValueError: If an argument is out of range.
    """

    negatives_in_batch = True
    exempt: ClassVar[Mapping[str, str]] = {
        "permutation": "the mismatch drawn for a sample depends on its position in the batch",
        "compiles": "torch.compile does not support a draw from a generator",
    }

    def __init__(
        self,
        *,
        fusion: Callable[[Tensor, Tensor], Tensor],
        temperature: float = 0.07,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not callable(fusion):
            raise TypeError(f"fusion must be callable, got {type(fusion).__name__}")
        self.fusion = fusion
        self.temperature = Temperature(temperature)
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator

    def terms(self, image: Tensor, text: Tensor, groups: Tensor | None = None) -> dict[str, Tensor]:
        """Return {"matching": the loss}.

        Args:
            image: [b, D] or [b, T, D], floating point.
            text: [b, D] or [b, T, D], floating point.
            groups: Integers [b]; pairs with equal ids are not mismatches of one another.

        Raises:
            ValueError: If shapes do not fit, or the fusion does not return [n, 2].
            TypeError: If features are not floating point or groups not integers.
        """
        check_two_views(("image", "text"), image, text, middle="tokens")
        check_groups("groups", groups, image.shape[0])
        batch = global_batch(image.shape[0], features=image.shape[-1])
        groups = None if groups is None else with_own_groups(groups, batch)
        dtype = working_dtype(image, text)
        image, text = image.to(dtype), text.to(dtype)
        images, texts = batch.gather(image), batch.gather(text)
        drawn_texts, drawn_images, valid = self._draw(images, texts, groups, batch)
        logits = self.fusion(
            torch.cat((image, image, images.index_select(0, drawn_images))),
            torch.cat((text, texts.index_select(0, drawn_texts), text)),
        )
        if logits.shape != (3 * batch.size, 2):
            raise ValueError(
                f"fusion must return logits [n, 2] for n pairs of image and text, got shape"
                f" {tuple(logits.shape)} for n = {3 * batch.size}"
            )
        matches = torch.zeros(3 * batch.size, dtype=torch.int64, device=logits.device)
        matches[: batch.size] = 1
        with torch.autocast(logits.device.type, enabled=False):
            values = F.cross_entropy(logits.to(dtype), matches, reduction="none")
        counted = torch.cat((torch.ones_like(valid), valid, valid))
        return {"matching": batch.mean(values.masked_fill(~counted, 0.0), counted)}

    @torch.no_grad()
    def _draw(
        self, images: Tensor, texts: Tensor, groups: Tensor | None, batch: GlobalBatch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw mismatches for this rank's samples.

        Returns:
            Indices in the global batch of a text for each image and of an image for each text,
            int64 [b], and bool [b], which samples have a mismatch.
        """
        rows = slice(batch.offset, batch.offset + batch.size)
        mismatches = pair_positives(batch, groups, images.device).negatives()
        valid = mismatches.any(1)
        with torch.autocast(images.device.type, enabled=False):
            pooled = [normalize(x if x.dim() == 2 else x[:, 0]) for x in (images, texts)]
            scale = self.temperature.scale(images)
            uniform = self._uniform(batch, images)[:, rows]
            drawn = [
                _sample(scale * (own[rows] @ others.T), mismatches | ~valid[:, None], position)
                for own, others, position in zip(pooled, reversed(pooled), uniform, strict=True)
            ]
        return drawn[0], drawn[1], valid

    def _uniform(self, batch: GlobalBatch, like: Tensor) -> Tensor:
        """Return rank 0's random numbers in [0, 1) for the global batch, [2, B], on every rank."""
        before = None if self.training else self.generator.get_state()
        numbers = torch.rand(
            2,
            batch.total,
            generator=self.generator,
            dtype=torch.float64,
            device=self.generator.device,
        )
        if before is not None:
            self.generator.set_state(before)
        numbers = numbers.to(device=like.device, dtype=like.dtype, non_blocking=True)
        return sum_over_ranks(numbers if batch.rank == 0 else torch.zeros_like(numbers))

    def get_extra_state(self) -> Tensor:
        """Return the generator's state for the state dict."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Restore the generator's state."""
        self.generator.set_state(state.cpu())

    @classmethod
    def example(cls) -> ImageTextMatchingLoss:
        """Return a small instance for the contract test."""
        return cls(fusion=FusionHead(dim=8))


def _sample(logits: Tensor, allowed: Tensor, uniform: Tensor) -> Tensor:
    """Draw a column of each row with probability softmax(logits) over the allowed ones.

    Args:
        logits: [n, m].
        allowed: Bool [n, m], at least one in each row.
        uniform: In [0, 1], [n]: the position of the draw in the cumulative distribution.

    Returns:
        int64 [n].
    """
    cumulative = logits.masked_fill(~allowed, -torch.inf).softmax(1).cumsum(1)
    # Stay below the sum: rounding must not draw a column after the last allowed one.
    largest = torch.nextafter(cumulative[:, -1], torch.zeros_like(uniform))
    position = torch.minimum(uniform * cumulative[:, -1], largest)
    drawn = torch.searchsorted(cumulative, position[:, None], right=True)[:, 0]
    return drawn.clamp_max(logits.shape[1] - 1)  # NaN features give a position past the end
