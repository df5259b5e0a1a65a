"""Teacher: a frozen model whose outputs are added to the student's, for distillation."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from ignite.engine import Events
from torch import Tensor, nn

from diptych._loss_arguments import TEACHER
from diptych.engine.errors import BatchError
from diptych.engine.handler import Handler
from diptych.engine.modules import parts_of, unwrapped
from diptych.engine.predictions import prediction_of
from diptych.engine.state.description import tensor_digest
from diptych.engine.tasks import Outputs, Task
from diptych.engine.trainer import Trainer

logger = logging.getLogger(__name__)

NAMES = ("teacher_first", "teacher_second")
"""The arguments of the losses on pairs that take a teacher's features."""


def _check_model(_: Any, __: attrs.Attribute[Any], model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def _check_names(_: Any, __: attrs.Attribute[Any], names: Sequence[str]) -> None:
    wrong = [name for name in names if not name.startswith(TEACHER)]
    if wrong or not names or len(set(names)) < len(names):
        raise ValueError(
            f"names must be different names that begin with {TEACHER!r}, which are the loss's "
            f"arguments, got {', '.join(map(repr, names)) or 'none'}"
        )


class TaughtTask:
    """A task and, beside its outputs, those of a teacher; `Teacher` makes it the trainer's task.

    Args:
        task: the student's task.
        teacher: the teacher's model, in eval mode.
        teacher_task: the teacher's task; None: the student's.
        names: names of the teacher's first outputs.
        teacher_weights: a digest of them, for the run's identity.

    Attributes:
        task: the student's task.
    """

    def __init__(
        self,
        task: Task,
        teacher: nn.Module,
        teacher_task: Task | None,
        names: tuple[str, ...],
        teacher_weights: str,
    ) -> None:
        self.task, self.teacher_task = task, teacher_task
        self.names, self.teacher_weights = names, teacher_weights
        self._teacher, self._parts = teacher, parts_of(teacher)

    def __call__(self, model: nn.Module, batch: Any, /) -> Outputs:
        """Return the outputs of the student, then those of the teacher."""
        outputs = self.task(model, batch)
        if any(part.training for part in self._parts):
            logger.warning(
                "The teacher was put into train mode. It is in eval mode again, without dropout."
            )
            self._teacher.eval()
        with torch.no_grad():
            taught = (self.teacher_task or self.task)(self._teacher, batch)
        values = [value for value in taught.values() if isinstance(value, Tensor)]
        if len(values) < len(self.names):
            raise BatchError(
                f"the teacher's task must return a tensor for each of {', '.join(self.names)}, got "
                f"{', '.join(taught) or 'nothing'}. Pass names=... to Teacher"
            )
        return {**outputs, **dict(zip(self.names, values, strict=False))}

    @property
    def prediction(self) -> Any:
        """The prediction of the student's task, for Ignite's metrics."""
        return prediction_of(self.task)

    def teaches(self, teacher: nn.Module) -> bool:
        """Return whether the outputs hold those of a teacher."""
        if self._teacher is teacher:
            return True
        return isinstance(self.task, TaughtTask) and self.task.teaches(teacher)


@attrs.define(eq=False)
class Teacher(Handler):
    """Adds the outputs of a frozen model to those of the trained one, for distillation.

    ```python
    trainer = Trainer(student, CLIPDistillationLoss(), optimizer, task=tasks.image_text)
    trainer.attach(Teacher(large_model))
    ```

    The teacher sees the batch that the student sees, in micro-batches and evaluations too, in eval
    mode and without a graph; if code puts it into train mode, its next use puts it back and logs
    that. Its first outputs are called `teacher_first` and `teacher_second`. The loss gets them by
    these names; a loss without such arguments does not get them. They are in `trainer.outputs`,
    where metrics find them. An `Evaluation` with a task of its own has no teacher.

    The teacher is moved to the trainer's device, and its parameters get `requires_grad=False`.
    Neither the optimizer nor a checkpoint holds it. A digest of its weights is part of the run's
    identity: a resumed run with another teacher, and ranks with different teachers, are reported.

    Event: `Events.ITERATION_STARTED`, to teach the task of a new stage too.
    Cost: a forward pass of the teacher for each forward pass of the student, of which micro-batches
        of a loss that couples samples need two; the modes of its parts are read before each. When
        attached, one read of its weights.

    Args:
        model: the teacher.
        task: the teacher's task. Default: the trainer's.
        names: names of the teacher's first outputs, the loss's arguments; they begin with
            "teacher_".
        in_checkpoint: whether checkpoints hold the teacher's weights, and a resumed run takes them
            from there. The weights that the script passes are then not compared.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: if a name is invalid; when attached, if the teacher shares a parameter with the
            trained model, loss or optimizer, or another teacher has one of the names.
        BatchError: while running, if the teacher's task returns too few outputs.
    """

    model: nn.Module = attrs.field(validator=_check_model)
    task: Task | None = attrs.field(default=None, kw_only=True)
    names: tuple[str, ...] = attrs.field(
        default=NAMES,
        converter=tuple,
        validator=_check_names,
        kw_only=True,
    )
    in_checkpoint: bool = attrs.field(default=False, kw_only=True)
    _weights: str = attrs.field(default="", init=False, repr=False)

    def attach(self, trainer: Trainer) -> None:
        """Add the teacher's outputs to those of the trainer's task."""
        self._check_apart(trainer)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.model.to(trainer.device).eval()
        self._weights = "in the checkpoint" if self.in_checkpoint else _digest(self.model)
        trainer.add_event_handler(Events.ITERATION_STARTED, self._teach)
        self._teach(trainer)

    @property
    def role(self) -> str:
        """The names of the outputs, unless they are the default ones."""
        return "" if self.names == NAMES else ", ".join(self.names)

    def state_dict(self) -> dict[str, Any]:
        """Return the teacher's weights if they belong in a checkpoint."""
        return {"model": self.model.state_dict()} if self.in_checkpoint else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the teacher's weights from a state that `state_dict` returned."""
        if self.in_checkpoint and "model" in state_dict:
            self.model.load_state_dict(state_dict["model"])

    def _teach(self, trainer: Trainer) -> None:
        """Wrap the trainer's task, which a stage may have replaced."""
        task = trainer.task
        if not (isinstance(task, TaughtTask) and task.teaches(self.model)):
            trainer.task = TaughtTask(task, self.model, self.task, self.names, self._weights)

    def _check_apart(self, trainer: Trainer) -> None:
        named = [name for other in trainer.handlers_of(Teacher) for name in other.names]
        if repeated := sorted({*named} & {*self.names}):
            raise ValueError(
                f"names must be different for each Teacher, got {', '.join(repeated)} twice"
            )
        held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        trained = {id(p) for p in (*trainer.model.parameters(), *trainer.loss.parameters(), *held)}
        if any(id(parameter) in trained for parameter in self.model.parameters()):
            raise ValueError(
                "model must share no parameter with the trained model, loss or optimizer, got a "
                "teacher that does. Make it with copy.deepcopy, and leave it out of the optimizer"
            )


def _digest(model: nn.Module) -> str:
    """Return a digest of a model's parameters and buffers, by name."""
    named = unwrapped(model).state_dict().items()
    parts = [f"{name} {tensor_digest(value)}" for name, value in named if isinstance(value, Tensor)]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
