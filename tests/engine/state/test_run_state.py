"""The state of a whole run: it goes on bit for bit through a file, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import pytest
import torch
from ignite.engine import Events
from ignite.handlers import EarlyStopping
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diptych.engine import (
    CheckpointError,
    ResumeError,
    RunEvents,
    SeededLoader,
    Trainer,
    in_groups,
)
from diptych.engine.modules import unwrapped
from diptych.engine.state.handler_states import stateful_handlers
from diptych.engine.state.module_state import clean_state_dict, load_clean_state_dict
from diptych.engine.state.run_state import (
    _metrics_of_this_rank,
    load_run_state,
    run_state,
)
from tests.engine.models import CoupledLoss, TwoTower, paired, sgd, stored, trainer_of
from tests.engine.state.scripts import identical

PAIRS = paired(20)


class Pairs(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[index] + 0.1 * torch.randn(()) for key, value in PAIRS.items()}


@attrs.define(eq=False)
class CountsSteps:
    """A handler with a memory."""

    steps: int = 0

    def attach(self, trainer: Trainer) -> None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.count)

    def count(self) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.steps = state_dict["steps"]


def made(seed: int = 0) -> tuple[Trainer, SeededLoader, list[Any]]:
    torch.manual_seed(seed)
    model = TwoTower(lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.3))).double()
    loss = CoupledLoss().double()
    optimizer = torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=0.01)
    trainer = trainer_of(model, loss, optimizer=optimizer, log_every=3, microbatch_size=3)
    trainer.attach(CountsSteps())
    records: list[Any] = []
    trainer.add_event_handler("LOGGED", lambda: records.append(trainer.metrics.record))
    return trainer, SeededLoader(Pairs(), 5, seed=3), records


def progress(trainer: Trainer) -> dict[str, Any]:
    """Return the state of a run without its script, whose functions at events differ here."""
    state = run_state(trainer)
    del state["identity"]["functions"]
    return state


@pytest.mark.parametrize("at", [1, 3, 4, 7])
def test_a_run_goes_on_from_any_safe_point_as_if_nothing_had_happened(at: int):
    whole, loader, records = made()
    saved: list[Any] = []
    whole.add_event_handler(
        RunEvents.SAFE_POINT(once=at), lambda: saved.append((stored(run_state(whole)), [*records]))
    )
    whole.run(loader, max_epochs=3)
    state, before = saved[0]

    resumed, again, later = made(seed=99)
    resumed.add_event_handler(RunEvents.RESTORE, lambda: load_run_state(resumed, state))
    torch.rand(7)  # another process has drawn other numbers
    resumed.run(again, max_epochs=3)
    assert identical(progress(resumed), progress(whole))
    assert [*before, *later] == records
    assert resumed.handlers[0].steps == 12


def order_of(*, epoch_length: int, stop: int | None, in_group: int = 1) -> list[Any]:
    """Return the samples of three epochs, saved and gone on with elsewhere after one of them."""
    seen: list[Any] = []
    state: Any = None
    for limit in (3,) if stop is None else (stop, 3):
        trainer, loader, _ = made()
        data = loader if in_group == 1 else in_groups(Generated(), in_group)
        if state is not None:
            trainer.add_event_handler(
                RunEvents.RESTORE, lambda t, state=state: load_run_state(t, state)
            )
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda t: seen.append(t.state.batch["image"].sum().item())
        )
        trainer.run(data, max_epochs=limit, epoch_length=epoch_length)
        state = stored(run_state(trainer))
    return seen


class Generated(DataLoader):
    """A loader whose order comes from a generator of its own."""

    def __init__(self) -> None:
        super().__init__(Pairs(), 5, shuffle=True, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("epoch_length", [3, 4, 7])
@pytest.mark.parametrize("stop", [1, 2])
def test_epochs_that_are_no_whole_passes_go_on_with_the_samples_that_come_next(
    epoch_length: int, stop: int
):
    whole = order_of(epoch_length=epoch_length, stop=None)
    assert order_of(epoch_length=epoch_length, stop=stop) == whole


def test_a_loader_that_cannot_go_inside_a_pass_is_told_so():
    trainer, _, _ = made()
    trainer.run(Generated(), max_epochs=1, epoch_length=3)
    state = stored(run_state(trainer))
    resumed, _, _ = made()
    resumed.add_event_handler(RunEvents.RESTORE, lambda: load_run_state(resumed, state))
    with pytest.raises(
        ResumeError, match="inside a pass over the data, where its epochs of 3 iterations end"
    ):
        resumed.run(Generated(), max_epochs=2, epoch_length=3)


def test_groups_go_on_in_the_order_of_their_loaders_generator():
    whole = order_of(epoch_length=2, stop=None, in_group=2)
    assert len(set(whole)) == 6
    assert order_of(epoch_length=2, stop=1, in_group=2)[::1] == whole


def test_the_count_of_skipped_steps_goes_on():
    model, loss = TwoTower(), CoupledLoss()
    first, second = (trainer_of(model, loss, precision="fp16") for _ in range(2))
    batch = {key: value.float() for key, value in PAIRS.items()}
    first.run([{**batch, "image": batch["image"] * 1e30}], max_epochs=1)
    assert first.skipped_steps == 1
    load_run_state(second, stored(run_state(first)))
    second.run([{**batch, "image": batch["image"] * 1e30}], max_epochs=2)
    assert second.skipped_steps == 2


def other_model() -> Trainer:
    return trainer_of(nn.Sequential(nn.Linear(3, 2)).double())


def other_optimizer() -> Trainer:
    trainer, _, _ = made(seed=1)
    return trainer_of(trainer.model, trainer.loss, optimizer=sgd(trainer.model, trainer.loss))


def other_groups() -> Trainer:
    trainer, _, _ = made(seed=1)
    groups = [{"params": list(m.parameters())} for m in (trainer.model, trainer.loss)]
    return trainer_of(trainer.model, trainer.loss, optimizer=torch.optim.AdamW(groups))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            other_model,
            r"model must .* lacks 0\.bias, 0\.weight; which has extra image\.0\.bias",
        ),
        (other_optimizer, "optimizer must be the checkpoint's AdamW, got SGD"),
        (other_groups, r"groups, of \[14\] parameters, got \[12, 2\]"),
    ],
)
def test_a_state_of_another_run_is_refused_and_changes_nothing(other, message):
    trainer, loader, _ = made()
    trainer.run(loader, max_epochs=1)
    stranger = other()
    before = stored(run_state(stranger))
    with pytest.raises(CheckpointError, match=message):
        load_run_state(stranger, stored(run_state(trainer)))
    assert identical(stored(run_state(stranger)), before)


def test_a_state_of_another_number_of_handlers_of_one_class_is_refused():
    trainer, loader, _ = made()
    trainer.run(loader, max_epochs=1)
    state = run_state(trainer)
    trainer.attach(CountsSteps())
    with pytest.raises(
        CheckpointError, match="CountsSteps handlers must be the checkpoint's, 1, got 2"
    ):
        load_run_state(trainer, state)


def test_an_optimizer_with_its_parameters_in_another_order_is_refused():
    trainer, loader, _ = made()
    trainer.run(loader, max_epochs=1)
    state = run_state(trainer)
    other, loader, _ = made()
    group = other.optimizer.param_groups[0]
    group["params"] = group["params"][::-1]
    other.state.dataloader = loader
    with pytest.raises(
        CheckpointError, match=r"in the checkpoint's order: in group 0 the checkpoint has \S+, got"
    ):
        load_run_state(other, state)
    assert other.state.iteration == 0
    del state["parameters"]  # of an earlier version, which did not write them down
    group["params"] = group["params"][::-1]
    load_run_state(other, state)
    assert other.state.iteration == trainer.state.iteration


def test_a_state_of_a_newer_format_is_refused():
    trainer = trainer_of()
    with pytest.raises(CheckpointError, match=r"format must be at most 3 .*got 999"):
        load_run_state(trainer, {**run_state(trainer), "format": 999})


def test_handlers_with_a_state_are_found_however_they_were_added():
    trainer = trainer_of()
    attached, added, filtered = CountsSteps(), CountsSteps(), CountsSteps()
    stopping = EarlyStopping(patience=2, score_function=lambda _: 0.0, trainer=trainer)
    trainer.attach(attached)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, added.count)
    trainer.add_event_handler(Events.EPOCH_COMPLETED(every=2), filtered.count)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, stopping)
    assert stateful_handlers(trainer) == {
        "CountsSteps": attached,
        "CountsSteps#2": added,
        "CountsSteps#3": filtered,
        "EarlyStopping": stopping,
    }


def test_keys_are_those_of_the_bare_module_whatever_wraps_it():
    model = TwoTower()
    wrapped = nn.DataParallel(torch.compile(model))
    assert unwrapped(wrapped) is model
    assert list(clean_state_dict(wrapped)) == list(model.state_dict())
    model.cpu()  # where the wrapper found a GPU
    other = TwoTower()
    other.image = torch.compile(other.image)
    assert list(clean_state_dict(other)) == list(model.state_dict())
    load_clean_state_dict(other, model.state_dict())
    assert identical(clean_state_dict(other), model.state_dict())


def test_the_values_since_the_last_log_point_are_each_ranks_own(monkeypatch):
    states = [
        {"window": {"rows": [{"tags": ["loss"], "values": values}], "numbers": {}}, "epoch": {}}
        for values in (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0]))
    ]
    (merged,) = _metrics_of_this_rank(states)["window"]["rows"]
    assert merged["values"].tolist() == [2.0, 4.0]
    monkeypatch.setattr("diptych.engine.state.run_state.world_size", lambda: 2)
    monkeypatch.setattr("diptych.engine.state.run_state.rank", lambda: 1)
    assert _metrics_of_this_rank(states) is states[1]


def test_the_output_of_an_iteration_that_was_left_is_read_by_the_handlers_to_come(caplog):
    def make(fails: bool) -> tuple[Trainer, list[Any]]:
        torch.manual_seed(0)
        trainer, read = trainer_of(), []

        def fail() -> None:
            if fails and trainer.state.iteration == 2:
                raise TimeoutError

        trainer.add_event_handler(Events.ITERATION_COMPLETED, fail)
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda: read.append(trainer.state.output)
        )
        return trainer, read

    batches = [paired(3) for _ in range(3)]
    whole, expected = make(fails=False)
    whole.run(batches, max_epochs=1)
    left, before = make(fails=True)
    with pytest.raises(TimeoutError):
        left.run(batches, max_epochs=1)
    resumed, after = make(fails=False)
    resumed.state.dataloader = batches
    load_run_state(resumed, stored(run_state(left)))
    resumed.run(batches, max_epochs=1)
    found = [*before, *after]
    assert [one.loss.item() for one in found] == [one.loss.item() for one in expected]
    assert [one.batch_size for one in found] == [3, 3, 3]
    assert "must consist of" not in caplog.text
