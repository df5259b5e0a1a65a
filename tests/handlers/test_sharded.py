"""Handlers with a model sharded over two ranks: weights and values equal those of one process."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.engine import Trainer, of_this_rank, tasks
from diptych.engine.distributed.collectives import rank
from diptych.handlers import (
    Evaluation,
    FirstLayerFilters,
    GradientClipping,
    GradientDiagnostics,
    Histograms,
    JsonLines,
    LearningRate,
    LossGuard,
    ModalityBalancing,
    MomentumEncoder,
    PairSamples,
    RepresentationHealth,
    RetrievalGallery,
    RetrievalRecall,
    RunCard,
    Stage,
    StagePlan,
    TensorBoard,
    WeightAverage,
    find_learning_rate,
    parameter_groups,
)
from diptych.handlers.loss_guard.replay import replay
from diptych.losses import CLIPLoss, share_logit_scale
from tests.engine import sharded
from tests.engine.sharded import assert_equal_runs, make_trainer, train, weights_of


def held_out() -> list[dict[str, Tensor]]:
    return of_this_rank([sharded.all_pairs()])


def chosen(name: str) -> list[Any]:
    """Return the handlers of a test case."""
    cases: dict[str, Any] = {
        "clipped": lambda: [GradientClipping(max_norm=0.1, max_value=0.02)],
        "guarded": lambda: [LossGuard()],
        "balanced": lambda: [
            LossGuard(),
            ModalityBalancing(warmup=1),
            GradientClipping(max_norm=1),
        ],
        "diagnosed": lambda: [GradientDiagnostics(every=1), RepresentationHealth(every=1)],
        "averaged": lambda: [
            WeightAverage(decay=0.9),
            Evaluation(held_out(), metrics=[RetrievalRecall(k=(1,))]),
        ],
        "followed": lambda: [MomentumEncoder(online="image.blocks.0", target="image.blocks.1")],
        "staged": lambda: [
            Evaluation(held_out(), loss=True),
            StagePlan(
                [
                    Stage("text", trains="text", epochs=2, lr=1e-2, metric="val/loss", mode="min"),
                    Stage("all", epochs=2, lr=1e-3, weight_decay=0.1, load="best"),
                ]
            ),
        ],
    }
    return list(cases[name]())


CASES = ["clipped", "guarded", "balanced", "diagnosed", "averaged", "followed", "staged"]


@pytest.mark.parametrize("name", CASES)
def test_a_handler_has_the_same_effect_and_values_as_in_one_process(ranks, name):
    settings = {"fused": name == "guarded", "microbatch_size": 3 if name == "clipped" else None}
    expected = train(False, settings, chosen, name)
    for found in ranks.run(train, [(True, settings, chosen, name)] * 2):
        assert_equal_runs(found, expected)


def guarded(shard: bool, directory: Path | None, fused: bool) -> dict[str, Any]:
    """Train with one batch that is not finite, which the device skips if fused; return weights."""
    trainer = make_trainer(shard, fused=fused)
    guard = LossGuard(directory)
    trainer.attach(guard)
    (batch,) = held_out()
    spoilt = {**batch, "image": torch.full_like(batch["image"], torch.nan)}
    trainer.run([batch, spoilt, batch], max_epochs=1)
    return {"weights": weights_of(trainer.model), "records": [], "caught": guard.caught}


def replayed(directory: Path, shard: bool) -> list[str]:
    """Replay the recorded update; return the names of the values that differ."""
    (path,) = directory.glob(f"*_rank_{rank()}.pt")
    return replay(path, lambda: make_trainer(shard)).differing()


@pytest.mark.parametrize(("records", "fused"), [(False, False), (False, True), (True, False)])
def test_a_batch_that_is_not_finite_is_skipped_and_recorded(ranks, tmp_path, records, fused):
    expected = guarded(False, None, fused)
    for found in ranks.run(guarded, [(True, tmp_path if records else None, fused)] * 2):
        assert_equal_runs(found, expected)
        assert found["caught"] == 1
    if records:
        for shard in (False, True):
            assert ranks.run(replayed, [(tmp_path, shard)] * 2) == [[], []]


def exported(folder: Path) -> dict[str, Tensor]:
    """Train and export the average; return it."""
    trainer, average = make_trainer(True), WeightAverage(decay=0.5)
    trainer.attach(average)
    trainer.run(sharded.loader(), max_epochs=1)
    average.export(folder / "average.safetensors")
    with average.averaged():
        return weights_of(trainer.model)


def test_the_average_of_a_sharded_model_is_gathered_for_the_export(ranks, tmp_path):
    from safetensors.torch import load_file

    weights = ranks.run(exported, [(tmp_path,)] * 2)[1]
    written = load_file(tmp_path / "average.safetensors")
    assert written.keys() == weights.keys()
    for name, value in weights.items():
        assert written[name].equal(value)


class Convolved(nn.Module):
    """An image tower whose first layer is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Conv2d(3, 5, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.filters(image).flatten(1)


def pictured(folder: Path) -> str:
    """Train with handlers that write histograms, a gallery and metrics; return the run's card."""
    card = io.StringIO()
    trainer = make_trainer(True)
    samples = PairSamples(
        batches=[sharded.all_pairs()],
        images=torch.zeros(21, 3, 4, 4),
        captions=[f"text {i}" for i in range(21)],
    )
    trainer.attach(
        TensorBoard(folder), JsonLines(folder), RunCard(stream=card), LearningRate(warmup=0)
    )
    trainer.attach(Histograms(every=2), RetrievalGallery(samples, every=2))
    trainer.run(sharded.loader(), max_epochs=1)
    model = Convolved()
    other = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters()),
        task=tasks.classification,
        device="cpu",
        shard=True,
    )
    other.attach(TensorBoard(folder / "filters"), FirstLayerFilters(every=1))
    batch = {"image": torch.rand(4, 3, 4, 4), "label": torch.arange(4)}
    other.run([batch], max_epochs=1)
    return card.getvalue()


