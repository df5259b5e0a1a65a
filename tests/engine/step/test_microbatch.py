"""Gradient caching: the gradient of the whole batch, whatever the pieces, draws and buffers."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from diptych.engine import BatchError, tasks
from diptych.engine.data.batches import split_batch
from tests.engine.models import (
    CoupledLoss,
    RunningScale,
    TwoTower,
    gradients_of,
    paired,
    plain_gradients,
    relative_error,
    sgd,
    trainer_of,
    twins,
)

EXACT = 1e-10


class Skips(nn.Module):
    """Keeps or drops the whole layer, by a draw from Python's and one from NumPy's generator."""

    def forward(self, x: Tensor) -> Tensor:
        drawn = random.random() + float(np.random.rand())
        return torch.tanh(x * drawn)


class RecordingDropout(nn.Dropout):
    """Dropout that notes each mask."""

    def __init__(self) -> None:
        super().__init__(0.5)
        self.masks: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        mask = super().forward(torch.ones_like(x))
        self.masks.append(mask)
        return x * mask


class NoisyLoss(CoupledLoss):
    """A coupled loss that draws."""

    def terms(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        return super().terms(F.dropout(image, 0.3), text)


class MeanOfRows(nn.Module):
    """A mean over samples of the distances of an image to each of its captions."""

    couples_samples = False

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return (text.reshape(len(image), 3, -1) - image[:, None]).square().mean()


@given(samples=st.integers(2, 12), size=st.integers(1, 14))
def test_the_gradient_of_the_whole_batch_is_that_of_any_pieces(samples: int, size: int):
    model, loss = TwoTower().double(), CoupledLoss().double()
    other, other_loss = twins(model, loss)
    batch = paired(samples)
    found = gradients_of(
        trainer_of(model, loss, microbatch_size=size, optimizer=sgd(model, loss)), batch
    )
    assert relative_error(found, plain_gradients(other, other_loss, [batch])) < EXACT


@pytest.mark.parametrize(
    "between",
    [
        nn.BatchNorm1d,
        lambda *_: spectral_norm(nn.Linear(8, 8)),
        RunningScale,
        lambda *_: nn.Dropout(0.4),
        Skips,
    ],
    ids=["batch norm", "spectral norm", "running scale", "dropout", "python and numpy draws"],
)
@pytest.mark.parametrize("make_loss", [CoupledLoss, NoisyLoss])
def test_draws_and_buffers_are_those_of_one_graph_over_the_pieces(between, make_loss):
    model = TwoTower(lambda: between(8) if between is nn.BatchNorm1d else between()).double()
    loss = make_loss().double()
    other, other_loss = twins(model, loss)
    batches = [paired(11), paired(11)]  # the second update starts from the first one's buffers
    optimizer = sgd(other, other_loss)

    seed_all()
    for batch in batches:
        optimizer.zero_grad()
        expected = plain_gradients(other, other_loss, split_batch(batch, 4))
        optimizer.step()
    after = next_draws()

    seed_all()
    found = gradients_of(trainer_of(model, loss, microbatch_size=4), *batches)
    assert next_draws() == after
    assert relative_error(found, expected) < EXACT
    for (name, buffer), (_, wanted) in zip(
        model.named_buffers(), other.named_buffers(), strict=True
    ):
        torch.testing.assert_close(buffer, wanted, rtol=1e-12, atol=1e-12, msg=name)


def seed_all() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)


def next_draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(np.random.rand())


def test_the_two_passes_of_a_piece_see_the_same_masks():
    model = TwoTower(RecordingDropout).double()
    gradients_of(trainer_of(model, microbatch_size=3), paired(8))
    for tower in (model.image, model.text):
        masks = tower[1].masks
        first, second = masks[:3], masks[3:]
        assert len(second) == 3
        assert all(a.equal(b) for a, b in zip(first, second, strict=True))
        assert not first[1].equal(first[2])


def test_buffers_change_once_a_piece_and_not_once_a_pass():
    model = TwoTower(RunningScale).double()
    gradients_of(trainer_of(model, microbatch_size=3), paired(8), paired(8))
    assert model.image[1].calls == 2 * 3


class ScaledTower(TwoTower):
    """Gives its scale as an output that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (*super().forward(image, text), self.log_scale.exp())


class ScaledLoss(nn.Module):
    """InfoNCE with a scale that is given, over groups of samples that match."""

    def forward(self, image: Tensor, text: Tensor, scale: Tensor, groups: Tensor) -> Tensor:
        logits = scale * F.normalize(image) @ F.normalize(text).T
        same = groups[:, None] == groups[None, :]
        return -(logits.log_softmax(1) * same).sum() / same.sum()


