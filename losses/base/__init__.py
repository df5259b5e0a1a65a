"""What losses are made of.

- `contrastive.BaseContrastiveLoss`, `supervised.BaseSupervisedLoss`: the two bases.
- `objectives`: `info_nce`, `sigmoid`, `hinge`, `off_diagonal` on matrices; `contrast`,
  `symmetric_contrast`, `sigmoid_contrast` on features, which may work in tiles.
- Parts that a loss holds: `Temperature`, `Projection`, `Queue`, `HardNegatives`.
- `Positives`: which pairs match. `gather`: the batch of all ranks. `validation`: what may enter.
"""
