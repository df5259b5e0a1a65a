"""ModalityBalancing: it reduces an imbalance, by scaling the weaker component only."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from diptych.engine import SeededLoader, StepEvents, Trainer, certify, tasks
from diptych.handlers.optimization.gradient_clipping import GradientClipping
from diptych.handlers.optimization.modality_balancing import ModalityBalancing
from tests.handlers.runs import kept_records
from tests.losses.ranks import Ranks


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)


class Imbalanced(nn.Module):
    """The gradient of the text tower is `factor` times too large (or small)."""

    couples_samples = True

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return (image - 1).square().mean() + self.factor * (text - 1).square().mean()


def make_loader(batches: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randn(6, 4, generator=generator),
            "text": torch.randn(6, 5, generator=generator),
        }
        for _ in range(batches)
    ]


class Pairs(Dataset[dict[str, Tensor]]):
    """The samples of all batches, one by one, for a loader that knows its place."""

    def __init__(self) -> None:
        batches = make_loader()
        self.samples = {
            key: torch.cat([batch[key] for batch in batches]) for key in ("image", "text")
        }

    def __len__(self) -> int:
        return len(self.samples["image"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: values[index] for key, values in self.samples.items()}


def make_trainer(factor: float = 20.0) -> Trainer:
    torch.manual_seed(1)
    model = Towers()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return Trainer(
        model, Imbalanced(factor), optimizer, task=tasks.image_text, device="cpu", log_every=1
    )


def norms_of(trainer: Trainer) -> tuple[float, float]:
    """The norms of both towers' gradients, by a loop."""
    parts = (trainer.model.image, trainer.model.text)
    image, text = (
        math.sqrt(sum(float(x) ** 2 for p in part.parameters() for x in p.grad.double().flatten()))
        for part in parts
    )
    return image, text


def run_noting(handler: ModalityBalancing, factor: float) -> tuple[list, list, list]:
    """Return the norms before and after the handler, and the records."""
    trainer = make_trainer(factor)
    before: list[tuple[float, float]] = []
    after: list[tuple[float, float]] = []
    trainer.add_event_handler(StepEvents.GRADIENTS_READY, lambda: before.append(norms_of(trainer)))
    trainer.attach(handler)
    trainer.add_event_handler(StepEvents.GRADIENTS_READY, lambda: after.append(norms_of(trainer)))
    records = kept_records(trainer)
    trainer.run(make_loader(), max_epochs=1)
    return before, after, [record.values for record in records]


@pytest.mark.parametrize(("factor", "weaker"), [(20.0, 0), (0.05, 1)])
def test_only_the_weaker_component_is_scaled_up(factor, weaker):
    before, after, _ = run_noting(ModalityBalancing(warmup=0, max_scale=1e3), factor)
    for raw, balanced in zip(before, after, strict=True):
        assert raw[weaker] < raw[1 - weaker]
        assert balanced[weaker] > 2 * raw[weaker]
        assert balanced[1 - weaker] == raw[1 - weaker]
        assert abs(math.log(balanced[0] / balanced[1])) < abs(math.log(raw[0] / raw[1]))


def test_without_smoothing_the_target_ratio_is_reached_at_once():
    before, after, records = run_noting(
        ModalityBalancing(warmup=0, max_scale=1e3, smoothing=0.0, ratio=2.0), 20.0
    )
    for raw, balanced, record in zip(before, after, records, strict=True):
        assert balanced[0] / balanced[1] == pytest.approx(2.0, rel=1e-4)
        assert record["balancing/ratio"] == pytest.approx(raw[0] / raw[1], rel=1e-4)
        assert record["balancing/scale/image"] == pytest.approx(2.0 * raw[1] / raw[0], rel=1e-4)
        assert record["balancing/scale/text"] == 1.0


def test_the_mean_weighs_each_iteration_by_the_smoothing():
    before, _, records = run_noting(ModalityBalancing(warmup=99, smoothing=0.5), 20.0)
    logs = [math.log(image / text) for image, text in before]
    for count, record in enumerate(records, start=1):
        weights = [0.5 ** (count - 1 - i) for i in range(count)]
        mean = sum(w * v for w, v in zip(weights, logs, strict=False)) / sum(weights)
        assert record["balancing/ratio"] == pytest.approx(math.exp(mean), rel=1e-4)


