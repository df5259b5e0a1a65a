"""Building blocks of losses.

- `loss.Loss`: the members that a trainer reads, with defaults. `contrastive.BaseContrastiveLoss`
  and `supervised.BaseSupervisedLoss`: bases of the losses on pairs and of the means over samples.
- `objectives`: `masked_info_nce`, `sigmoid`, `hinge`, `off_diagonal` on matrices; `contrast` and
  `sigmoid_contrast` on features, whole or in tiles.
- Parts of a loss: `Temperature`, `Projection`, `Queue`, `HardNegatives`.
- `positives`: matching pairs. `gather`: the batch of all ranks. `validation`: checks of inputs.
"""
