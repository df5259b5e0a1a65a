"""Accumulation: a mean over samples is the same in one piece and in many, weighted or not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.engine import StepEvents, tasks
from tests.engine.loop.loops import events_of
from tests.engine.models import (
    CoupledLoss,
    SquareLoss,
    TokenLoss,
    Tokens,
    TwoTower,
    copied_gradients,
    gradients_of,
    paired,
    plain_gradients,
    relative_error,
    trainer_of,
    twins,
)

EXACT = 1e-10


def padded(samples: int, length: int = 6) -> dict[str, Tensor]:
    """Return token sequences of many lengths, the first one whole, padded with class 0."""
    tokens = torch.randint(1, 7, (samples, length))
    for row in range(1, samples):
        tokens[row, 1 + row % length :] = 0
    return {"tokens": tokens}


def labelled(samples: int) -> dict[str, Tensor]:
    image = torch.randn(samples, 6, dtype=torch.float64)
    return {"image": image, "label": torch.randn(samples, dtype=torch.float64)}


@given(samples=st.integers(1, 13), size=st.integers(1, 14))
def test_a_mean_over_tokens_is_that_of_the_whole_batch_in_any_pieces(samples: int, size: int):
    model, loss = Tokens().double(), TokenLoss()
    other, other_loss = twins(model, loss)
    batch = padded(samples)
    trainer = trainer_of(model, loss, task=tasks.next_token, microbatch_size=size)
    found = gradients_of(trainer, batch)
    expected = plain_gradients(other, other_loss, [batch], task=tasks.next_token)
    assert relative_error(found, expected) < EXACT
    whole = loss(*tasks.next_token(other, batch).values())
    torch.testing.assert_close(trainer.state.output.loss, whole.detach(), rtol=1e-12, atol=0)


@given(samples=st.integers(1, 13), size=st.integers(1, 14))
def test_a_plain_mean_over_samples_needs_no_weights(samples: int, size: int):
    model, loss = nn.Linear(6, 2).double(), SquareLoss().double()
    other, other_loss = twins(model, loss)
    batch = labelled(samples)
    found = gradients_of(
        trainer_of(model, loss, task=tasks.classification, microbatch_size=size), batch
    )
    expected = plain_gradients(other, other_loss, [batch], task=tasks.classification)
    assert "1.gain" in found
    assert relative_error(found, expected) < EXACT


class TwoTerms(SquareLoss):
    """A plain mean over samples of two terms."""

    def terms(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"square": super().forward(logits, labels), "size": logits.square().mean()}

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return sum(self.terms(logits, labels).values(), torch.zeros(()))


@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_terms_of_a_mean_are_those_of_the_whole_batch_in_any_pieces(size: int):
    batch, terms = labelled(7), []
    for pieces in (None, size):
        torch.manual_seed(0)
        model, loss = nn.Linear(6, 2).double(), TwoTerms().double()
        trainer = trainer_of(model, loss, task=tasks.classification, microbatch_size=pieces)
        gradients_of(trainer, batch)
        terms.append(trainer.terms)
    assert list(terms[0]) == list(terms[1]) == ["square", "size"]
    for name, value in terms[0].items():
        torch.testing.assert_close(terms[1][name], value, rtol=1e-12, atol=0)


class WeightedLoss(nn.Module):
    """Cross entropy with class weights, whose sum is the divisor."""

    couples_samples = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor([0.1, 3.0, 0.7], dtype=torch.float64))

    def total_and_weight(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        total = F.cross_entropy(logits, labels, weight=self.weight, reduction="sum")
        return total, self.weight[labels].sum()

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, weight=self.weight)


@given(samples=st.integers(1, 13), size=st.integers(1, 14))
def test_class_weights_divide_by_the_weight_of_the_whole_batch(samples: int, size: int):
    model, loss = nn.Linear(6, 3).double(), WeightedLoss()
    other, other_loss = twins(model, loss)
    batch = {**labelled(samples), "label": torch.randint(3, (samples,))}
    trainer = trainer_of(model, loss, task=tasks.classification, microbatch_size=size)
    found = gradients_of(trainer, batch)
    expected = plain_gradients(other, other_loss, [batch], task=tasks.classification)
    assert relative_error(found, expected) < EXACT


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_batch_of_nothing_but_padding_moves_nothing(size: int):
    model = Tokens().double()
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = trainer_of(model, TokenLoss(), task=tasks.next_token, microbatch_size=size)
    trainer.run([{"tokens": torch.zeros(5, 6, dtype=torch.int64)}], max_epochs=1)
    assert trainer.state.output.loss == 0
    assert all(p.equal(before[name]) for name, p in model.named_parameters())


def test_a_sample_mean_goes_through_the_model_once():
    calls = []
    model = Tokens().double()
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    gradients_of(
        trainer_of(model, TokenLoss(), task=tasks.next_token, microbatch_size=2), padded(7)
    )
    assert calls == [True] * 4


def test_the_step_events_fire_once_an_update_however_many_the_pieces():
    trainer = trainer_of(Tokens().double(), TokenLoss(), task=tasks.next_token, microbatch_size=2)
    fired = events_of(trainer, *StepEvents)
    trainer.run([padded(7)], max_epochs=1)
    assert fired == [event.name for event in StepEvents]
    lengths = {name: len(value) for name, value in trainer.outputs.items()}
    assert lengths == {"logits": 7, "labels": 7}


def test_weights_that_differ_give_another_gradient_than_the_mean_of_the_pieces_means():
    model, loss = Tokens().double(), TokenLoss()
    other, other_loss = twins(model, loss)
    batch = padded(6)
    found = gradients_of(trainer_of(model, loss, task=tasks.next_token, microbatch_size=3), batch)
    for piece in (batch["tokens"][:3], batch["tokens"][3:]):
        (other_loss(*tasks.next_token(other, {"tokens": piece}).values()) / 2).backward()
    assert relative_error(found, copied_gradients(other, other_loss)) > 1e-3


HALF = {"bf16": 2**-8, "fp16": 2**-11}


def in_half(precision: str, size: int | None, kind: str) -> dict[str, Tensor]:
    """Return float32 gradients that one update takes in half precision."""
    torch.manual_seed(3)
    if kind == "coupled":
        model, loss, task, batch = TwoTower(), CoupledLoss(), tasks.image_text, paired(24)
        batch = {key: value.float() for key, value in batch.items()}
    else:
        model, loss, task, batch = Tokens(), TokenLoss(), tasks.next_token, padded(24)
    return gradients_of(
        trainer_of(model, loss, task=task, precision=precision, microbatch_size=size), batch
    )


@pytest.mark.parametrize("kind", ["coupled", "sample mean"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_half_precision_pieces_give_the_whole_batchs_gradient_within_rounding(precision, kind):
    exact = in_half("fp32", None, kind)
    whole = in_half(precision, None, kind)
    pieces = in_half(precision, 5, kind)
    rounding = HALF[precision]
    assert 0 < relative_error(whole, exact) < 8 * rounding
    assert relative_error(pieces, exact) < 8 * rounding
    assert relative_error(pieces, whole) < 8 * rounding
