"""Training from settings: data, towers, loss and handlers, checked before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch
from ignite.metrics import Accuracy
from torch import nn

from diptych.engine import tasks
from diptych.engine.distributed.agreement import on_rank_zero
from diptych.engine.distributed.collectives import rank
from diptych.engine.step.loss_contract import loss_terms
from diptych.engine.trainer import Trainer
from diptych.handlers.defaults import default_handlers
from diptych.handlers.evaluation.evaluation import Evaluation
from diptych.handlers.evaluation.retrieval import RetrievalRecall
from diptych.handlers.files import make_folder, write_atomically
from diptych.handlers.optimization.gradient_clipping import GradientClipping
from diptych.handlers.optimization.parameter_groups import parameter_groups
from diptych.handlers.optimization.schedules import LearningRate
from diptych.handlers.run_directory import RunDirectory, new_run
from diptych.handlers.sinks.tensorboard import tensorboard_command
from diptych.losses.base.contrastive import BaseContrastiveLoss
from diptych.losses.base.shared_scale import share_logit_scale
from diptych.losses.registry import get_loss
from diptych.recipes.data.rows import DataError
from diptych.recipes.settings import Settings, TaskName, write_settings
from diptych.recipes.towers.models import (
    OneTower,
    TwoTowers,
    add_lora,
    checkpoint_gradients,
    lock,
    projector,
)
from diptych.recipes.towers.parts import ImageTower, TextTower, TowerOptions, Towers
from diptych.recipes.towers.registry import OWN, SMALL, build_towers
from diptych.recipes.training_data import read_data

Factory = Callable[[Settings], Towers]
"""A user's own code that builds towers."""

CLASSES = "classes.txt"
DATA = "data.txt"
TOWERS = "towers"
"""The files of the class names and of the data's summary, and the folder of the towers'
descriptions, in a run's directory."""
VIEWS = 128
"""The features of two views that the loss compares."""

TASKS: dict[TaskName, Any] = {
    "image_text": tasks.image_text,
    "two_views": tasks.two_views,
    "classification": tasks.classification,
}


@attrs.frozen(kw_only=True, eq=False)
class Training:
    """A training that is ready to run.

    Attributes:
        settings: what it was built from.
        trainer: the trainer, with the handlers that change the result and the evaluation.
        loader: the training batches.
        towers: the towers.
        classes: the names of the classes, for a classification.
        best: the metric that ranks the checkpoints; None: there is no part to evaluate on.
        summary: a table of the data.
    """

    settings: Settings
    trainer: Trainer
    loader: Any
    towers: Towers
    classes: tuple[str, ...]
    best: str | None
    summary: str

    def write(self, run_dir: Path) -> None:
        """Write what repeats the run and what loads its model into the run's directory."""
        make_folder(run_dir)
        write_settings(self.settings, run_dir)
        write_atomically(run_dir / DATA, f"{self.summary}\n")
        self.towers.save(run_dir / TOWERS)
        if self.classes:
            write_atomically(run_dir / CLASSES, "".join(f"{name}\n" for name in self.classes))


def train(
    settings: Settings,
    run_dir: Path | str | None = None,
    *,
    factory: Factory | None = None,
    resume: bool = False,
    dry_run: bool = False,
    overfit: int = 0,
) -> Trainer:
    """Train on a user's own data, and return the trainer.

    The data and the settings are checked first: a row that cannot be used, an unknown tower or a
    setting out of range is an error before a file is written.

    Args:
        settings: the settings.
        run_dir: the run's directory; None: a new one below `runs/`.
        factory: own code that builds the towers from the settings, instead of their names.
        resume: whether the directory is that of a run to continue.
        dry_run: whether to do everything once, and leave nothing behind.
        overfit: batches to train on alone, to see whether the loss falls; nothing is kept.

    Raises:
        DataError: if the data cannot be used, or the directory is that of another run.
        TowerError, ValueError: if a setting cannot be used.
        ImportError: if an extra is missing.
    """
    if run_dir is not None and not resume and any(RunDirectory(run_dir).checkpoints.glob("*.pt")):
        raise DataError(
            f"--run-dir must be a new directory, got {run_dir}, which has checkpoints. Continue "
            "the run with --resume, or give another directory."
        )
    training = build_training(settings, factory=factory)
    trainer, loader = training.trainer, training.loader
    _say(training.summary)
    if overfit:
        _say(str(trainer.overfit(loader, batches=overfit)))
        return trainer
    where = Path(run_dir or ("runs/own" if dry_run else new_run("runs", "own")))
    trainer.attach(*default_handlers(where, best=training.best))
    if dry_run:
        trainer.dry_run(loader)
        return trainer
    on_rank_zero(lambda: training.write(where))
    trainer.run(loader, max_epochs=settings.epochs)
    _say(tensorboard_command(where))
    return trainer