def test_pictures_and_counts_describe_the_whole_model(ranks, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first, second = ranks.run(pictured, [(tmp_path,)] * 2)
    count = sum(p.numel() for p in sharded.TwoTowers().parameters())
    assert f"TwoTowers, {count} parameters, all train" in first
    assert second == ""
    events = EventAccumulator(str(tmp_path)).Reload()
    (histogram,) = events.Histograms("weights/image.stem.weight")
    assert histogram.histogram_value.num == sharded.WIDTH * sharded.IMAGE
    assert "visual/gallery/image_to_text" in events.Tags()["images"]
    assert "visual/filters" in EventAccumulator(str(tmp_path / "filters")).Reload().Tags()["images"]


def searched(shard: bool) -> dict[str, Any]:
    """Return the result of a learning-rate search, and the weights after it."""
    trainer = make_trainer(shard, microbatch_size=3)
    trainer.run(sharded.loader(), max_epochs=1)
    curve = find_learning_rate(trainer, held_out(), steps=12, end=0.1)
    trainer.run(trainer.batches.data, max_epochs=2)
    return {"weights": weights_of(trainer.model), "records": [], "losses": curve.losses}


def test_a_learning_rate_search_restores_the_shards(ranks):
    expected = searched(False)
    for found in ranks.run(searched, [(True,)] * 2):
        assert_equal_runs(found, expected)
        assert found["losses"] == pytest.approx(expected["losses"])


def grouped(shard: bool) -> dict[str, Any]:
    """Train with layer-wise rates; return the weights."""
    torch.manual_seed(0)
    model = sharded.TwoTowers().double()
    loss = share_logit_scale(CLIPLoss(), model)
    layers = {"image.blocks": 0.5, "text.blocks": 0.5}
    groups = parameter_groups(model, 0.1, {"text": 1e-3}, layers, lr=1e-2, loss=loss)
    trainer = Trainer(
        model, loss, torch.optim.AdamW(groups), task=tasks.image_text, device="cpu", shard=shard
    )
    trainer.attach(LearningRate(warmup=2))
    trainer.run(sharded.loader(), max_epochs=2)
    return {"weights": weights_of(model), "records": []}


def test_parameter_groups_made_before_sharding_keep_their_rates(ranks):
    expected = grouped(False)
    for found in ranks.run(grouped, [(True,)] * 2):
        assert_equal_runs(found, expected)