def test_a_scale_is_bounded():
    before, after, _ = run_noting(ModalityBalancing(warmup=0, max_scale=1.5), 20.0)
    for raw, balanced in zip(before, after, strict=True):
        assert balanced[0] / raw[0] == pytest.approx(1.5, rel=1e-5)


def test_nothing_is_scaled_during_the_warm_up():
    before, after, records = run_noting(ModalityBalancing(warmup=3), 20.0)
    assert before[:3] == after[:3]
    assert all(b[0] > r[0] for r, b in zip(before[3:], after[3:], strict=True))
    assert [record["balancing/scale/image"] for record in records[:3]] == [1.0] * 3


def test_a_nonfinite_or_missing_gradient_does_not_enter_the_mean():
    trainer = make_trainer()

    @trainer.on(StepEvents.GRADIENTS_READY)
    def plant() -> None:
        if trainer.state.iteration == 3:
            trainer.model.image.weight.grad.fill_(math.nan)
        if trainer.state.iteration == 4:
            for parameter in trainer.model.text.parameters():
                parameter.grad = None

    trainer.attach(ModalityBalancing(warmup=99))
    records = kept_records(trainer)
    trainer.run(make_loader(), max_epochs=1)
    ratios = [record.values["balancing/ratio"] for record in records]
    assert ratios[1] == ratios[2] == ratios[3]
    assert all(math.isfinite(ratio) for ratio in ratios)


def test_clipping_bounds_the_balanced_gradients():
    trainer = make_trainer()
    trainer.attach(ModalityBalancing(warmup=0), GradientClipping(max_norm=0.1))
    found = []
    trainer.add_event_handler(
        StepEvents.GRADIENTS_READY, lambda: found.append(math.hypot(*norms_of(trainer)))
    )
    trainer.run(make_loader(), max_epochs=1)
    assert found == pytest.approx([0.1] * 8, rel=1e-3)


def test_an_interruption_does_not_change_the_mean():
    def build() -> tuple[Trainer, SeededLoader]:
        return make_trainer().attach(ModalityBalancing(warmup=2)), SeededLoader(Pairs(), 6)

    report = certify.interruption(build, steps=12, at=5)
    assert report.passed, str(report)


def test_a_run_that_starts_over_starts_a_new_mean():
    handler = ModalityBalancing(warmup=0)
    trainer = make_trainer().attach(handler)
    trainer.run(make_loader(), max_epochs=1)
    weight = float(handler.state_dict()["weight"])
    trainer.state.max_epochs = None
    trainer.run(make_loader(), max_epochs=1)
    assert float(handler.state_dict()["weight"]) == weight


def balanced_on_a_rank(half: int) -> tuple[list[Tensor], float]:
    """Train on this rank's half of each batch; return the weights and the last ratio."""
    trainer = make_trainer().attach(ModalityBalancing(warmup=2, max_scale=10.0))
    records = kept_records(trainer)
    size = 6 // dist.get_world_size() if dist.is_initialized() else 6
    batches = [
        {key: value[half * size : (half + 1) * size] for key, value in batch.items()}
        for batch in make_loader()
    ]
    trainer.run(batches, max_epochs=1)
    weights = [p.detach() for p in trainer.model.parameters()]
    return weights, records[-1].values["balancing/ratio"]


def test_two_ranks_compute_the_scales_of_one_process(ranks: Ranks):
    (first, ratio), (second, _) = ranks.run(balanced_on_a_rank, [(0,), (1,)])
    alone, expected = balanced_on_a_rank(0)
    for a, b, c in zip(first, second, alone, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-7)
    assert ratio == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"components": ("image",)}, "components must be two, got"),
        ({"components": "it"}, "components must be two, got 'it'"),
        ({"ratio": 0.0}, "ratio must be > 0 and finite, got 0.0"),
        ({"max_scale": 0.5}, "max_scale must be >= 1 and finite, got 0.5"),
        ({"smoothing": 1.0}, r"smoothing must lie in \[0, 1\), got 1.0"),
        ({"warmup": -1}, "warmup must be a whole number of iterations >= 0, got -1"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ModalityBalancing(**arguments)


def test_components_that_share_a_parameter_are_refused():
    with pytest.raises(ValueError, match="must share no parameter, got 1 that belong to both"):
        make_trainer().attach(ModalityBalancing(components=("image", "image.bias")))


def test_it_is_refused_after_clipping():
    with pytest.raises(ValueError, match="must be attached before GradientClipping"):
        make_trainer().attach(GradientClipping(max_norm=1.0), ModalityBalancing())
