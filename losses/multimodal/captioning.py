"""CaptioningLoss: contrast of images and texts, and generation of texts from images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diptych.losses.base.positives import NO_GROUP
from diptych.losses.base.validation import check_at_least, check_pair
from diptych.losses.combine.composite import CompositeLoss
from diptych.losses.contrastive.clip import CLIPLoss
from diptych.losses.registry import register_loss
from diptych.losses.supervised.cross_entropy import CrossEntropyLoss, check_classification


@register_loss("captioning")
class CaptioningLoss(CompositeLoss):
    """CLIP between image and text plus the cross entropy of the caption (CoCa).

    contrastive_weight * CLIP(image, text) + caption_weight * CE(logits[:, :-1], labels[:, 1:]),
    where the cross entropy is a mean over the tokens that are not padding. It is >= 0; without a
    token to predict, the caption term is 0. Terms: `contrastive`, `caption`.

    Labels of -100 do not count either. If the end token is the padding token, as GPT-2's is, pass
    ``pad_id=None`` and labels that are -100 after the end: the end is learned, the padding not.

    Called ``loss(image, text, logits, labels)``: the logits at a position predict the next token.

    Across ranks: CLIP gathers image and text features; the caption term gathers nothing and is
    divided by the number of tokens on all ranks, so that each rank counts by its tokens. Exact.

    Source: Yu et al. 2022, arXiv:2205.01917.

    Args:
        contrastive_weight: >= 0.
        caption_weight: >= 0.
        pad_id: The padding token, which does not count; None: only -100 marks padding.
        contrastive: The loss on image and text; None: ``CLIPLoss()``.

    Raises:
        ValueError: If a weight is < 0.
    """

    def __init__(
        self,
        *,
        contrastive_weight: float = 1.0,
        caption_weight: float = 2.0,
        pad_id: int | None = 0,
        contrastive: nn.Module | None = None,
    ) -> None:
        check_at_least("contrastive_weight", contrastive_weight, 0)
        check_at_least("caption_weight", caption_weight, 0)
        super().__init__(
            {
                "contrastive": CLIPLoss() if contrastive is None else contrastive,
                "caption": CrossEntropyLoss(),
            }
        )
        self.pad_id = pad_id
        self.contrastive_weight = contrastive_weight
        self.caption_weight = caption_weight

    def terms(
        self,
        image: Tensor,
        text: Tensor,
        logits: Tensor,
        labels: Tensor,
        groups: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the weighted terms `contrastive` and `caption`.

        Args:
            image: Features [b, D].
            text: Features [b, D].
            logits: [b, T, C], for each position of the caption and each token of the vocabulary.
            labels: The caption's tokens, integers [b, T]; -100: not a token.
            groups: Integers [b]; pairs with equal ids match one another.

        Raises:
            ValueError: If shapes do not fit.
            TypeError: If features and logits are not floating point or labels not integers.
        """
        check_pair(("image", "text"), image, text)
        check_classification(logits, labels)
        if logits.dim() != 3 or logits.shape[0] != image.shape[0]:
            raise ValueError(
                f"logits must be [batch, tokens, classes] with batch = {image.shape[0]}, got shape"
                f" {tuple(logits.shape)}"
            )
        if self.pad_id is not None:
            labels = labels.long().masked_fill(labels == self.pad_id, NO_GROUP)
        following = logits[:, :-1], labels[:, 1:]
        return {
            **self.part_terms("contrastive", self.contrastive_weight, image, text, groups),
            **self.part_terms("caption", self.caption_weight, *following),
        }

    def example_inputs(
        self, batch: int, *, dim: int = 8, generator: torch.Generator | None = None
    ) -> tuple[Tensor, ...]:
        """Return features [batch, dim], logits [batch, 5, dim] and padded labels [batch, 5]."""
        image, text = (torch.randn(batch, dim, generator=generator) for _ in range(2))
        logits = torch.randn(batch, 5, dim, generator=generator)
        labels = torch.randint(1, dim, (batch, 5), generator=generator)
        lengths = 5 - torch.arange(batch) % 3
        return image, text, logits, labels * (torch.arange(5) < lengths[:, None])
