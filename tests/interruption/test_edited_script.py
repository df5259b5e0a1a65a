"""A script, an interruption and an edit: an equal run, an edit that applies, or a refusal."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ignite.engine import Events
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from diptych.engine import (
    CheckpointError,
    ResumeError,
    RunEvents,
    SeededLoader,
    Trainer,
    tasks,
)
from diptych.handlers import CheckpointManager, GradientClipping, LearningRate
from diptych.losses import CrossEntropyLoss

EPOCH, EPOCHS = 4, 3


@attrs.frozen
class Script:
    """A training script: everything that a user may write otherwise the next time."""

    norm: bool = False
    dropout: float = 0.0
    width: int = 8
    adam: bool = False
    rate: float = 0.1
    weight_decay: float = 0.0
    schedule: str = "none"
    clip: float | None = None
    freezes: bool = False
    frozen: bool = False
    batch_size: int = 8
    order: int = 0

    def build(self, directory: Path | None, changes: Any = "apply") -> Trainer:
        torch.manual_seed(1)
        norm = nn.BatchNorm1d(self.width) if self.norm else nn.Identity()
        model = nn.Sequential(
            nn.Linear(6, self.width), norm, nn.Dropout(self.dropout), nn.Linear(self.width, 3)
        )
        model[0].bias.requires_grad_(not self.frozen)
        kind = torch.optim.AdamW if self.adam else torch.optim.SGD
        optimizer = kind(model.parameters(), lr=self.rate, weight_decay=self.weight_decay)
        trainer = Trainer(
            model, CrossEntropyLoss(), optimizer, task=tasks.classification, seed=0, log_every=3
        )
        if self.schedule == "cosine":
            trainer.attach(LearningRate(warmup=2))
        elif self.schedule == "steps":
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            trainer.add_event_handler(Events.EPOCH_COMPLETED, scheduler.step)
        elif self.schedule == "function":
            trainer.add_event_handler(Events.EPOCH_STARTED, halve)
        if self.clip is not None:
            trainer.attach(GradientClipping(max_norm=self.clip))
        if self.freezes:
            trainer.add_event_handler(Events.EPOCH_STARTED(once=2), freeze)
        if directory is not None:
            trainer.attach(CheckpointManager(directory, every=1, keep=1, changes=changes))
        return trainer

    def loader(self) -> SeededLoader:
        generator = torch.Generator().manual_seed(5)
        inputs = torch.randn(32, 6, generator=generator)
        targets = torch.randint(3, (32,), generator=generator)
        return SeededLoader(TensorDataset(inputs, targets), self.batch_size, seed=self.order)


def halve(trainer: Trainer) -> None:
    for group in trainer.optimizer.param_groups:
        group["lr"] *= 0.5


def freeze(trainer: Trainer) -> None:
    trainer.model[0].weight.requires_grad_(False)
    trainer.model[1].eval()


class Killed(BaseException):
    """The end of the process."""


def set_rate(trainer: Trainer, before: Script, now: Script) -> None:
    for group in trainer.optimizer.param_groups:
        group["lr"] *= now.rate / before.rate
        if "initial_lr" in group:
            group["initial_lr"] = now.rate
    for listener in trainer.listeners:
        if hasattr(listener.owner, "base_lrs"):
            listener.owner.base_lrs = [now.rate]


def set_decay(trainer: Trainer, _: Script, now: Script) -> None:
    trainer.optimizer.param_groups[0]["weight_decay"] = now.weight_decay


def set_clip(trainer: Trainer, _: Script, now: Script) -> None:
    trainer.handlers_of(GradientClipping)[0].max_norm = now.clip


def set_dropout(trainer: Trainer, _: Script, now: Script) -> None:
    trainer.model[2].p = now.dropout


def set_frozen(trainer: Trainer, _: Script, now: Script) -> None:
    trainer.model[0].bias.requires_grad_(not now.frozen)


Edit = tuple[dict[str, Any], str, Callable[[Trainer, Script, Script], None] | None]
"""What is edited, what the log or error names, and the same change made by hand in a process that
is not interrupted; None if it cannot be made."""

EDITS: list[Edit] = [
    ({"rate": 0.025}, "lr", set_rate),
    ({"weight_decay": 0.3}, "weight_decay", set_decay),
    ({"clip": 0.01}, "GradientClipping.max_norm", set_clip),
    ({"dropout": 0.5}, "modules.model.2.p", set_dropout),
    ({"frozen": True}, "requires_grad of 0.bias", set_frozen),
    ({"width": 9}, "model must match the checkpoint", None),
    ({"adam": True}, "optimizer must be the checkpoint's SGD", None),
    ({"order": 7}, "loader's seed must be 0", None),
    ({"batch_size": 16}, "loader's batch_size must be 8", None),
]

SCRIPTS = st.builds(
    Script,
    norm=st.booleans(),
    dropout=st.sampled_from([0.0, 0.2]),
    schedule=st.sampled_from(["none", "cosine", "steps", "function"]),
    clip=st.sampled_from([0.5, 2.0]),
    freezes=st.booleans(),
)
STOPS = st.integers(1, EPOCH * EPOCHS - 1)
ANYWHERE = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8
)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)


def killed_at(stop: int, script: Script, directory: Path) -> None:
    """Run a script until its process is killed."""
    trainer = script.build(directory)

    @trainer.on(RunEvents.SAFE_POINT(once=stop))
    def kill(_: Trainer) -> None:
        raise Killed

    with pytest.raises(Killed):
        trainer.run(script.loader(), max_epochs=EPOCHS)


def changed_by_hand(script: Script, now: Script, stop: int, edit: Any) -> Trainer:
    """Run a script without an interruption, and change it by hand at an iteration."""
    trainer = script.build(None)
    if edit is not None:
        trainer.add_event_handler(RunEvents.SAFE_POINT(once=stop), edit, script, now)
    trainer.run(script.loader(), max_epochs=EPOCHS)
    return trainer


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the lines about what differs; others are about this run alone."""
    found = [r for r in caplog.records if r.levelno >= logging.WARNING]
    return [r.getMessage() for r in found if "engine.state" in r.name]


