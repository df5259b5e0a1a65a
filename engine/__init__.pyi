from diptych.engine import tasks as tasks
from diptych.engine.certificate.certificate import certify as certify
from diptych.engine.data.batches import of_this_rank as of_this_rank
from diptych.engine.data.grouped_loader import in_groups as in_groups
from diptych.engine.data.seeded_loader import SeededLoader as SeededLoader
from diptych.engine.data.transform import OnKeys as OnKeys
from diptych.engine.distributed.process_group import process_group as process_group
from diptych.engine.errors import (
    BatchError as BatchError,
)
from diptych.engine.errors import (
    CheckpointError as CheckpointError,
)
from diptych.engine.errors import (
    LostRankError as LostRankError,
)
from diptych.engine.errors import (
    ResumeError as ResumeError,
)
from diptych.engine.evaluator import Evaluator as Evaluator
from diptych.engine.events import (
    EvaluationEvents as EvaluationEvents,
)
from diptych.engine.events import (
    MetricsEvents as MetricsEvents,
)
from diptych.engine.events import (
    Outcome as Outcome,
)
from diptych.engine.events import (
    RunEvents as RunEvents,
)
from diptych.engine.events import (
    StepEvents as StepEvents,
)
from diptych.engine.handler import (
    Change as Change,
)
from diptych.engine.handler import (
    Finding as Finding,
)
from diptych.engine.handler import (
    Handler as Handler,
)
from diptych.engine.handler import (
    contract_of as contract_of,
)
from diptych.engine.metrics.metrics_collector import MetricsCollector as MetricsCollector
from diptych.engine.optimizers.composite_optimizer import (
    CompositeOptimizer as CompositeOptimizer,
)
from diptych.engine.settings import TrainerSettings as TrainerSettings
from diptych.engine.state.run_identity import RunIdentity as RunIdentity
from diptych.engine.step.train_step import (
    StepOutput as StepOutput,
)
from diptych.engine.step.train_step import (
    TrainStep as TrainStep,
)
from diptych.engine.trainer import Trainer as Trainer
from diptych.engine.trials.dry_run import DryRun as DryRun
from diptych.engine.trials.microbatch_size import (
    find_microbatch_size as find_microbatch_size,
)
from diptych.engine.trials.overfit import Overfit as Overfit
from diptych.engine.trials.trial import Trial as Trial
