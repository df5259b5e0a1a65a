"""TripletLoss: a hinge on the margin between matching and other pairs."""

from __future__ import annotations

from torch import Tensor

from diptych.losses.base.contrastive import BaseContrastiveLoss, Pairs
from diptych.losses.base.hard_negatives import HardNegatives
from diptych.losses.base.objectives import hinge
from diptych.losses.base.positives import pair_positives
from diptych.losses.base.validation import check_at_least, check_choice
from diptych.losses.registry import register_loss

_SELECT = {"sum": "all", "hardest": "hardest", "semi_hard": "semi_hard"}


@register_loss("triplet")
class TripletLoss(BaseContrastiveLoss):
    """Hinge on the margin between each pair and its negatives, in both directions (VSE++).

    sum_i sum_j relu(m + S_ij - S_ii) + relu(m + S_ji - S_ii) over the negatives j that `negatives`
    selects, S the cosine similarity. As in the references, it is a *sum* over the batch
    (``reduction="mean"`` divides by B). It is >= 0; a single pair gives 0. With `groups`, other
    samples of the group are not negatives.

    ``hardest`` easily collapses from a random initialisation: start with ``sum`` and set
    ``loss.negatives = "hardest"`` later.

    Across ranks: features are gathered, with gradient; a rank computes its b rows and b columns
    against all B. Exact for uneven local batches.

    Source: Faghri et al. 2018, arXiv:1707.05612; Schroff et al. 2015, arXiv:1503.03832.

    Args:
        margin: m, >= 0, on cosine similarity.
        negatives: ``"sum"`` (all), ``"hardest"`` (the most similar one of each anchor) or
            ``"semi_hard"`` (all that are less similar than the positive but violate the margin).
        reduction: ``"sum"`` or ``"mean"`` over the batch.
        normalize: Whether the loss normalises the features.

    Raises:
        ValueError: If an argument is out of range.
    """

    symmetric = True

    def __init__(
        self,
        *,
        margin: float = 0.2,
        negatives: str = "sum",
        reduction: str = "sum",
        normalize: bool = True,
    ) -> None:
        super().__init__(temperature=1.0, normalize=normalize)
        check_at_least("margin", margin, 0)
        check_choice("reduction", reduction, ("sum", "mean"))
        self.margin = margin
        self.reduction = reduction
        self.negatives = negatives

    @property
    def negatives(self) -> str:
        """The negatives that count: "sum", "hardest" or "semi_hard"; may be set at any time."""
        return self._negatives

    @negatives.setter
    def negatives(self, negatives: str) -> None:
        """Set the negatives that count."""
        check_choice("negatives", negatives, tuple(_SELECT))
        self._negatives = negatives
        self._choice = HardNegatives(select=_SELECT[negatives])

    def objective(self, pairs: Pairs) -> dict[str, Tensor]:
        """Return {"contrastive": the loss}."""
        batch = pairs.batch
        negatives = pair_positives(batch, pairs.groups, pairs.first.device).negatives()
        positive = (pairs.first * pairs.second).sum(1)

        def direction(similarity: Tensor) -> Tensor:
            chosen = self._choice.choose(similarity, negatives, positive, self.margin)
            return hinge(positive, similarity, chosen, self.margin).sum()

        rows = pairs.first @ batch.gather(pairs.second).T
        alone = batch.world_size == 1
        columns = rows.T if alone else pairs.second @ batch.gather(pairs.first).T
        mean = batch.mean(direction(rows) + direction(columns))
        return {"contrastive": mean * batch.total if self.reduction == "sum" else mean}
