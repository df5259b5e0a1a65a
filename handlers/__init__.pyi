from diptych.engine.handler import Finding as Finding
from diptych.handlers.checkpointing.checkpoint_manager import CheckpointManager as CheckpointManager
from diptych.handlers.checkpointing.warm_start import LoadedWeights as LoadedWeights
from diptych.handlers.checkpointing.warm_start import load_weights as load_weights
from diptych.handlers.defaults import default_handlers as default_handlers
from diptych.handlers.evaluation.early_stopping import EarlyStopping as EarlyStopping
from diptych.handlers.evaluation.evaluation import Evaluation as Evaluation
from diptych.handlers.evaluation.label_accuracy import (
    ClassificationAccuracy as ClassificationAccuracy,
)
from diptych.handlers.evaluation.linear_probes import (
    LinearProbeAccuracy as LinearProbeAccuracy,
)
from diptych.handlers.evaluation.linear_probes import (
    OnlineLinearProbe as OnlineLinearProbe,
)
from diptych.handlers.evaluation.probes import (
    KNNAccuracy as KNNAccuracy,
)
from diptych.handlers.evaluation.probes import (
    ZeroShotAccuracy as ZeroShotAccuracy,
)
from diptych.handlers.evaluation.retrieval import (
    RetrievalMetrics as RetrievalMetrics,
)
from diptych.handlers.evaluation.retrieval import (
    RetrievalRecall as RetrievalRecall,
)
from diptych.handlers.evaluation.retrieval_measures import (
    RetrievalNDCG as RetrievalNDCG,
)
from diptych.handlers.evaluation.retrieval_measures import (
    RetrievalPrecision as RetrievalPrecision,
)
from diptych.handlers.evaluation.retrieval_measures import (
    RetrievalRPrecision as RetrievalRPrecision,
)
from diptych.handlers.health.in_batch_accuracy import InBatchAccuracy as InBatchAccuracy
from diptych.handlers.health.representation_health import (
    RepresentationHealth as RepresentationHealth,
)
from diptych.handlers.health.rules import (
    RULES as RULES,
)
from diptych.handlers.health.rules import (
    History as History,
)
from diptych.handlers.health.rules import (
    Rule as Rule,
)
from diptych.handlers.loss_guard.guard import (
    FaultError as FaultError,
)
from diptych.handlers.loss_guard.guard import (
    LossGuard as LossGuard,
)
from diptych.handlers.optimization.gradient_clipping import GradientClipping as GradientClipping
from diptych.handlers.optimization.gradient_diagnostics import (
    GradientDiagnostics as GradientDiagnostics,
)
from diptych.handlers.optimization.hard_negative_mining import (
    HardNegativeMining as HardNegativeMining,
)
from diptych.handlers.optimization.learning_rate_finder import (
    LearningRateCurve as LearningRateCurve,
)
from diptych.handlers.optimization.learning_rate_finder import (
    find_learning_rate as find_learning_rate,
)
from diptych.handlers.optimization.modality_balancing import ModalityBalancing as ModalityBalancing
from diptych.handlers.optimization.momentum_encoder import MomentumEncoder as MomentumEncoder
from diptych.handlers.optimization.parameter_groups import parameter_groups as parameter_groups
from diptych.handlers.optimization.reduce_on_plateau import ReduceOnPlateau as ReduceOnPlateau
from diptych.handlers.optimization.schedules import LearningRate as LearningRate
from diptych.handlers.optimization.teacher import Teacher as Teacher
from diptych.handlers.optimization.weight_average import WeightAverage as WeightAverage
from diptych.handlers.output.records import read_records as read_records
from diptych.handlers.performance.profile import Profile as Profile
from diptych.handlers.performance.throughput import Throughput as Throughput
from diptych.handlers.pictures.filters import FirstLayerFilters as FirstLayerFilters
from diptych.handlers.pictures.gallery import RetrievalGallery as RetrievalGallery
from diptych.handlers.pictures.histograms import Histograms as Histograms
from diptych.handlers.pictures.pair_samples import PairSamples as PairSamples
from diptych.handlers.pictures.projector import EmbeddingProjector as EmbeddingProjector
from diptych.handlers.reports.history_plots import HistoryPlots as HistoryPlots
from diptych.handlers.run_directory import (
    RunDirectory as RunDirectory,
)
from diptych.handlers.run_directory import (
    latest_run as latest_run,
)
from diptych.handlers.run_directory import (
    new_run as new_run,
)
from diptych.handlers.sinks.jsonl import JsonLines as JsonLines
from diptych.handlers.sinks.progress_bar import ProgressBar as ProgressBar
from diptych.handlers.sinks.run_card import RunCard as RunCard
from diptych.handlers.sinks.run_record import RunRecord as RunRecord
from diptych.handlers.sinks.sink import Sink as Sink
from diptych.handlers.sinks.tensorboard import TensorBoard as TensorBoard
from diptych.handlers.sinks.to_logger import ToLogger as ToLogger
from diptych.handlers.sinks.trackers import (
    ClearML as ClearML,
)
from diptych.handlers.sinks.trackers import (
    MLflow as MLflow,
)
from diptych.handlers.sinks.trackers import (
    WandB as WandB,
)
from diptych.handlers.stages.curriculum import Curriculum as Curriculum
from diptych.handlers.stages.stage import Stage as Stage
from diptych.handlers.stages.stage_plan import StagePlan as StagePlan
