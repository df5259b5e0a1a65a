"""What is minimised: one paper a file, each loss a statement about the global batch.

A loss is an ``nn.Module`` that returns a scalar; `terms(...)` returns the named, weighted parts
whose sum it is. Losses on pairs are called ``loss(first, second, groups=None)`` with [B, D]
features and optional integer group ids. In a process group they gather what they need by
themselves. Build one by class, ``CLIPLoss(temperature=0.07)``, or by name,
``get_loss("clip", temperature=0.07)``.

Adding a loss is one file in one of the folders: derive from `BaseContrastiveLoss` or
`BaseSupervisedLoss`, decorate with ``@register_loss("name")``. Every module in the folders is
imported, and so registered, with the package. `diptych.losses.contract.check_loss` says whether a
loss keeps what every loss promises.
"""

import importlib
import pkgutil

from diptych.losses.base.contrastive import BaseContrastiveLoss, Pairs
from diptych.losses.base.hard_negatives import HardNegatives
from diptych.losses.base.positives import Positives
from diptych.losses.base.projection import Projection
from diptych.losses.base.queue import Queue
from diptych.losses.base.shared_scale import share_logit_scale
from diptych.losses.base.supervised import BaseSupervisedLoss
from diptych.losses.base.temperature import Temperature
from diptych.losses.combine.hybrid import HybridLoss
from diptych.losses.combine.matryoshka import MatryoshkaLoss
from diptych.losses.combine.one_of import OneOf
from diptych.losses.combine.uncertainty import UncertaintyWeighted
from diptych.losses.combine.weighted_sum import WeightedSum
from diptych.losses.contrastive.barlow_twins import BarlowTwinsLoss
from diptych.losses.contrastive.clip import CLIPLoss
from diptych.losses.contrastive.decorrelation import DecorrelationLoss
from diptych.losses.contrastive.decoupled import DecoupledContrastiveLoss
from diptych.losses.contrastive.hard_negative import HardNegativeLoss
from diptych.losses.contrastive.moco import MoCoLoss
from diptych.losses.contrastive.negative_cosine import NegativeCosineLoss
from diptych.losses.contrastive.siglip import SigLIPLoss
from diptych.losses.contrastive.simclr import NTXentLoss
from diptych.losses.contrastive.triplet import TripletLoss
from diptych.losses.contrastive.vicreg import VICRegLoss
from diptych.losses.multimodal.captioning import CaptioningLoss
from diptych.losses.multimodal.consistency import ConsistencyLoss
from diptych.losses.multimodal.cross_modal import CrossModalLoss
from diptych.losses.multimodal.fusion import FusionHead, ImageTextMatchingLoss
from diptych.losses.registry import (
    UnknownLossError,
    available_losses,
    get_loss,
    get_loss_class,
    register_loss,
)
from diptych.losses.supervised.cross_entropy import CrossEntropyLoss
from diptych.losses.supervised.supervised_contrastive import SupervisedContrastiveLoss

for _module in pkgutil.walk_packages(__path__, prefix=f"{__name__}."):
    if _module.name.removeprefix(f"{__name__}.").startswith(
        ("combine.", "contrastive.", "multimodal.", "supervised.")
    ):
        importlib.import_module(_module.name)

__all__ = [
    "BarlowTwinsLoss",
    "BaseContrastiveLoss",
    "BaseSupervisedLoss",
    "CLIPLoss",
    "CaptioningLoss",
    "ConsistencyLoss",
    "CrossEntropyLoss",
    "CrossModalLoss",
    "DecorrelationLoss",
    "DecoupledContrastiveLoss",
    "FusionHead",
    "HardNegativeLoss",
    "HardNegatives",
    "HybridLoss",
    "ImageTextMatchingLoss",
    "MatryoshkaLoss",
    "MoCoLoss",
    "NTXentLoss",
    "NegativeCosineLoss",
    "OneOf",
    "Pairs",
    "Positives",
    "Projection",
    "Queue",
    "SigLIPLoss",
    "SupervisedContrastiveLoss",
    "Temperature",
    "TripletLoss",
    "UncertaintyWeighted",
    "UnknownLossError",
    "VICRegLoss",
    "WeightedSum",
    "available_losses",
    "get_loss",
    "get_loss_class",
    "register_loss",
    "share_logit_scale",
]
