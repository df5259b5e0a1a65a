"""HardNegativeMining against a plain loop over queries and candidates."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.engine import BatchError, Trainer, tasks
from diptych.handlers import CheckpointManager, Evaluation, HardNegativeMining
from diptych.losses import InfoNCELoss
from tests.losses.oracles import cosine, mean
from tests.losses.ranks import Ranks

SIZE = 10


class Towers(nn.Module):
    """An image tower and a text tower, one layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.encode_image, self.encode_text = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.encode_image(image), self.encode_text(text)


def with_negatives(model: Towers, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    outputs = tasks.image_text(model, batch)
    if "negatives" in batch:
        negatives = batch["negatives"]
        features = model.encode_text(negatives.flatten(0, 1)).unflatten(0, negatives.shape[:2])
        outputs |= {"negatives": features, "negative_groups": batch["negative_groups"]}
    return outputs


def make_data() -> tuple[list[dict[str, Tensor]], Tensor]:
    """Return batches with two images of each group, and the texts of all groups."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2 * SIZE, 4, generator=generator)
    texts, groups = torch.randn(SIZE, 5, generator=generator), torch.arange(SIZE).repeat(2)
    rows = torch.randperm(2 * SIZE, generator=generator).split(5)
    return [{"image": images[i], "text": texts[groups[i]], "group": groups[i]} for i in rows], texts


def make_trainer(**settings: Any) -> Trainer:
    torch.manual_seed(1)
    model, loss = Towers(), InfoNCELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return Trainer(
        model, loss, optimizer, task=with_negatives, device="cpu", seed=3, log_every=1, **settings
    )


def make_handlers(k: int = 2, skip: int = 1) -> tuple[Evaluation, HardNegativeMining]:
    batches, texts = make_data()
    evaluation = Evaluation(batches, task=tasks.image_text, prefix="mining", at_start=True)
    return evaluation, HardNegativeMining("mining", texts, k=k, skip=skip)


def loop(model: Towers, k: int, skip: int) -> list[list[int]]:
    """Return the hardest candidates of each group."""
    batches, texts = make_data()
    images = {
        int(group): [row for b in batches for row in b["image"][b["group"] == group]]
        for group in range(SIZE)
    }
    with torch.no_grad():
        queries = {
            group: [model.encode_image(row).double() for row in rows]
            for group, rows in images.items()
        }
        candidates = model.encode_text(texts).double().tolist()
    found = []
    for group in range(SIZE):
        units = [(row / row.norm()).tolist() for row in queries[group]]
        centre = [mean(values) for values in zip(*units, strict=True)]
        others = [i for i in range(SIZE) if i != group]
        others.sort(key=lambda i, own=centre: -cosine(own, candidates[i]))
        found.append(others[skip : skip + k])
    return found


def test_a_batch_gets_the_candidates_that_the_last_evaluation_found_hardest():
    trainer = make_trainer().attach(*make_handlers())
    expected = loop(copy.deepcopy(trainer.model), 2, 1)
    batches, texts = make_data()
    trainer.run(batches, max_iters=1)
    batch = trainer.state.batch
    assert batch["negative_groups"].tolist() == [expected[g] for g in batch["group"].tolist()]
    assert torch.equal(batch["negatives"], texts[batch["negative_groups"]])
    trainer.run(batches, max_epochs=1)
    expected = loop(trainer.model, 2, 1)
    trainer.run(batches, max_iters=len(batches) + 1)
    batch = trainer.state.batch
    assert batch["negative_groups"].tolist() == [expected[g] for g in batch["group"].tolist()]
    assert "negatives" not in batches[0], "a batch of the loader was changed"


def test_the_loss_is_that_of_the_negatives_and_micro_batches_change_nothing():
    weights = []
    for size in (None, 2):
        trainer = make_trainer(microbatch_size=size).attach(*make_handlers())
        trainer.run(make_data()[0], max_epochs=2)
        weights.append(trainer.model.state_dict())
        outputs = trainer.outputs
        assert outputs["negatives"].shape == (5, 2, 3)
        assert math.isclose(
            float(trainer.state.output.loss),
            float(
                trainer.loss(
                    outputs["image_features"],
                    outputs["text_features"],
                    outputs["negatives"],
                    outputs["groups"],
                    outputs["negative_groups"],
                )
            ),
            rel_tol=1e-6,
        )
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)


def test_a_run_resumed_between_two_evaluations_is_the_uninterrupted_one(tmp_path: Path):
    whole = make_trainer().attach(*make_handlers())
    whole.run(make_data()[0], max_epochs=2)
    stopped = make_trainer().attach(*make_handlers(), CheckpointManager(tmp_path))
    stopped.run(make_data()[0], max_iters=6)
    resumed = make_trainer().attach(*make_handlers(), CheckpointManager(tmp_path, resume="auto"))
    resumed.run(make_data()[0], max_epochs=2)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)


def _mined(start: int, stop: int) -> dict[str, Tensor]:
    trainer = make_trainer()
    evaluation, mining = make_handlers()
    evaluation.loader = evaluation.loader[start:stop]
    trainer.attach(evaluation, mining)
    evaluation.evaluator.evaluate(evaluation.loader)
    return mining.state_dict()


@pytest.mark.slow
def test_all_ranks_mine_what_one_process_mines(ranks: Ranks):
    expected = _mined(0, 4)
    for found in ranks.run(_mined, [(0, 1), (1, 4)]):
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_groups_that_the_evaluation_lacks_are_reported_once(caplog: pytest.LogCaptureFixture):
    evaluation, mining = make_handlers(k=1, skip=0)
    evaluation.loader = evaluation.loader[:1]
    trainer = make_trainer().attach(evaluation, mining)
    trainer.run(make_data()[0], max_epochs=1)
    assert caplog.text.count("has groups that the evaluation 'mining' has not") == 1


def test_what_cannot_be_mined_is_refused():
    evaluation, mining = make_handlers()
    with pytest.raises(ValueError, match=r"attached before, got 'mining'; there are none"):
        make_trainer().attach(mining, evaluation)
    with pytest.raises(BatchError, match=r"more than k \+ skip = 11 candidates, got 10 and 10"):
        make_trainer().attach(*make_handlers(k=10)).run(make_data()[0], max_epochs=1)
    with pytest.raises(BatchError, match=r"rows of candidates, 0 to 3, got 0 to 9"):
        make_trainer().attach(
            make_handlers()[0], HardNegativeMining("mining", torch.zeros(4, 5))
        ).run(make_data()[0], max_epochs=1)
    with pytest.raises(BatchError, match="must return groups and first or second, got image_feat"):
        make_trainer().attach(
            make_handlers()[0],
            HardNegativeMining("mining", make_data()[1], sides=("first", "second")),
        ).run(make_data()[0], max_epochs=1)
    with pytest.raises(BatchError, match="a dictionary with 'label'"):
        make_trainer().attach(
            make_handlers()[0], HardNegativeMining("mining", make_data()[1], group="label")
        ).run(make_data()[0], max_epochs=1)
