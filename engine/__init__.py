"""An Ignite engine and the one step that it runs."""

from diptych.engine import tasks
from diptych.engine.certify import certify
from diptych.engine.data import in_groups, of_this_rank
from diptych.engine.errors import BatchError, CheckpointError, LostRankError, ResumeError
from diptych.engine.evaluator import Evaluator
from diptych.engine.events import EvaluationEvents, MetricsEvents, RunEvents, StepEvents
from diptych.engine.metrics_collector import MetricsCollector
from diptych.engine.process_group import process_group
from diptych.engine.seeded_loader import SeededLoader
from diptych.engine.settings import TrainerSettings
from diptych.engine.step import StepOutput, TrainStep
from diptych.engine.trainer import Trainer
from diptych.engine.transform import OnKeys

__all__ = [
    "BatchError",
    "CheckpointError",
    "EvaluationEvents",
    "Evaluator",
    "LostRankError",
    "MetricsCollector",
    "MetricsEvents",
    "OnKeys",
    "ResumeError",
    "RunEvents",
    "SeededLoader",
    "StepEvents",
    "StepOutput",
    "TrainStep",
    "Trainer",
    "TrainerSettings",
    "certify",
    "in_groups",
    "of_this_rank",
    "process_group",
    "tasks",
]