def scaled_task(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name a shared scalar between the features and integers after them."""
    image, text, scale = model(batch["image"], batch["text"])
    return {"image": image, "text": text, "scale": scale, "groups": batch["group"]}


def test_a_shared_scalar_and_integer_outputs_take_part():
    model, loss = ScaledTower().double(), ScaledLoss()
    other, other_loss = twins(model, loss)
    batch = {**paired(10), "group": torch.tensor([0, 1, 2, 0, 3, 4, 1, 5, 6, 7])}
    found = gradients_of(trainer_of(model, loss, task=scaled_task, microbatch_size=3), batch)
    expected = plain_gradients(other, other_loss, [batch], task=scaled_task)
    assert "0.log_scale" in found
    assert relative_error(found, expected) < EXACT


def test_a_frozen_tower_gets_no_gradient_and_changes_nothing_for_the_other():
    model = TwoTower().double()
    model.image.requires_grad_(False)
    other, loss = twins(model, CoupledLoss().double())
    other_loss = twins(loss)[0]
    batch = paired(7)
    found = gradients_of(trainer_of(model, loss, microbatch_size=2), batch)
    assert not any("image" in name for name in found)
    assert relative_error(found, plain_gradients(other, other_loss, [batch])) < EXACT


def test_with_all_frozen_the_losss_own_parameters_still_learn():
    model = TwoTower().double().requires_grad_(False)
    loss = CoupledLoss().double()
    other, other_loss = twins(model, loss)
    batch = paired(7)
    found = gradients_of(trainer_of(model, loss, microbatch_size=2), batch)
    assert relative_error(found, plain_gradients(other, other_loss, [batch])) < EXACT


def test_a_loss_that_does_not_say_is_taken_to_couple_its_samples():
    class Centred(nn.Module):
        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            return ((image - image.mean(0)) * (text - text.mean(0))).pow(2).mean()

    model, loss = TwoTower().double(), Centred()
    other, other_loss = twins(model, loss)
    batch = paired(9)
    found = gradients_of(trainer_of(model, loss, microbatch_size=4), batch)
    assert relative_error(found, plain_gradients(other, other_loss, [batch])) < EXACT


def test_loss_terms_and_outputs_of_pieces_are_those_of_the_whole_batch():
    model, loss = TwoTower().double(), CoupledLoss().double()
    whole, pieces = (trainer_of(*twins(model, loss), microbatch_size=size) for size in (None, 3))
    batch = paired(8)
    for trainer in (whole, pieces):
        trainer.run([batch], max_epochs=1)
    torch.testing.assert_close(pieces.state.output.loss, whole.state.output.loss)
    torch.testing.assert_close(pieces.terms, whole.terms)
    torch.testing.assert_close(pieces.outputs, whole.outputs)
    assert pieces.state.output.batch_size == 8


def test_two_views_go_through_in_pieces():
    class Encoder(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))

    model, loss = Encoder().double(), CoupledLoss().double()
    other, other_loss = twins(model, loss)
    batch = tuple(torch.randn(2, 7, 6, dtype=torch.float64))
    found = gradients_of(trainer_of(model, loss, task=tasks.two_views, microbatch_size=3), batch)
    expected = plain_gradients(other, other_loss, [batch], task=tasks.two_views)
    assert relative_error(found, expected) < EXACT


def test_an_output_without_the_samples_in_front_is_a_clear_error():
    def vector(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image, text = model(batch["image"], batch["text"])
        return {"image": image, "text": text, "scale": torch.ones(1, dtype=torch.float64)}

    with pytest.raises(BatchError, match=r"scale.*\(1,\)"):
        trainer_of(task=vector, microbatch_size=3).run([paired(8)], max_epochs=1)


def captions(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a row for each of the three captions of an image, next to those of its own."""
    image, text = model(batch["image"], batch["text"].flatten(0, 1))
    return {"image": image, "text": text}


def captions_of_samples(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    outputs = captions(model, batch)
    return {**outputs, "text": outputs["text"].unflatten(0, (-1, 3))}


class CaptionLoss(nn.Module):
    """A contrastive loss of images with all captions, one row a caption."""

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        own = torch.arange(len(image)).repeat_interleave(3)
        return F.cross_entropy(text.reshape(-1, text.shape[-1]) @ image.T, own)


@pytest.mark.parametrize("loss", [CaptionLoss(), MeanOfRows()])
def test_several_rows_a_sample_are_refused_before_an_update_with_the_way_that_is_exact(loss):
    model = TwoTower().double()
    batch = {**paired(8), "text": torch.randn(8, 3, 5, dtype=torch.float64)}
    whole, pieces = (
        trainer_of(*twins(model, loss), task=task, microbatch_size=size)
        for task, size in ((captions, None), (captions_of_samples, 3))
    )
    assert relative_error(gradients_of(pieces, batch), gradients_of(whole, batch)) < EXACT

    before = [value.clone() for value in model.state_dict().values()]
    with pytest.raises(
        BatchError, match=r"text.*\(6, 4\)\}.*3 rows.*as \[samples, 3, \.\.\.\], and fl"
    ):
        trainer_of(model, loss, task=captions, microbatch_size=3).run([batch])
    assert all(map(torch.equal, before, model.state_dict().values()))


def test_pieces_that_name_different_outputs_are_a_clear_error():
    names = iter(["image", "picture"])

    def fickle(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image, text = model(batch["image"], batch["text"])
        return {next(names): image, "text": text}

    with pytest.raises(BatchError, match="same names for every piece"):
        trainer_of(task=fickle, microbatch_size=4).run([paired(8)], max_epochs=1)


def test_outputs_whose_width_is_the_number_of_samples_are_a_clear_error():
    def logits(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image, text = model(batch["image"], batch["text"])
        return {"logits": image @ text.T, "turned": text @ image.T}

    with pytest.raises(BatchError, match=r"logits with \(2,\) and \(3,\).*return features"):
        trainer_of(task=logits, microbatch_size=3).run([paired(8)], max_epochs=1)


@pytest.mark.parametrize("size", [None, 3])
def test_a_loss_that_is_no_scalar_is_a_clear_error(size):
    class Rows(nn.Module):
        def forward(self, image: Tensor, text: Tensor) -> Tensor:
            return (image * text).sum(1)

    with pytest.raises(BatchError, match=r"loss must return scalars, got \{'loss': \(8,\)\}"):
        trainer_of(loss=Rows(), microbatch_size=size).run([paired(8)], max_epochs=1)
