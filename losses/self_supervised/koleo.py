"""KoLeoLoss: features spread over the sphere, each away from its nearest neighbour."""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.losses.base.gather import GlobalBatch
from diptych.losses.base.normalization import normalize
from diptych.losses.base.views import ViewsLoss
from diptych.losses.registry import register_loss

EPSILON = 1e-8


@register_loss("koleo")
class KoLeoLoss(ViewsLoss):
    """Kozachenko-Leonenko estimator of the entropy, which spreads features over the sphere.

    -mean_i log(min_{j != i} |z_i - z_j| + 1e-8) over unit features z, for each view alone; the mean
    over views. The choice of the neighbour carries no gradient, the distance to it does; exact
    duplicates have a finite value and no gradient. It is >= -ln 2 and can be negative. DINOv2 adds
    it to `DINOLoss` with a weight of 0.1, on the features of the large crops below the head: use
    `WeightedSum`. `groups` are accepted and have no effect.

    Across ranks: features are gathered, with gradient, and neighbours are those of the global
    batch. (DINOv2 searches each rank's batch alone, so that its value depends on the number of
    ranks.) Memory is V x b x B. Exact for uneven local batches.

    Source: Sablayrolles et al. 2018, arXiv:1806.03198; Oquab et al. 2023, arXiv:2304.07193.

    Raises:
        ValueError: If the global batch is a single sample, which has no neighbour.
    """

    symmetric = True
    minimum_batch = 2
    can_be_negative = True

    def objective(self, views: Tensor, batch: GlobalBatch) -> dict[str, Tensor]:
        """Return {"koleo": the loss}."""
        own = normalize(views)
        everyone = batch.gather(own.transpose(0, 1)).transpose(0, 1)
        with torch.no_grad():
            cosine = own @ everyone.transpose(1, 2)
            itself = batch.positions(views.device).expand(len(views), -1)[..., None]
            nearest = cosine.scatter_(2, itself, -torch.inf).argmax(2)
        neighbours = everyone.gather(1, nearest[..., None].expand_as(own))
        distances = torch.linalg.vector_norm(own - neighbours, dim=2)
        return {"koleo": -batch.mean((distances + EPSILON).log().mean(0))}
