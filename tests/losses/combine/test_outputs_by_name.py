"""The outputs of a task that the parts of a loss get: by name, as a single loss gets them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diptych.engine import Trainer
from diptych.engine.step.loss_contract import loss_terms
from diptych.handlers import Evaluation
from diptych.losses import (
    CLIPDistillationLoss,
    CLIPLoss,
    CrossEntropyLoss,
    CrossModalLoss,
    InfoNCELoss,
    MatryoshkaLoss,
    OneOf,
    UncertaintyWeighted,
    VICRegLoss,
    WeightedSum,
)
from tests.losses.oracles import draw

IMAGE, TEXT, TAUGHT, TAUGHT_TOO = (draw(6, 8, seed=seed) for seed in range(4))
LOGITS, LABELS = draw(6, 4, seed=4), torch.tensor([0, 1, 2, 3, 0, 1])
GROUPS = torch.tensor([4, 1, 4, 2, 1, 4])
FEATURES = {"image_features": IMAGE, "text_features": TEXT}
CLASSES = {"logits": LOGITS, "labels": LABELS}
TEACHER = {"teacher_first": TAUGHT, "teacher_second": TAUGHT_TOO}


class Weighed(nn.Module):
    """A loss that is no `Loss`, with an optional argument."""

    def forward(self, first: Tensor, second: Tensor, strength: Tensor | None = None) -> Tensor:
        return (first - second).square().sum() * (1 if strength is None else strength.sum())


def plain(*losses: Tensor) -> list[float]:
    return torch.stack([loss.detach().double() for loss in losses]).tolist()


def values(loss: nn.Module, outputs: dict[str, Tensor]) -> list[float]:
    return plain(*loss_terms(loss, outputs).values())


@pytest.mark.parametrize("first", [FEATURES, CLASSES])
def test_each_part_gets_the_outputs_that_it_names(first: dict[str, Tensor]):
    outputs = {**first, **FEATURES, **CLASSES, "groups": GROUPS}
    loss = WeightedSum(losses=[CLIPLoss(), CrossEntropyLoss()])
    expected = [CLIPLoss()(IMAGE, TEXT, GROUPS), CrossEntropyLoss()(LOGITS, LABELS)]
    assert values(loss, outputs) == pytest.approx(plain(*expected))


def test_optional_arguments_are_passed_by_name_whatever_comes_before_them():
    outputs = {**FEATURES, "strength": LABELS, "groups": GROUPS}
    loss = UncertaintyWeighted(losses=[InfoNCELoss(), Weighed()])
    expected = [InfoNCELoss()(IMAGE, TEXT, groups=GROUPS), Weighed()(IMAGE, TEXT, LABELS)]
    assert values(loss, outputs)[:2] == pytest.approx(plain(*expected))


def test_a_teachers_outputs_reach_the_parts_that_name_them():
    loss = WeightedSum(losses={"clip": CLIPLoss(), "taught": CLIPDistillationLoss()})
    taught = CLIPDistillationLoss()(IMAGE, TEXT, TAUGHT, TAUGHT_TOO, groups=GROUPS)
    expected = plain(CLIPLoss()(IMAGE, TEXT, GROUPS), taught)
    assert values(loss, {**FEATURES, "groups": GROUPS, **TEACHER}) == pytest.approx(expected)


def test_parts_without_the_names_get_the_outputs_in_order():
    named = {"first": IMAGE, "second": TEXT, "groups": GROUPS}
    loss = WeightedSum(losses={"clip": CLIPLoss(), "near": nn.MSELoss(), "spread": VICRegLoss()})
    expected = (IMAGE - TEXT).square().mean()
    assert values(loss, named)[1] == pytest.approx(float(expected))


def test_losses_of_losses_pass_the_names_on():
    outputs = {**FEATURES, "groups": GROUPS, **CLASSES}
    inner = WeightedSum(losses=[VICRegLoss(), InfoNCELoss()])
    nested = MatryoshkaLoss(loss=InfoNCELoss(), dims=(4,))
    parts = {"inner": inner, "classes": CrossEntropyLoss(), "nested": nested}
    shorter = InfoNCELoss()(IMAGE[:, :4], TEXT[:, :4], groups=GROUPS)
    expected = [
        *VICRegLoss().terms(IMAGE, TEXT).values(),
        InfoNCELoss()(IMAGE, TEXT, groups=GROUPS),
        CrossEntropyLoss()(LOGITS, LABELS),
        shorter,
    ]
    assert values(WeightedSum(losses=parts), outputs) == pytest.approx(plain(*expected))
    assert values(nested, {**FEATURES, "groups": GROUPS}) == pytest.approx(plain(shorter))
    by_position = WeightedSum(losses=[CrossEntropyLoss()], inputs={"cross_entropy": (3, 4)})
    both = WeightedSum(losses={"a": by_position, "clip": CLIPLoss()})
    assert values(both, outputs)[0] == pytest.approx(plain(expected[-2])[0])


def test_a_single_mean_over_samples_gets_its_outputs_by_name():
    loss = OneOf(losses=[CrossEntropyLoss(), CLIPLoss()])
    total, weight = loss.total_and_weight(**FEATURES, **CLASSES)
    assert plain(total / weight) == pytest.approx(plain(CrossEntropyLoss()(LOGITS, LABELS)))


def test_an_output_that_no_part_takes_and_a_misspelt_argument_are_refused():
    loss = WeightedSum(losses=[CrossEntropyLoss()])
    with pytest.raises(TypeError, match="got groups, which none of cross_entropy takes"):
        loss_terms(loss, {**CLASSES, "groups": GROUPS})
    both = WeightedSum(losses=[CLIPLoss(), VICRegLoss()])
    torch.testing.assert_close(both(IMAGE, TEXT, groups=GROUPS), both(IMAGE, TEXT, GROUPS))
    with pytest.raises(TypeError, match="got grups, which none of clip, vicreg takes"):
        both(IMAGE, TEXT, grups=GROUPS)


def test_an_evaluation_passes_outputs_as_the_training_does():
    class Views(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image

    def task(model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        image, text, labels = batch
        return {"image_features": model(image), "text_features": text, "labels": labels}

    loss = CrossModalLoss()
    trainer = Trainer(Views(), loss, torch.optim.SGD(loss.parameters(), lr=0.0), task=task)
    trainer.attach(Evaluation([(IMAGE.clone(), TEXT.clone(), LABELS.clone())]))
    trainer.run([(IMAGE, TEXT, LABELS)], max_epochs=1)
    (expected,) = plain(CrossModalLoss()(IMAGE, TEXT, labels=LABELS))
    assert trainer.state.metrics["train/loss"] == pytest.approx(expected)
    assert trainer.state.metrics["val/loss"] == pytest.approx(expected)