def build_training(settings: Settings, *, factory: Factory | None = None) -> Training:
    """Read the data, build the towers, and return a training; nothing is written.

    Raises:
        DataError, TowerError, ValueError, ImportError: as for `train`.
    """
    if factory is not None:
        settings = attrs.evolve(settings, image_tower=OWN, text_tower=OWN)
    data = read_data(settings)
    torch.manual_seed(settings.seed)
    towers = towers_of(settings, factory=factory)
    model, loss = build_model(settings, towers, classes=len(data.classes))
    _check_loss(settings, loss)
    loader = data.training_loader(towers)
    trainer = Trainer(
        model,
        loss,
        _optimizer(settings, model, loss),
        task=TASKS[settings.task],
        precision=settings.precision,
        microbatch_size=settings.microbatch_size,
        seed=settings.seed,
        log_every=min(settings.log_every, len(loader)),
    )
    updates = len(loader) * settings.epochs
    trainer.attach(
        # With `total`, a run that resumes with more epochs does not stay at the final rate, 0.
        LearningRate(warmup=round(settings.warmup * updates), decay="cosine", total=updates),
        GradientClipping(max_norm=1.0),
    )
    held_out, best = data.evaluation_loader(towers), None
    if held_out is not None:
        is_classification = settings.task == "classification"
        metric = Accuracy() if is_classification else RetrievalRecall(k=(1, 5, 10))
        trainer.attach(Evaluation(held_out, metrics=[metric]))
        best = "val/accuracy" if is_classification else "val/recall@1"
    return Training(
        settings=settings,
        trainer=trainer,
        loader=loader,
        towers=towers,
        classes=data.classes,
        best=best,
        summary=data.summary,
    )


def _check_loss(settings: Settings, loss: nn.Module) -> None:
    """Check that a loss takes the outputs of the task, by a call with two samples.

    Raises:
        ValueError: if it does not.
    """
    features, numbers = torch.ones(2, 4), torch.arange(2)
    outputs = {
        "image_text": {"image_features": features, "text_features": features, "groups": numbers},
        "two_views": {"first_features": features, "second_features": features},
        "classification": {"logits": features, "labels": numbers},
    }[settings.task]
    try:
        with torch.no_grad():
            loss_terms(loss.eval(), outputs)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"loss must be one for the task {settings.task}, got {settings.loss_name!r}: {error}"
        ) from error
    loss.train()


def towers_of(
    settings: Settings, *, factory: Factory | None = None, saved: Path | None = None
) -> Towers:
    """Return the towers of settings.

    Args:
        settings: of a new run, or of a saved one.
        factory: own code that builds the towers.
        saved: the folder of the towers' descriptions in a saved run: weights come from its
            checkpoint, and nothing but the folder is read.

    Raises:
        DataError: if the saved run's towers are of own code, and there is no factory.
    """
    if factory is not None:
        return factory(settings)
    if settings.image_tower == OWN:
        raise DataError(
            "factory must be given for a run whose towers are of own code, got none. Pass the "
            "function that built them (--factory module:function)."
        )
    options = TowerOptions(
        image_size=settings.image_size,
        pretrained=None if saved else settings.pretrained,
        folder=saved,
    )
    text = settings.text_tower if settings.task == "image_text" else SMALL
    return build_towers(settings.image_tower, text, options)


def build_model(settings: Settings, towers: Towers, *, classes: int) -> tuple[nn.Module, nn.Module]:
    """Return the model and the loss of settings.

    A learned temperature of the loss is a parameter of the model, which starts from the towers'
    own: weights that are saved, loaded or exported include it.

    Args:
        settings: the settings.
        towers: the towers.
        classes: the number of classes, for a classification.
    """
    _adapt(settings, towers.image, locked=settings.lock_image)
    if towers.text is not None:
        _adapt(settings, towers.text, locked=settings.lock_text)
    loss = get_loss(settings.loss_name)
    if settings.task == "two_views":
        head = projector(towers.image.width, settings.dim or VIEWS)
        return OneTower(towers.image, head), loss
    if settings.task == "classification":
        return OneTower(towers.image, nn.Linear(towers.image.width, classes)), loss
    model = TwoTowers(towers, settings.dim)
    if isinstance(loss, BaseContrastiveLoss) and loss.temperature.learned:
        _share_scale(model, loss)
    return model, loss


def _adapt(settings: Settings, tower: ImageTower | TextTower, *, locked: bool) -> None:
    """Freeze or adapt a tower as the settings say."""
    if locked:
        lock(tower)
    elif settings.lora:
        add_lora(tower, settings.lora)
    if settings.gradient_checkpointing:
        checkpoint_gradients(tower)


def _share_scale(model: TwoTowers, loss: BaseContrastiveLoss) -> None:
    """Make the loss train the model's own scale and bias; one that it lacks becomes the model's."""
    if model.logit_scale is None:
        model.logit_scale = loss.temperature.logit_scale
    bias = getattr(loss, "bias", None)
    if not isinstance(bias, nn.Parameter):
        model.logit_bias = None  # the loss has none: it would stay as it is
    elif model.logit_bias is None:
        model.logit_bias = bias
    share_logit_scale(loss, model)


def _optimizer(settings: Settings, model: nn.Module, loss: nn.Module) -> torch.optim.Optimizer:
    groups = parameter_groups(model, settings.weight_decay, lr=settings.learning_rate, loss=loss)
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def _say(text: str) -> None:
    if rank() == 0:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()  # a file would get it after the lines of the run
