"""The certificate: it passes what is whole and names what is forgotten."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Events
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from diptych.engine import ResumeError, SeededLoader, Trainer, certify, tasks


class Data(TensorDataset):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(6), y


def data() -> Data:
    return Data(torch.linspace(-1, 1, 132).reshape(22, 6), torch.arange(22) % 4)


def build(*handlers, loader=None, transform=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        task=tasks.classification,
        transform=transform,
        device="cpu",
        seed=4,
    )
    trainer.attach(*handlers)
    return trainer, loader or SeededLoader(data(), 4)


class Decay:
    """Lowers the rate by a count of its own, which it may forget to save."""

    def __init__(self) -> None:
        self.count = 0

    def attach(self, trainer: Trainer) -> None:
        trainer.add_event_handler(Events.ITERATION_STARTED, self.lower)

    def lower(self, trainer: Trainer) -> None:
        self.count += 1
        trainer.optimizer.param_groups[0]["lr"] = 0.05 / self.count


class SavedDecay(Decay):
    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


@pytest.mark.parametrize("at", [1, 6, 7, 19])
def test_a_run_whose_state_is_saved_passes_wherever_it_is_cut(at):
    report = certify.interruption(lambda: build(SavedDecay()), steps=20, at=at)
    assert report.passed, str(report)
    assert "nothing changes" in str(report)


def test_a_handler_that_forgets_its_count_is_named():
    report = certify.interruption(lambda: build(Decay()), steps=20, at=7)
    assert not report.passed
    assert [difference.name for difference in report.forgotten] == ["Decay.count"]
    assert "Decay.count: 7 without, 0 with an interruption" in str(report)


class Shift:
    """Moves images by a random number, and by a count that nobody saves if it `counts`."""

    def __init__(self, *, counts: bool) -> None:
        self.count, self.counts = 0, counts

    def __call__(self, batch: list[torch.Tensor]) -> list[torch.Tensor]:
        self.count += self.counts
        return [batch[0] + torch.rand(1) + self.count, batch[1]]


def test_what_a_transform_draws_survives_an_interruption_and_what_it_counts_is_named():
    drawing, counting = (
        certify.interruption(lambda c=c: build(transform=Shift(counts=c)), steps=12, at=7)
        for c in (False, True)
    )
    assert drawing.passed, str(drawing)
    assert [difference.name for difference in counting.forgotten] == ["transform.count"]


def test_a_buffer_that_is_not_persistent_is_restored():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            return self.layer(x) / self.seen

    def make():
        torch.manual_seed(0)
        model = Counting()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(
            model, nn.CrossEntropyLoss(), optimizer, task=tasks.classification, device="cpu"
        )
        return trainer, SeededLoader(data(), 4)

    assert not certify.interruption(make).differences


def test_a_loader_without_a_position_is_told_apart():
    with pytest.raises(ResumeError, match=r"got DataLoader\. Use a SeededLoader"):
        certify.interruption(lambda: build(loader=DataLoader(data(), 4)))


def test_a_loader_without_a_position_passes_at_the_end_of_an_epoch():
    def plain():
        inputs, labels = data().tensors
        return build(loader=DataLoader(TensorDataset(inputs, labels), 4))

    assert certify.interruption(plain, steps=10, at=6).passed


def test_the_generators_of_the_caller_are_left_alone():
    before = torch.get_rng_state()
    certify.interruption(build, steps=3, at=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_interruption_outside_the_run_is_refused():
    with pytest.raises(ValueError, match=r"at must lie in \[1, 19\].*got 20"):
        certify.interruption(build, steps=20, at=20)
