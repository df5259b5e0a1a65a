from diptych.losses.base.contrastive import BaseContrastiveLoss as BaseContrastiveLoss
from diptych.losses.base.contrastive import Pairs as Pairs
from diptych.losses.base.hard_negatives import HardNegatives as HardNegatives
from diptych.losses.base.positives import Positives as Positives
from diptych.losses.base.projection import Projection as Projection
from diptych.losses.base.queue import Queue as Queue
from diptych.losses.base.shared_scale import share_logit_scale as share_logit_scale
from diptych.losses.base.supervised import BaseSupervisedLoss as BaseSupervisedLoss
from diptych.losses.base.temperature import Temperature as Temperature
from diptych.losses.combine.hybrid import HybridLoss as HybridLoss
from diptych.losses.combine.matryoshka import MatryoshkaLoss as MatryoshkaLoss
from diptych.losses.combine.one_of import OneOf as OneOf
from diptych.losses.combine.uncertainty import UncertaintyWeighted as UncertaintyWeighted
from diptych.losses.combine.weighted_sum import WeightedSum as WeightedSum
from diptych.losses.contrastive.barlow_twins import BarlowTwinsLoss as BarlowTwinsLoss
from diptych.losses.contrastive.clip import CLIPLoss as CLIPLoss
from diptych.losses.contrastive.decorrelation import DecorrelationLoss as DecorrelationLoss
from diptych.losses.contrastive.decoupled import (
    DecoupledContrastiveLoss as DecoupledContrastiveLoss,
)
from diptych.losses.contrastive.hard_negative import HardNegativeLoss as HardNegativeLoss
from diptych.losses.contrastive.info_nce import InfoNCELoss as InfoNCELoss
from diptych.losses.contrastive.moco import MoCoLoss as MoCoLoss
from diptych.losses.contrastive.negative_cosine import NegativeCosineLoss as NegativeCosineLoss
from diptych.losses.contrastive.siglip import SigLIPLoss as SigLIPLoss
from diptych.losses.contrastive.simclr import NTXentLoss as NTXentLoss
from diptych.losses.contrastive.triplet import TripletLoss as TripletLoss
from diptych.losses.contrastive.vicreg import VICRegLoss as VICRegLoss
from diptych.losses.distillation.clip_distillation import (
    CLIPDistillationLoss as CLIPDistillationLoss,
)
from diptych.losses.distillation.gist import GISTLoss as GISTLoss
from diptych.losses.distillation.margin_mse import MarginMSELoss as MarginMSELoss
from diptych.losses.multimodal.captioning import CaptioningLoss as CaptioningLoss
from diptych.losses.multimodal.consistency import ConsistencyLoss as ConsistencyLoss
from diptych.losses.multimodal.cross_modal import CrossModalLoss as CrossModalLoss
from diptych.losses.multimodal.fusion import FusionHead as FusionHead
from diptych.losses.multimodal.fusion import ImageTextMatchingLoss as ImageTextMatchingLoss
from diptych.losses.registry import UnknownLossError as UnknownLossError
from diptych.losses.registry import available_losses as available_losses
from diptych.losses.registry import get_loss as get_loss
from diptych.losses.registry import get_loss_class as get_loss_class
from diptych.losses.registry import register_loss as register_loss
from diptych.losses.self_supervised.dino import DINOLoss as DINOLoss
from diptych.losses.self_supervised.koleo import KoLeoLoss as KoLeoLoss
from diptych.losses.self_supervised.sigreg import SIGRegLoss as SIGRegLoss
from diptych.losses.supervised.cross_entropy import CrossEntropyLoss as CrossEntropyLoss
from diptych.losses.supervised.supervised_contrastive import (
    SupervisedContrastiveLoss as SupervisedContrastiveLoss,
)
