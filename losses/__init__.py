"""Losses: one paper per file, each a function of the global batch.

A loss is an ``nn.Module`` that returns a scalar; `terms(...)` returns the named, weighted parts
whose sum it is. Losses on pairs are called ``loss(first, second, groups=None)`` with [B, D]
features and optional integer group ids. In a process group they gather the features they need.
Build a loss by class, ``CLIPLoss(temperature=0.07)``, or by name,
``get_loss("clip", temperature=0.07)``.

To add a loss, write one file in one of the folders: derive from `BaseContrastiveLoss` or
`BaseSupervisedLoss` and decorate with ``@register_loss("name")``. The registry imports every module
of these folders when a name is first looked up. `diptych.losses.contract.check_loss` checks the
contract that every loss keeps.

    loss = CLIPLoss(temperature=0.07)
    value = loss(image_features, text_features)
    value.backward()
"""

from diptych._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(__name__, __file__)
