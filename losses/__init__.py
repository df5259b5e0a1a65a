"""What is minimised: one paper a file, each loss a statement about the global batch.

A loss is an ``nn.Module`` that returns a scalar; `terms(...)` returns the named, weighted parts
whose sum it is. Losses on pairs are called ``loss(first, second, groups=None)`` with [B, D]
features and optional integer group ids. In a process group they gather what they need by
themselves. Build one by class, ``CLIPLoss(temperature=0.07)``, or by name,
``get_loss("clip", temperature=0.07)``.

Adding a loss is one file in one of the folders: derive from `BaseContrastiveLoss` or
`BaseSupervisedLoss`, decorate with ``@register_loss("name")``. The registry imports
every module of these folders when it is first asked for a name. `diptych.losses.contract.check_loss` says whether a
loss keeps what every loss promises.
"""

from diptych._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(__name__, __file__)
