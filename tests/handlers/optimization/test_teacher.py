"""Teacher: a student learns from a frozen model, in micro-batches, evaluations and resumed runs."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import Tensor, nn

from diptych.engine import BatchError, Trainer, certify, tasks
from diptych.handlers import CheckpointManager, Evaluation, Stage, StagePlan, Teacher
from diptych.losses import CLIPDistillationLoss, CLIPLoss, WeightedSum


class Towers(nn.Module):
    """Two towers; the dropout would show a teacher in training mode."""

    def __init__(self, dim: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Dropout(dropout), nn.Linear(4, dim))
        self.text = nn.Linear(4, dim)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)


def make_loader(batches: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(batches, 2, 6, 4, generator=generator)
    return [{"image": image, "text": text, "group": torch.arange(6)} for image, text in drawn]


def make_teacher(seed: int = 7) -> Towers:
    torch.manual_seed(seed)
    return Towers(dim=5, dropout=0.5)


def make_trainer(loss: nn.Module | None = None, **settings: Any) -> Trainer:
    torch.manual_seed(1)
    model, loss = Towers(), CLIPDistillationLoss() if loss is None else loss
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    arguments = {"task": tasks.image_text, "device": "cpu", "seed": 3, "log_every": 1, **settings}
    return Trainer(model, loss, optimizer, **arguments)


def weights_after(trainer: Trainer, **limits: Any) -> dict[str, Tensor]:
    trainer.run(make_loader(), **(limits or {"max_epochs": 2}))
    return copy.deepcopy(trainer.model.state_dict())


def test_the_loss_gets_the_teachers_features_in_eval_mode_and_without_a_graph():
    teacher, (batch, *_) = make_teacher(), make_loader()
    trainer = make_trainer().attach(Teacher(teacher))
    student = copy.deepcopy(trainer.model)
    trainer.run([batch], max_epochs=1)
    features = teacher.image[1](batch["image"]), teacher.text(batch["text"])
    for name, expected in zip(("teacher_first", "teacher_second"), features, strict=True):
        assert torch.equal(trainer.outputs[name], expected)
        assert not trainer.task(student, batch)[name].requires_grad
    expected = CLIPDistillationLoss()(*student(batch["image"], batch["text"]), *features)
    torch.testing.assert_close(trainer.state.output.loss, expected.detach())


def test_a_loss_without_a_teachers_arguments_does_not_get_its_outputs():
    alone = weights_after(make_trainer(CLIPLoss()))
    taught = weights_after(make_trainer(CLIPLoss()).attach(Teacher(make_teacher())))
    assert all(torch.equal(taught[name], value) for name, value in alone.items())


def test_a_weighted_sum_takes_the_outputs_by_their_positions():
    parts = {"clip": CLIPLoss(), "distillation": CLIPDistillationLoss()}
    loss = WeightedSum(losses=parts, inputs={"clip": (0, 1, 2), "distillation": (0, 1, 3, 4)})
    trainer = make_trainer(loss).attach(Teacher(make_teacher()))
    trainer.run(make_loader(), max_epochs=1)
    assert set(trainer.state.output.terms) == set(parts)


def test_a_teacher_never_changes_and_is_in_no_checkpoint_unless_asked(tmp_path: Path):
    sizes = []
    for asked in (False, True):
        teacher, manager = make_teacher(), CheckpointManager(tmp_path / str(asked))
        before = copy.deepcopy(teacher.state_dict())
        trainer = make_trainer().attach(Teacher(teacher, in_checkpoint=asked), manager)
        weights_after(trainer)
        assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
        assert not any(part.training for part in teacher.modules())
        assert all(torch.equal(teacher.state_dict()[name], before[name]) for name in before)
        content = torch.load(manager.get_latest_checkpoint(), weights_only=True)
        sizes.append(sum(t.shape == (5, 4) for t in _tensors(content)))
    assert sizes == [0, 2]
    another = make_teacher(seed=8)
    manager = CheckpointManager(tmp_path / "True", resume="auto")
    make_trainer().attach(Teacher(another, in_checkpoint=True), manager).run(
        make_loader(), max_epochs=3
    )
    assert all(torch.equal(another.state_dict()[name], before[name]) for name in before)


def _tensors(content: Any) -> list[Tensor]:
    if isinstance(content, dict):
        return [t for value in content.values() for t in _tensors(value)]
    if isinstance(content, (list, tuple)):
        return [t for value in content for t in _tensors(value)]
    return [content] if isinstance(content, Tensor) else []


def test_the_update_is_the_same_in_micro_batches():
    whole, pieces = (
        weights_after(make_trainer(microbatch_size=size).attach(Teacher(make_teacher())))
        for size in (None, 4)
    )
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-6)


def test_the_validation_loss_is_that_of_the_teacher_too():
    validation = Evaluation(make_loader(1), every=1)
    trainer = make_trainer().attach(Teacher(make_teacher()), validation)
    weights_after(trainer, max_iters=1)
    (batch,) = make_loader(1)
    with torch.no_grad():
        sides = trainer.model(batch["image"], batch["text"])
        expected = trainer.loss(*sides, *make_teacher().eval()(batch["image"], batch["text"]))
    assert validation.values["val/loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one_and_reports_another_teacher(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    expected = weights_after(make_trainer().attach(Teacher(make_teacher())))
    for seed in (7, 8):
        folder = tmp_path / str(seed)
        first = make_trainer().attach(Teacher(make_teacher()), CheckpointManager(folder))
        weights_after(first, max_epochs=1)
        manager = CheckpointManager(folder, resume="auto")
        with caplog.at_level(logging.INFO):
            found = weights_after(make_trainer().attach(Teacher(make_teacher(seed)), manager))
        same = all(torch.equal(found[name], value) for name, value in expected.items())
        assert same == (seed == 7)
        assert ("task.teacher_weights" in caplog.text) == (seed == 8), caplog.text


def test_a_stage_with_a_task_of_its_own_is_taught_too():
    def swapped(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image, text = model(batch["image"], batch["text"])
        return {"text_features": text, "image_features": image}

    plan = StagePlan([Stage("a", epochs=1, lr=0.1), Stage("b", epochs=1, lr=0.1, task=swapped)])
    trainer = make_trainer().attach(Teacher(make_teacher()), plan)
    weights_after(trainer)
    batch, teacher = make_loader()[-1], make_teacher()
    assert torch.equal(trainer.outputs["teacher_first"], teacher.text(batch["text"]))


@pytest.mark.parametrize("part", ["all of it", "a dropout"])
def test_a_teacher_that_is_put_into_train_mode_teaches_in_eval_mode(part, caplog):
    def features(disturbed: bool) -> list[Tensor]:
        teacher, found = make_teacher(), list[Tensor]()
        trainer = make_trainer().attach(Teacher(teacher))
        chosen = teacher if part == "all of it" else teacher.image[0]

        @trainer.on(Events.ITERATION_STARTED)
        def disturb() -> None:
            chosen.train(disturbed)

        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda t: found.append(t.outputs["teacher_first"])
        )
        trainer.run(make_loader(2), max_epochs=1)
        assert not any(module.training for module in teacher.modules())
        return found

    calm = features(disturbed=False)
    assert "train mode" not in caplog.text
    torch.testing.assert_close(features(disturbed=True), calm, rtol=0, atol=0)
    assert caplog.text.count("The teacher was put into train mode") == 2


def test_it_keeps_the_invariances_and_a_dry_run_leaves_it_as_it_was():
    teacher = make_teacher()
    trainer = make_trainer().attach(Teacher(teacher))
    task = trainer.task
    trainer.dry_run(make_loader())
    assert trainer.task is task
    report = certify(trainer, make_loader()[0], ranks=False)
    assert report.passed, report


def test_a_teacher_that_is_trained_or_has_another_teachers_names_is_refused():
    trainer = make_trainer()
    with pytest.raises(ValueError, match=r"Make it with copy\.deepcopy"):
        trainer.attach(Teacher(trainer.model))
    with pytest.raises(ValueError, match="got teacher_first, teacher_second twice"):
        trainer.attach(Teacher(make_teacher()), Teacher(make_teacher(seed=8)))
    assert trainer.task is tasks.image_text
    names = ("teacher_first", "teacher_second", "teacher_third", "teacher_fourth")
    with pytest.raises(BatchError, match=r"a tensor for each of teacher_first, .*teacher_fourth"):
        trainer.attach(Teacher(make_teacher(), names=names)).run(make_loader(), max_epochs=1)
