"""Batch transforms: what they see, what they draw, and what they leave alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from ignite.engine import Events
from torch import Tensor, nn

from diptych.engine import BatchError, Evaluator, OnKeys, SeededLoader, StepEvents, Trainer, tasks
from diptych.engine.random_state import random_state
from tests.engine.models import IMAGE, TwoTower, gradients_of, paired, relative_error, trainer_of


class Noise:
    """Adds noise from every generator there is, and notes what it added.

    Attributes:
        drawn: one row of numbers for each batch.
    """

    def __init__(self) -> None:
        self.drawn: list[list[float]] = []

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        noise = torch.randn_like(batch["image"])
        self.drawn.append([random.random(), float(np.random.rand()), float(noise.sum())])
        return {**batch, "image": batch["image"] + noise + self.drawn[-1][0] + self.drawn[-1][1]}


def loader(length: int = 4, samples: int = 6) -> list[dict[str, Tensor]]:
    torch.manual_seed(7)
    return [paired(samples) for _ in range(length)]


def pairs_loader() -> SeededLoader:
    torch.manual_seed(7)
    batch = paired(24)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(24)]
    return SeededLoader(rows, batch_size=6, seed=3)


def made(transform: object = None, **settings: object) -> Trainer:
    torch.manual_seed(1)
    return trainer_of(transform=transform, **settings)


def weights(trainer: Trainer) -> list[Tensor]:
    return [p.detach() for m in (trainer.model, trainer.loss) for p in m.parameters()]


def same(first: Trainer, second: Trainer) -> bool:
    return all(map(torch.equal, weights(first), weights(second)))


def test_the_model_sees_what_the_transform_makes_of_a_batch():
    expected, found = made(), made(lambda batch: {**batch, "image": 2 * batch["image"]})
    doubled = [{**batch, "image": 2 * batch["image"]} for batch in loader()]
    expected.run(doubled, max_epochs=2)
    found.run(loader(), max_epochs=2)
    assert same(expected, found)


def test_the_batch_that_handlers_see_is_the_loaders():
    trainer, batches, seen = made(Noise()), loader(), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.batch))
    trainer.run(batches, max_epochs=1)
    assert all(found is given for found, given in zip(seen, batches, strict=True))


def test_a_transform_runs_without_a_graph_and_once_an_update():
    calls: list[bool] = []

    def note(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(torch.is_grad_enabled())
        return batch

    made(note, microbatch_size=2).run(loader(), max_epochs=1)
    assert calls == [False] * 4


def test_draws_are_those_of_seed_epoch_and_iteration():
    runs = []
    for seed in (0, 0, 5):
        noise = Noise()
        made(noise, seed=seed).run(loader(), max_epochs=2)
        runs.append(noise.drawn)
    assert runs[0] == runs[1]
    columns = [{row[column] for run in (runs[0], runs[2]) for row in run} for column in range(3)]
    assert [len(column) for column in columns] == [16, 16, 16]  # every update of its own


def test_attaching_a_transform_draws_nothing_from_the_runs_generators():
    states = []
    for transform in (None, Noise()):
        trainer = made(transform, model=TwoTower(lambda: nn.Dropout(0.5)).double())
        torch.manual_seed(2)
        random.seed(2)
        np.random.seed(2)
        trainer.run(loader(), max_epochs=1)
        states.append(random_state())
    assert str(states[0]) == str(states[1])
    assert torch.equal(states[0]["torch"], states[1]["torch"])
    assert torch.equal(states[0]["numpy"]["keys"], states[1]["numpy"]["keys"])


def test_generators_are_as_they_were_after_a_transform_that_fails():
    def fail(batch: object) -> object:
        torch.rand(1)
        raise ArithmeticError("planted")

    trainer, data = made(fail), loader()
    before = torch.get_rng_state()
    with pytest.raises(ArithmeticError, match="planted"):
        trainer.run(data, max_epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [1, 4])
def test_a_batch_is_transformed_before_it_is_cut(size: int):
    whole = gradients_of(made(Noise()), loader()[0])
    pieces = gradients_of(made(Noise(), microbatch_size=size), loader()[0])
    assert relative_error(pieces, whole) < 1e-12


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_a_run_that_is_cut_transforms_alike(stop: int):
    from diptych.engine.state.run_state import load_run_state, run_state

    whole, cut = made(Noise(), seed=0), made(Noise(), seed=0)
    whole.run(pairs_loader(), max_epochs=3)
    cut.add_event_handler(Events.ITERATION_COMPLETED(once=stop), cut.terminate)
    cut.run(pairs_loader(), max_epochs=3)
    resumed = made(Noise(), seed=0)
    resumed.state.dataloader = data = pairs_loader()
    load_run_state(resumed, run_state(cut))
    resumed.run(data, max_epochs=3)
    assert same(whole, resumed)
    assert whole.transform.drawn == cut.transform.drawn + resumed.transform.drawn


def test_a_repeated_iteration_draws_the_same_again():
    plain, repeated = made(Noise()), made(Noise())
    plain.run(loader(), max_epochs=1)

    def fail() -> None:
        raise ArithmeticError("planted")

    data = loader()
    handle = repeated.add_event_handler(StepEvents.LOSS_COMPUTED(once=2), fail)
    with pytest.raises(ArithmeticError):
        repeated.run(data, max_epochs=1)
    handle.remove()
    repeated.run(data, max_epochs=1)
    assert repeated.transform.drawn[1] == repeated.transform.drawn[2]
    assert same(plain, repeated)


def test_evaluations_are_not_transformed():
    trainer, batches = made(Noise()), loader(1)
    evaluator = Evaluator(trainer.model, task=tasks.image_text, device="cpu")
    outputs: list[Tensor] = []
    evaluator.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: outputs.append(e.state.output)
    )
    evaluator.run(batches)
    assert trainer.transform.drawn == []


def test_another_transform_may_take_its_place():
    trainer, noise = made(lambda batch: batch), Noise()
    data = loader()
    trainer.run(data, max_epochs=1)
    trainer.transform = noise
    trainer.run(data, max_epochs=2)
    assert len(noise.drawn) == len(data)


def test_a_module_as_transform_goes_to_the_device():
    transform = nn.Linear(IMAGE, IMAGE)
    trainer = made(OnKeys(transform, "image"), device="meta")
    assert trainer.transform.transform is transform
    assert transform.weight.device.type == "meta"


def test_a_transform_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match="transform must be a function of a batch, got 3"):
        made(3)


def test_a_step_that_would_not_call_the_transform_is_refused():
    with pytest.raises(ValueError, match="transform needs a TrainStep"):
        made(Noise(), step=lambda trainer, batch: None)


def test_a_transform_that_returns_nothing_is_an_error():
    with pytest.raises(BatchError, match="transform must return a batch, got None"):
        made(lambda batch: None).run(loader(), max_epochs=1)


# -- OnKeys ------------------------------------------------------------------------------------


def test_single_entries_are_transformed_and_the_others_kept():
    batch = {"first": torch.ones(2), "second": torch.ones(2), "label": torch.ones(2)}
    found = OnKeys(lambda x: x + torch.rand(1), "first", "second")(batch)
    assert not torch.equal(found["first"], found["second"])
    assert found["label"] is batch["label"]
    assert torch.equal(batch["first"], torch.ones(2))


def test_an_entry_that_is_missing_is_named():
    with pytest.raises(BatchError, match="must hold picture to transform, got image, text"):
        OnKeys(torch.sin, "picture")({"image": 1, "text": 2})
    with pytest.raises(BatchError, match="a mapping for OnKeys, got tuple"):
        OnKeys(torch.sin, "image")((1, 2))


def test_keys_without_a_name_or_a_function_are_refused():
    with pytest.raises(ValueError, match="keys must name"):
        OnKeys(torch.sin)
    with pytest.raises(TypeError, match="function of a tensor, got 'image'"):
        OnKeys("image", "image")


def test_kornias_augmentations_are_transforms():
    pytest.importorskip("kornia", reason="needs the extra kornia")
    from kornia.augmentation import ColorJiggle, RandomAffine, RandomHorizontalFlip

    torch.manual_seed(0)
    augmentation = nn.Sequential(
        RandomHorizontalFlip(), RandomAffine(10.0, p=0.5), ColorJiggle(0.2, 0.2, 0.2, 0.1)
    )
    seen: list[list[Tensor]] = []
    for _ in range(2):
        images: list[Tensor] = []

        def take(model: nn.Module, batch: dict[str, Tensor], images=images) -> dict[str, Tensor]:
            images.append(batch["image"])
            return {"logits": model(batch["image"].flatten(1)), "labels": batch["label"]}

        model, loss = nn.Linear(3 * 64, 2), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(
            model,
            loss,
            optimizer,
            task=take,
            transform=OnKeys(augmentation, "image"),
            device="cpu",
        )
        picture = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        trainer.run([{"image": picture, "label": torch.zeros(4).long()}] * 2, max_epochs=1)
        seen.append(images)
    assert all(map(torch.equal, *seen))
    assert not torch.equal(seen[0][0], seen[0][1])
    assert not torch.equal(seen[0][0], picture)
