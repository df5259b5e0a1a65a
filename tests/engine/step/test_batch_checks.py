"""Mistakes in a run's first batch, and batches that are too small for the loss, are reported."""

from __future__ import annotations

import itertools
import logging
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from diptych.engine import MetricsEvents, SeededLoader, StepEvents, Trainer
from diptych.engine.distributed.collectives import rank
from diptych.engine.errors import BatchError
from diptych.engine.state.run_state import load_run_state, run_state
from diptych.engine.step.batch_checks import check_first_batch, last_batch_size
from diptych.handlers import Evaluation
from diptych.losses import CLIPLoss, InfoNCELoss, MoCoLoss, VICRegLoss, WeightedSum
from tests.engine.models import TwoTower, paired, sgd, trainer_of
from tests.losses.ranks import Ranks


def trainer_with(loss: nn.Module, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = TwoTower().double()
    return trainer_of(model, loss.double(), **settings)


class LogitsOf(nn.Module):
    """Two towers that return logits, each way in which models make their transpose."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.towers, self.way = TwoTower(), way

    def forward(self, image: Tensor, text: Tensor) -> Any:
        images, texts = self.towers(image, text)
        logits = 20 * images @ texts.T
        if self.way == "product":
            return logits, (20 * texts.bfloat16() @ images.bfloat16().T).float()
        if self.way == "shares":
            return logits.softmax(1), logits.T.softmax(1)
        turned = logits.T.contiguous() if self.way == "copy" else logits.T
        if self.way == "named":
            return {"image_features": logits, "text_features": turned}
        return logits, turned


@pytest.mark.parametrize(
    ("way", "size"),
    [
        *itertools.product(["view", "copy", "product", "named"], [None, 4, 1]),
        ("shares", None),
    ],
)
def test_logits_in_place_of_features_are_refused_before_the_first_update(
    way: str, size: int | None
) -> None:
    model = LogitsOf(way)
    trainer = trainer_of(model, CLIPLoss(), microbatch_size=size)
    before = model.towers.image[0].weight.clone()
    with pytest.raises(BatchError, match=r"image_features and text_features must be features"):
        trainer.run([paired(8, torch.float32)])
    assert model.towers.image[0].weight.equal(before)


def test_an_evaluation_refuses_logits_in_place_of_features() -> None:
    trainer = trainer_with(CLIPLoss())
    evaluation = Evaluation([paired(8, torch.float32)], model=LogitsOf("view"))
    with pytest.raises(BatchError, match="must be features"):
        trainer.attach(evaluation).run([paired(8)])


@pytest.mark.parametrize("kind", ["random", "equal", "constant"])
def test_features_as_wide_as_the_batch_are_accepted(kind: str) -> None:
    features = torch.randn(6, 6)
    sides = {"random": (features, torch.randn(6, 6)), "equal": (features + features.T,) * 2}
    first, second = sides.get(kind, (torch.ones(6, 6), torch.ones(6, 6)))
    model = nn.Linear(1, 1)

    def task(model: nn.Module, _: Any) -> dict[str, Tensor]:
        zero = 0 * model(torch.ones(1, 1)).sum()
        return {"image_features": first + zero, "text_features": second + zero}

    loss = CLIPLoss()
    Trainer(model, loss, sgd(model, loss), task=task).run([paired(6)])


@pytest.mark.parametrize(("name", "told"), [("group", True), ("label", False)])
def test_minus_one_as_an_id_is_reported_in_the_first_batch(name: str, *, told: bool) -> None:
    trainer = trainer_with(CLIPLoss())
    batch = paired(4) | {name: torch.tensor([0, -1, 0, -1])}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.run([batch] * 3)
    found = [str(one.message) for one in caught if "hold -1" in str(one.message)]
    assert len(found) == told
    assert all("-100" in one for one in found)


def test_a_first_batch_of_one_pair_is_told_that_it_has_no_negatives() -> None:
    for loss in (CLIPLoss(), InfoNCELoss(), WeightedSum(losses={"clip": CLIPLoss()})):
        with pytest.warns(UserWarning, match="one pair, so that there are no negatives"):
            trainer_with(loss).run([paired(1), paired(4)])
    trainer_with(MoCoLoss(dim=4, queue_size=8)).run([paired(1), paired(4)])
    trainer_with(CLIPLoss()).run([paired(4), paired(1)])


def test_a_batch_below_the_minimum_is_an_iteration_without_an_update() -> None:
    batches = [paired(4), paired(1), paired(4), paired(1)]
    trainer, plain = trainer_with(VICRegLoss(), log_every=4), trainer_with(VICRegLoss())
    stepped: list[int] = []
    records: list[dict[str, float]] = []
    trainer.add_event_handler(
        StepEvents.OPTIMIZER_STEPPED, lambda: stepped.append(trainer.state.iteration)
    )
    trainer.add_event_handler(
        MetricsEvents.LOGGED, lambda: records.append(dict(trainer.metrics.record.values))
    )
    trainer.run(batches)
    plain.run([batches[0], batches[2]])

    assert trainer.state.iteration == 4
    assert stepped == [1, 3]
    assert records[0]["train/skipped_batches"] == 2
    assert trainer.state.metrics["train/loss"] == plain.state.metrics["train/loss"]
    assert trainer.state.output.batch_size == 0
    for one, other in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert one.equal(other)

    resumed = trainer_with(VICRegLoss())
    resumed.state.dataloader = batches
    load_run_state(resumed, run_state(trainer))
    assert resumed.skipped_batches == 2


def test_a_last_batch_that_cannot_be_normalised_is_an_iteration_without_an_update(
    caplog: pytest.LogCaptureFixture,
) -> None:
    found, pairs = [], [paired(4), paired(4), paired(1)]
    for batches in (pairs, pairs[:2]):
        torch.manual_seed(0)
        model = TwoTower().double()
        model.image.append(nn.BatchNorm1d(4).double())
        trainer = trainer_of(model, CLIPLoss().double())
        trainer.run(batches, max_epochs=2)
        found.append([*model.state_dict().values()])
    assert all(one.equal(other) for one, other in zip(*found, strict=True))
    assert caplog.text.count("the 2 that the model's batch normalisation needs: it is skip") == 1
    with pytest.raises(BatchError, match=r"a batch must have 2 samples or more for image\.\d"):
        trainer_of(model, CLIPLoss().double()).run([paired(1), paired(4)])


def test_a_run_of_batches_that_are_too_small_changes_nothing_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = trainer_with(VICRegLoss())
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.run([paired(1)] * 2)
    assert caplog.text.count("iteration 1 has fewer samples than the 2 that VICRegLoss needs") == 1
    assert all(p.equal(q) for p, q in zip(trainer.model.parameters(), before, strict=True))
    assert trainer.skipped_batches == 2


def test_an_evaluation_leaves_batches_below_the_minimum_out_of_the_loss() -> None:
    trainer, batches = trainer_with(VICRegLoss()), [paired(4), paired(3), paired(1)]
    losses = [float(VICRegLoss()(*trainer.model(**batch)).detach()) for batch in batches[:2]]
    values = Evaluation(batches, check_first_batch=False)
    trainer.attach(values, Evaluation(batches[2:], prefix="tiny", check_first_batch=False))
    values.evaluate(trainer)
    assert values.values["val/loss"] == pytest.approx((4 * losses[0] + 3 * losses[1]) / 7)
    assert math.isnan(trainer.handlers[1].evaluate(trainer)["tiny/loss"])


@pytest.mark.parametrize("kind", ["torch", "seeded"])
def test_a_loader_whose_last_batch_will_be_too_small_is_reported_at_the_start(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [{key: value[0] for key, value in paired(1).items()} for _ in range(9)]
    loader = DataLoader(pairs, 4) if kind == "torch" else SeededLoader(pairs, 4)
    whole = DataLoader(pairs, 3) if kind == "torch" else SeededLoader(pairs, 3)
    trainer = trainer_with(VICRegLoss()).attach(Evaluation(loader))
    with caplog.at_level(logging.WARNING):
        trainer.run(whole)
        found = [one.getMessage() for one in caplog.records]
        assert [one for one in found if "last batch of a pass will have 1 sample, and VICR" in one]
        assert all("val/loss leaves it out" in one for one in found if "last batch" in one)
        caplog.clear()
        trainer_with(VICRegLoss()).run(loader)
        assert "it is skipped, without an update" in caplog.text


def test_the_last_batch_of_a_loader_is_known_without_reading_it() -> None:
    data = TensorDataset(torch.zeros(9, 1))
    assert last_batch_size(DataLoader(data, 4)) == 1
    assert last_batch_size(DataLoader(data, 3)) == 3
    assert last_batch_size(SeededLoader(data, 8)) == 1
    for unknown in (DataLoader(data, 4, drop_last=True), [1, 2], iter([1]), DataLoader(data, None)):
        assert last_batch_size(unknown) is None


SIZES = ((1, 0), (1, 1), (0, 3))
"""Samples of both ranks, batch after batch: the first one is too small."""


def global_batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(5)
    return [paired(sum(sizes)) for sizes in SIZES]


def on_ranks(size: int | None) -> tuple[int, list[Tensor]]:
    """Run this rank's shares; return the skipped batches and the weights."""
    starts = [sum(sizes[: rank()]) for sizes in SIZES]
    shares = [
        {key: value[start : start + sizes[rank()]] for key, value in batch.items()}
        for batch, start, sizes in zip(global_batches(), starts, SIZES, strict=True)
    ]
    trainer = trainer_with(VICRegLoss(), microbatch_size=size)
    trainer.run(shares)
    return trainer.skipped_batches, [p.detach() for p in trainer.model.parameters()]


def test_the_global_batch_decides_and_all_ranks_decide_alike(ranks: Ranks) -> None:
    alone = trainer_with(VICRegLoss())
    alone.run(global_batches())
    assert alone.skipped_batches == 1
    for size in (None, 2):  # in pieces, a rank without samples has one too
        for skipped, weights in ranks.run(on_ranks, [(size,)] * 2):
            assert skipped == 1
            for one, parameter in zip(weights, alone.model.parameters(), strict=True):
                torch.testing.assert_close(one, parameter.detach(), rtol=1e-10, atol=1e-12)


def with_norm(norm: nn.Module, loss: nn.Module, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = TwoTower().double()
    model.image.extend([nn.Dropout(0.3), norm.double()])
    return trainer_of(model, loss.double(), **settings)


class OverPixels(nn.BatchNorm1d):
    """A batch norm that gets several numbers a channel from one sample."""

    def forward(self, value: Tensor) -> Tensor:
        return super().forward(value[:, :, None] + torch.arange(2)).mean(2)


class Distance(nn.Module):
    """A mean over samples, without a second pass in micro-batches."""

    couples_samples = False

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return (image - text).square().mean()


def share(batch: dict[str, Tensor], on_last: int) -> dict[str, Tensor]:
    """Return the last samples on the last rank, and the others on the first."""
    cut = len(batch["image"]) - on_last
    return {key: value[cut:] if rank() else value[:cut] for key, value in batch.items()}


def normalised_on_ranks(loss: type[nn.Module], size: int | None) -> tuple[int, list[Any]]:
    """Run with and without a batch of which rank 1 has a single sample; return what is left."""
    torch.manual_seed(3)
    batches, found = [share(paired(8), 4), share(paired(5), 1), share(paired(8), 4)], []
    for each in (batches[::2], batches):
        trainer = with_norm(nn.BatchNorm1d(4), loss(), microbatch_size=size)
        trainer.run(each, max_epochs=2)
        found.append(trainer.model.state_dict())
    return trainer.skipped_batches, found


def errors_on_ranks() -> tuple[list[str], int]:
    """Return the errors of runs of which a batch can neither be normalised nor be skipped."""
    messages = []
    for norm, size, sizes in (
        (nn.BatchNorm1d(4), None, [1, 4]),  # the first batch
        (nn.BatchNorm1d(4), 2, [4, 3]),  # a piece of a sample, and one of two
        (OverPixels(4), None, [1, 4, 1]),  # no error
    ):
        trainer = with_norm(norm, CLIPLoss(), microbatch_size=size)
        try:
            trainer.run([share(paired(4 + each), each) for each in sizes])
        except BatchError as error:
            messages.append(str(error))
    return messages, trainer.skipped_batches


def test_ranks_skip_a_batch_of_which_one_has_a_sample_that_cannot_be_normalised(
    ranks: Ranks,
) -> None:
    for loss, size in ((CLIPLoss, None), (CLIPLoss, 2), (Distance, None), (Distance, 2)):
        for skipped, (without, found) in ranks.run(normalised_on_ranks, [(loss, size)] * 2):
            assert skipped == 2
            assert all(value.equal(without[name]) for name, value in found.items())


def test_a_sample_that_ranks_can_neither_normalise_nor_skip_is_an_error_on_all(
    ranks: Ranks,
) -> None:
    for index, (messages, skipped) in enumerate(ranks.run(errors_on_ranks, [()] * 2)):
        where = ("on another rank", "on this rank")[index]
        assert len(messages) == 2
        assert all("must have 2 samples or more on every rank" in text for text in messages)
        assert all(f"got one of a single sample {where}. Raise" in text for text in messages)
        assert skipped == 0


def test_a_batch_without_names_that_holds_nan_is_not_called_finite(caplog):
    bad, odd = torch.full((4, 2), math.nan), torch.zeros(4).to(torch.float8_e4m3fn)
    check_first_batch(nn.MSELoss(), {"features": bad, "codes": odd}, ([odd, bad], odd))
    assert "features of the first batch hold NaN" in caplog.text
    assert "already, in part 0: look at the data" in caplog.text