@ANYWHERE
@given(script=SCRIPTS, stop=STOPS, changes=st.sampled_from(["apply", "refuse"]))
def test_an_unedited_script_ends_as_if_nothing_had_happened(
    script: Script, stop: int, changes: str, caplog: pytest.LogCaptureFixture
):
    with tempfile.TemporaryDirectory() as folder:
        killed_at(stop, script, Path(folder))
        caplog.clear()
        trainer = script.build(Path(folder), changes)
        trainer.run(script.loader(), max_epochs=EPOCHS)
    assert not told(caplog)
    assert equal(weights(trainer), weights(changed_by_hand(script, script, stop, None)))


@ANYWHERE
@given(script=SCRIPTS, stop=STOPS, edit=st.sampled_from([e for e in EDITS if e[2] is not None]))
def test_an_edit_that_can_be_applied_is_logged_and_applies_from_there_on(
    script: Script, stop: int, edit: Edit, caplog: pytest.LogCaptureFixture
):
    changed, named, by_hand = edit
    now = attrs.evolve(script, **changed)
    with tempfile.TemporaryDirectory() as folder:
        killed_at(stop, script, Path(folder))
        caplog.clear()
        trainer = now.build(Path(folder))
        trainer.run(now.loader(), max_epochs=EPOCHS)
    (line,) = told(caplog)
    assert named in line
    assert line.endswith("(changed in the script).")
    expected = weights(changed_by_hand(script, now, stop, by_hand))
    torch.testing.assert_close(weights(trainer), expected, rtol=1e-5, atol=1e-6)


@ANYWHERE
@given(script=SCRIPTS, stop=STOPS, edit=st.sampled_from(EDITS))
def test_an_edit_that_is_refused_leaves_everything_as_it_was(script: Script, stop: int, edit: Edit):
    changed, named, by_hand = edit
    now = attrs.evolve(script, **changed)
    inside = stop % EPOCH != 0
    if by_hand is None and not inside and named.startswith("loader"):
        return  # between two epochs another order applies
    with tempfile.TemporaryDirectory() as folder:
        killed_at(stop, script, Path(folder))
        before = sorted(path.name for path in Path(folder).iterdir())
        trainer = now.build(Path(folder), "apply" if by_hand is None else "refuse")
        fresh = weights(trainer)
        with pytest.raises((CheckpointError, ResumeError), match=named):
            trainer.run(now.loader(), max_epochs=EPOCHS)
        assert equal(weights(trainer), fresh)
        assert trainer.state.iteration == 0
        assert sorted(path.name for path in Path(folder).iterdir()) == before
