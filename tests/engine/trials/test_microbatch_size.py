"""The largest micro-batch is found on an accelerator, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diptych.engine import BatchError, Trainer, find_microbatch_size, tasks
from diptych.engine.trials.microbatch_size import largest


def trainer_on(device: str) -> Trainer:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.Adam(model.parameters())
    return Trainer(
        model, nn.CrossEntropyLoss(), optimizer, task=tasks.classification, device=device
    )


def test_the_first_half_that_fits_is_the_largest():
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= 30

    assert largest(100, fits) == 25
    assert tried == [100, 50, 25]


def test_a_sample_that_does_not_fit_is_an_error_with_what_to_do():
    with pytest.raises(BatchError, match=r"one sample at a time.*gradient checkpointing"):
        largest(8, lambda size: False)


def test_a_cpu_is_refused():
    with pytest.raises(ValueError, match=r"trainer must be on a GPU.*got cpu"):
        find_microbatch_size(trainer_on("cpu"), {"image": torch.ones(2, 4)})
    with pytest.raises(ValueError, match="headroom must lie in"):
        find_microbatch_size(trainer_on("cpu"), {"image": torch.ones(2, 4)}, headroom=1.0)


@pytest.mark.gpu
def test_a_batch_that_needs_too_much_memory_is_cut_and_the_trainer_is_as_before():
    total = torch.cuda.get_device_properties(0).total_memory

    class Hungry(nn.Module):
        """Takes a fortieth of the memory for each sample of a forward pass."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            held = torch.empty(len(x) * total // 40, dtype=torch.uint8, device=x.device)
            return self.linear(x) + 0.0 * held[:1]

    model = Hungry()
    optimizer = torch.optim.Adam(model.parameters())
    trainer = Trainer(
        model, nn.CrossEntropyLoss(), optimizer, task=tasks.classification, device="cuda"
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = {"image": torch.randn(128, 4), "label": torch.zeros(128, dtype=torch.long)}

    assert find_microbatch_size(trainer, batch) == 32
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert trainer.settings.microbatch_size is None
    assert trainer.state.iteration == 0
    assert not optimizer.state
