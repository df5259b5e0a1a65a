"""The optional members of a loss, and their defaults."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diptych._loss_arguments import call_with
from diptych.engine import BatchError
from diptych.engine.modules import parts_of
from diptych.engine.step.loss_contract import (
    constrained,
    couples_samples,
    loss_terms,
    sample_mean_of,
    scalars_of,
    set_tile,
    sum_of_terms,
    tiled_parts,
)
from diptych.losses import CLIPLoss, CrossEntropyLoss, WeightedSum

FEATURES = {"first": torch.randn(4, 3), "second": torch.randn(4, 3)}


def test_a_loss_that_declares_nothing_couples_samples_unless_the_default_is_another():
    assert couples_samples(nn.MSELoss())
    assert not couples_samples(nn.MSELoss(), default=False)
    assert couples_samples(CLIPLoss(), default=False)
    assert not couples_samples(CrossEntropyLoss())


def test_a_loss_without_terms_has_one_term():
    terms = loss_terms(nn.MSELoss(), FEATURES)
    assert list(terms) == ["loss"]
    assert sum_of_terms(terms) is terms["loss"]


def test_terms_must_be_scalars_and_there_must_be_one():
    with pytest.raises(BatchError, match=r"loss must return scalars, got \{'a': \(2,\)\}"):
        sum_of_terms({"a": torch.zeros(2)})
    with pytest.raises(BatchError, match="got no term"):
        sum_of_terms({})


def test_a_loss_without_scalars_publishes_none():
    assert scalars_of(nn.MSELoss()) == {}
    assert set(scalars_of(CLIPLoss())) == {"temperature", "logit_scale"}


def test_the_parts_of_a_loss_are_clamped_too():
    loss = WeightedSum(losses={"clip": CLIPLoss()})
    parameter = next(loss.parameters())
    with torch.no_grad():
        parameter.fill_(100.0)
    for part in constrained(parts_of(loss)):
        part.constrain()
    assert float(parameter.detach()) < 100.0


def test_tiles_are_set_in_all_parts_that_have_them():
    loss = WeightedSum(losses={"clip": CLIPLoss(), "mse": nn.MSELoss()})
    assert len(tiled_parts(loss)) == 1
    set_tile(loss, 2)
    assert tiled_parts(loss)[0].tile == 2
    assert tiled_parts(nn.MSELoss()) == []


def test_only_a_loss_with_sum_and_weight_is_a_mean_over_samples():
    assert sample_mean_of(CrossEntropyLoss()) is not None
    assert sample_mean_of(CLIPLoss()) is None


class Taught(nn.Module):
    """A loss with an optional argument, and with one for the output of a teacher."""

    def forward(self, first, second, negatives=None, groups=None, *, teacher_first=None):
        self.given = (first, second, negatives, groups, teacher_first)
        return first.sum()


def test_optional_arguments_and_outputs_of_a_teacher_are_passed_by_name():
    loss, named = Taught(), {name: torch.randn(2) for name in ("image", "text", "groups")}
    call_with(loss, {**named, "teacher_first": named["text"], "teacher_second": named["image"]})
    assert loss.given == (named["image"], named["text"], None, named["groups"], named["text"])


class Failing(nn.Module):
    """A loss with a mistake of its own."""

    def forward(self, first):
        return first + "1"


MISFITS = [
    (CLIPLoss(), "image", r"of CLIPLoss: first, second \(optional: groups\), got image\. Return"),
    (CLIPLoss(), "a b c d e", r"of CLIPLoss: first, .*, got a, b, c, d, e\. Leave the others"),
    (nn.MSELoss(), "a groups b", r"of MSELoss: input, target, got a, groups, b\. Leave"),
    (CrossEntropyLoss().total_and_weight, "logits", r"of CrossEntropyLoss: logits, .*, got logits"),
    (lambda first, second: first, "a", r"of <lambda>: first, second, got a\. Return"),
]


@pytest.mark.parametrize(("loss", "names", "message"), MISFITS)
def test_too_few_and_too_many_outputs_are_named_beside_the_arguments_of_the_loss(
    loss, names, message
):
    outputs = dict.fromkeys(names.split(), FEATURES["first"])
    call = loss.terms if isinstance(loss, CLIPLoss) else loss
    with pytest.raises(TypeError, match=rf"^task must return outputs for .* {message}"):
        call_with(call, outputs)


def test_an_error_inside_a_loss_is_not_taken_for_one_of_its_outputs():
    with pytest.raises(TypeError, match="unsupported operand"):
        call_with(Failing(), {"first": FEATURES["first"]})


def test_a_loss_without_the_names_gets_the_outputs_in_order():
    a, b, taught = torch.randn(3, 4, 2).unbind()
    outputs = {"second": a, "first": b, "teacher_first": taught}
    assert torch.equal(call_with(nn.MSELoss(), outputs), nn.functional.mse_loss(a, b))
    assert call_with(lambda *values: values, outputs) == (a, b, taught)
