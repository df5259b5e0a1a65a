from diptych.engine import tasks as tasks
from diptych.engine.certificate.certificate import certify as certify
from diptych.engine.data.batches import (
    in_groups as in_groups,
    of_this_rank as of_this_rank,
)
from diptych.engine.data.seeded_loader import SeededLoader as SeededLoader
from diptych.engine.data.transform import OnKeys as OnKeys
from diptych.engine.distributed.process_group import process_group as process_group
from diptych.engine.errors import (
    BatchError as BatchError,
    CheckpointError as CheckpointError,
    LostRankError as LostRankError,
    ResumeError as ResumeError,
)
from diptych.engine.evaluator import Evaluator as Evaluator
from diptych.engine.events import (
    EvaluationEvents as EvaluationEvents,
    MetricsEvents as MetricsEvents,
    RunEvents as RunEvents,
    StepEvents as StepEvents,
)
from diptych.engine.metrics.metrics_collector import MetricsCollector as MetricsCollector
from diptych.engine.settings import TrainerSettings as TrainerSettings
from diptych.engine.step import (
    StepOutput as StepOutput,
    TrainStep as TrainStep,
)
from diptych.engine.trainer import Trainer as Trainer
