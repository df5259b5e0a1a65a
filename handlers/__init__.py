"""What happens around the step, one concern a file."""

from diptych.handlers.balancing import ModalityBalancing
from diptych.handlers.checkpoint_manager import CheckpointManager
from diptych.handlers.defaults import default_handlers
from diptych.handlers.early_stopping import EarlyStopping
from diptych.handlers.evaluation import Evaluation
from diptych.handlers.gradient_diagnostics import GradientDiagnostics
from diptych.handlers.gradients import GradientClipping
from diptych.handlers.jsonl import JsonLines, read_records
from diptych.handlers.profiling import Throughput
from diptych.handlers.progress import ProgressBar
from diptych.handlers.retrieval import RetrievalMetrics, RetrievalRecall
from diptych.handlers.run_directory import RunRecord, latest_run, new_run
from diptych.handlers.schedules import LearningRate
from diptych.handlers.tensorboard import TensorBoard

__all__ = [
    "CheckpointManager",
    "EarlyStopping",
    "Evaluation",
    "GradientClipping",
    "GradientDiagnostics",
    "JsonLines",
    "LearningRate",
    "ModalityBalancing",
    "ProgressBar",
    "RetrievalMetrics",
    "RetrievalRecall",
    "RunRecord",
    "TensorBoard",
    "Throughput",
    "default_handlers",
    "latest_run",
    "new_run",
    "read_records",
]
