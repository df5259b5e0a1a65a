"""What happens around the step, one concern a file."""

from diptych.handlers.averaging import WeightAverage
from diptych.handlers.balancing import ModalityBalancing
from diptych.handlers.cards import RunCard
from diptych.handlers.checkpoint_manager import CheckpointManager
from diptych.handlers.curriculum import Curriculum
from diptych.handlers.defaults import default_handlers
from diptych.handlers.early_stopping import EarlyStopping
from diptych.handlers.evaluation import Evaluation
from diptych.handlers.filters import FirstLayerFilters
from diptych.handlers.gallery import RetrievalGallery
from diptych.handlers.gradient_diagnostics import GradientDiagnostics
from diptych.handlers.gradients import GradientClipping
from diptych.handlers.guard import FaultError, LossGuard
from diptych.handlers.health import RepresentationHealth
from diptych.handlers.health_rules import RULES, Finding, History, Rule
from diptych.handlers.histograms import Histograms
from diptych.handlers.history_plots import HistoryPlots
from diptych.handlers.in_batch_accuracy import InBatchAccuracy
from diptych.handlers.jsonl import JsonLines, read_records
from diptych.handlers.learning_rate_finder import LearningRateCurve, find_learning_rate
from diptych.handlers.momentum_encoder import MomentumEncoder
from diptych.handlers.pair_samples import PairSamples
from diptych.handlers.parameter_groups import parameter_groups
from diptych.handlers.probes import KNNAccuracy, ZeroShotAccuracy
from diptych.handlers.probes_linear import LinearProbeAccuracy, OnlineLinearProbe
from diptych.handlers.profiling import Throughput
from diptych.handlers.progress import ProgressBar
from diptych.handlers.projector import EmbeddingProjector
from diptych.handlers.retrieval import RetrievalMetrics, RetrievalRecall
from diptych.handlers.run_directory import RunRecord, latest_run, new_run
from diptych.handlers.schedules import LearningRate
from diptych.handlers.stage import Stage
from diptych.handlers.stages import StagePlan
from diptych.handlers.tensorboard import TensorBoard
from diptych.handlers.to_logger import ToLogger
from diptych.handlers.traces import Profile
from diptych.handlers.trackers import ClearML, MLflow, WandB

__all__ = [
    "RULES",
    "CheckpointManager",
    "ClearML",
    "Curriculum",
    "EarlyStopping",
    "EmbeddingProjector",
    "Evaluation",
    "FaultError",
    "Finding",
    "FirstLayerFilters",
    "GradientClipping",
    "GradientDiagnostics",
    "Histograms",
    "History",
    "HistoryPlots",
    "InBatchAccuracy",
    "JsonLines",
    "KNNAccuracy",
    "LearningRate",
    "LearningRateCurve",
    "LinearProbeAccuracy",
    "LossGuard",
    "MLflow",
    "ModalityBalancing",
    "MomentumEncoder",
    "OnlineLinearProbe",
    "PairSamples",
    "Profile",
    "ProgressBar",
    "RepresentationHealth",
    "RetrievalGallery",
    "RetrievalMetrics",
    "RetrievalRecall",
    "Rule",
    "RunCard",
    "RunRecord",
    "Stage",
    "StagePlan",
    "TensorBoard",
    "Throughput",
    "ToLogger",
    "WandB",
    "WeightAverage",
    "ZeroShotAccuracy",
    "default_handlers",
    "find_learning_rate",
    "latest_run",
    "new_run",
    "parameter_groups",
    "read_records",
]
