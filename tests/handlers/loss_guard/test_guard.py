"""LossGuard: which batches it catches, and that a skipped update changes nothing."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Events
from torch import Tensor

from diptych.engine import StepEvents, Trainer, certify
from diptych.handlers import CheckpointManager, GradientClipping, ModalityBalancing
from diptych.handlers.loss_guard.fault_records import read_record
from diptych.handlers.loss_guard.guard import FaultError, LossGuard
from tests.handlers.guarded import (
    BAD,
    BATCHES,
    OPTIMIZERS,
    batches,
    everything,
    make_trainer,
    seeded_loader,
)
from tests.handlers.runs import kept_records
from tests.losses.ranks import Ranks

every_optimizer = pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def states_of(trainer: Trainer) -> list[dict[str, Tensor]]:
    """Return a list that fills with everything before and after each iteration."""
    states: list[dict[str, Tensor]] = []
    for event in (Events.ITERATION_STARTED, Events.ITERATION_COMPLETED):
        trainer.add_event_handler(event, lambda: states.append(everything(trainer)))
    return states


@every_optimizer
@pytest.mark.parametrize("fault", ["nan", "spike"])
def test_a_skipped_update_changes_no_weight_no_buffer_and_no_state_of_the_optimizer(
    optimizer, fault
):
    trainer = make_trainer(optimizer).attach(LossGuard(window=3))
    states = states_of(trainer)
    trainer.run(batches(fault), max_epochs=1)
    pairs = list(zip(states[::2], states[1::2], strict=True))
    unchanged = [i for i, (before, after) in enumerate(pairs, 1) if same(before, after)]
    assert unchanged == [BAD]
    assert all(value.isfinite().all() for value in states[-1].values())


@every_optimizer
def test_the_run_after_a_skipped_update_is_the_one_that_never_had_it(optimizer):
    def run(handler: LossGuard | None, loader: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        trainer = make_trainer(optimizer)
        trainer.model.image[2].p = 0.0  # a batch more draws more random numbers
        trainer.attach(*([handler] if handler else []))
        trainer.run(loader, max_epochs=1)
        return everything(trainer)

    whole = batches("nan")
    without = whole[: BAD - 1] + whole[BAD:]
    assert same(run(LossGuard(), whole), run(None, without))


@every_optimizer
def test_a_skipped_first_update_leaves_no_state_behind(optimizer):
    trainer = make_trainer(optimizer).attach(LossGuard())
    trainer.run(batches("nan", at=(1,)), max_epochs=1)
    bare = make_trainer(optimizer)
    bare.model.load_state_dict(trainer.model.state_dict())
    assert all(value.isfinite().all() for value in everything(trainer).values())
    momentum = [s.get("momentum_buffer") for s in trainer.optimizer.state.values()]
    assert all(m is None or m.abs().max() < 1e3 for m in momentum)


@every_optimizer
@pytest.mark.parametrize("recorded", [False, True])
def test_the_guard_does_not_change_a_healthy_run(optimizer, recorded, tmp_path):
    guarded, bare = make_trainer(optimizer), make_trainer(optimizer)
    guarded.attach(LossGuard(tmp_path if recorded else None, window=3))
    for trainer in (guarded, bare):
        trainer.run(batches(None), max_epochs=2)
    assert same(everything(guarded), everything(bare))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("optimizer", ["adamw", "fused adamw"])
def test_caught_batches_are_counted_and_logged(optimizer, caplog):
    guard = LossGuard(window=2)
    trainer = make_trainer(optimizer).attach(guard)
    records = kept_records(trainer)
    loader = batches("nan", at=(2,))
    loader[5] = batches("spike", at=(6,))[5]
    with caplog.at_level(logging.WARNING):
        trainer.run(loader, max_epochs=1)
    assert [record.values["guard/caught"] for record in records] == [1, 2, 2]
    assert [record.values["guard/spikes"] for record in records] == [0, 1, 1]
    assert guard.caught == 2
    assert caplog.text.count("skipped") == 2


def test_a_spike_of_the_gradient_alone_is_caught():
    guard = LossGuard(window=3)
    trainer = make_trainer()

    @trainer.on(StepEvents.GRADIENTS_READY)
    def plant() -> None:
        if trainer.state.iteration == BAD:
            trainer.model.text.weight.grad.mul_(1e4)

    trainer.attach(guard).run(batches(None), max_epochs=1)
    assert guard.caught == 1


def test_clipping_before_the_guard_hides_nothing_from_it():
    guard = LossGuard(window=3)
    trainer = make_trainer().attach(GradientClipping(max_norm=1e-3), guard)
    trainer.run(batches("spike"), max_epochs=1)
    assert guard.caught == 1


def test_spikes_are_judged_against_the_values_before_and_not_against_a_constant():
    for size in (1e-3, 1e3):
        guard = LossGuard(window=3)
        trainer = make_trainer()
        trainer.model.image[1].eval()
        loader = [{**b, "image": size * b["image"], "text": size * b["text"]} for b in batches()]
        loader[BAD - 1] = {**loader[BAD - 1], "image": loader[BAD]["image"]}
        trainer.attach(guard).run(loader, max_epochs=1)
        assert guard.caught == 0


def make_fp16_trainer(optimizer: str) -> Trainer:
    try:
        return make_trainer(optimizer, precision="fp16")
    except ValueError as error:  # some CPUs cannot
        pytest.skip(str(error))


@pytest.mark.parametrize("optimizer", ["adamw", "fused adamw"])
def test_an_overflow_while_the_scaler_searches_its_scale_is_not_caught(optimizer):
    trainer, guard = make_fp16_trainer(optimizer), LossGuard(budget=0)
    trainer.add_event_handler(
        StepEvents.LOSS_COMPUTED(once=2), lambda: trainer.scaler.update(new_scale=2.0**40)
    )
    trainer.attach(guard).run(batches(None), max_epochs=1)
    assert guard.caught == 0
    assert float(trainer.skipped_steps) > 1


@pytest.mark.parametrize("optimizer", ["adamw", "fused adamw"])
def test_in_fp16_a_fault_is_skipped_and_the_scaler_keeps_working(optimizer):
    trainer, guard = make_fp16_trainer(optimizer), LossGuard(window=3)
    # A scale that fits from the start.
    trainer.add_event_handler(
        StepEvents.FORWARD_COMPLETED(once=1), lambda: trainer.scaler.load_state_dict(small)
    )
    small = {**trainer.scaler.state_dict(), "scale": 8.0}

    @trainer.on(StepEvents.GRADIENTS_READY(once=6))
    def plant() -> None:
        trainer.model.text.weight.grad.mul_(1e4)

    trainer.attach(guard)
    states = states_of(trainer)
    trainer.run(batches(), max_epochs=1)
    pairs = zip(states[::2], states[1::2], strict=True)
    assert [i for i, (a, b) in enumerate(pairs, 1) if same(a, b)] == [BAD, 6]
    assert guard.caught == 2
    assert float(trainer.skipped_steps) == 1  # of the NaN, which the scaler sees too
    assert trainer.scaler.get_scale() == 4.0
    assert not hasattr(trainer.optimizer, "found_inf")


def test_without_a_threshold_only_nonfinite_values_are_caught():
    guard = LossGuard(spike=None, window=3)
    make_trainer().attach(guard).run(batches("spike"), max_epochs=1)
    assert guard.caught == 0


@pytest.mark.parametrize("optimizer", ["adamw", "fused adamw"])
def test_more_batches_than_the_budget_end_the_run_with_an_error(optimizer):
    trainer = make_trainer(optimizer).attach(LossGuard(budget=2))
    with pytest.raises(FaultError, match=r"may skip 2 updates, got 3\. Lower the learning rate"):
        trainer.run(batches("nan", at=(2, 5, 6, 7)), max_epochs=1)
    assert all(value.isfinite().all() for value in everything(trainer).values())


@pytest.mark.parametrize("optimizer", ["adamw", "fused adamw"])
def test_stop_ends_the_run_with_the_weights_from_before(optimizer):
    trainer = make_trainer(optimizer).attach(LossGuard(policy="stop"))
    states = states_of(trainer)
    trainer.run(batches(), max_epochs=3)
    assert trainer.state.iteration == BAD
    assert same(states[-2], states[-1])


@pytest.mark.parametrize("optimizer", ["adamw", "fused adamw"])
def test_raise_names_the_values_and_the_record(optimizer, tmp_path):
    trainer = make_trainer(optimizer).attach(LossGuard(tmp_path, policy="raise"))
    states = states_of(trainer)
    with pytest.raises(FaultError, match=rf"iteration {BAD}: the loss is nan.*recorded in (\S+)"):
        trainer.run(batches(), max_epochs=1)
    assert same(states[-1], everything(trainer))
    assert len(list(tmp_path.glob("*.pt"))) == 1


def test_a_record_contains_the_state_before_the_update(tmp_path):
    trainer = make_trainer()
    trainer.attach(CheckpointManager(tmp_path / "checkpoints", every=2), LossGuard(tmp_path))
    states = states_of(trainer)
    loader = seeded_loader()
    bad = [loader.dataset[i]["image"].isnan().any() for i in range(len(loader.dataset))].index(True)
    trainer.run(loader, max_epochs=1)
    [path] = tmp_path.glob("*.pt")
    record = read_record(path)
    before = states[2 * (record["iteration"] - 1)]
    for part in ("model", "loss"):
        for name, value in record[part].items():
            assert torch.equal(value, before[f"{part}.{name}"]), name
    assert bad in record["ids"]
    assert len(record["ids"]) == len(record["batch"]["image"])
    for index, image in zip(record["ids"], record["batch"]["image"], strict=True):
        assert torch.equal(image.nan_to_num(), loader.dataset[index]["image"].nan_to_num())
    assert record["checkpoint"] is None or Path(record["checkpoint"]).parent.exists()
    assert set(record["terms"]) == {"near", "size"}
    assert math.isnan(record["norms"]["image.0.weight"])


def test_ids_in_the_batch_are_recorded(tmp_path):
    make_trainer().attach(LossGuard(tmp_path)).run(batches(), max_epochs=1)
    [path] = tmp_path.glob("*.pt")
    assert read_record(path)["ids"] == list(range(40, 46))


def test_the_first_records_are_kept_and_no_more(tmp_path):
    guard = LossGuard(tmp_path, records=2)
    make_trainer().attach(guard).run(batches("nan", at=(2, 3, 5, 7)), max_epochs=1)
    assert guard.caught == 4
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "iteration_00000002_rank_0.pt",
        "iteration_00000003_rank_0.pt",
    ]


def test_a_record_that_cannot_be_written_is_logged_and_the_batch_skipped(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    guard = LossGuard(tmp_path / "file")
    make_trainer().attach(guard).run(batches(), max_epochs=1)
    assert guard.caught == 1
    assert "could not be written" in caplog.text


def test_an_interruption_does_not_change_counts_and_windows():
    def build() -> tuple[Trainer, Any]:
        return make_trainer("fused adamw").attach(LossGuard(window=4)), seeded_loader()

    report = certify.interruption(build, steps=12, at=6)
    assert report.passed, str(report)


def test_a_run_that_starts_over_resets_the_counts():
    guard = LossGuard(budget=1)
    trainer = make_trainer().attach(guard)
    for _ in range(2):
        trainer.state.max_epochs = None
        trainer.run(batches(), max_epochs=1)
    assert guard.caught == 1


def guarded_on_a_rank(optimizer: str, fault_on: int, folder: str | None) -> dict[str, Any]:
    """Train with a bad batch on one rank; return the end state of this rank."""
    guard = LossGuard(folder, window=3)
    trainer = make_trainer(optimizer).attach(guard)
    states = states_of(trainer)
    trainer.run(batches("nan" if dist.get_rank() == fault_on else None), max_epochs=1)
    pairs = zip(states[::2], states[1::2], strict=True)
    return {
        "end": states[-1],
        "unchanged": [i for i, (a, b) in enumerate(pairs, 1) if same(a, b)],
        "caught": guard.caught,
    }


@pytest.mark.parametrize("optimizer", ["adamw", "fused adamw"])
@pytest.mark.parametrize("fault_on", [0, 1])
def test_a_nan_on_one_rank_is_skipped_by_all_ranks(ranks: Ranks, tmp_path, optimizer, fault_on):
    folder = str(tmp_path) if optimizer == "adamw" else None
    first, second = ranks.run(guarded_on_a_rank, [(optimizer, fault_on, folder)] * 2)
    weights = [
        {k: v for k, v in end["end"].items() if "running" not in k and "seen" not in k}
        for end in (first, second)
    ]
    assert same(*weights)
    for end in (first, second):
        assert end["caught"] == 1
        assert end["unchanged"] == [BAD]
        assert all(value.isfinite().all() for value in end["end"].values())
    if folder:
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == [f"iteration_0000000{BAD}_rank_{r}.pt" for r in (0, 1)]


def guarded_against_a_loss_of_one_rank(optimizer: str) -> tuple[dict[str, Tensor], int]:
    """Train with a loss that spikes on one rank, while the gradients do not."""
    guard = LossGuard(window=3)
    trainer = make_trainer(optimizer).attach(guard)

    @trainer.on(StepEvents.LOSS_COMPUTED)
    def plant() -> None:
        if trainer.state.iteration == BAD and dist.get_rank() == 1:
            trainer.terms = {name: term + 1e5 for name, term in trainer.terms.items()}

    trainer.run(batches(None), max_epochs=1)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    return weights, guard.caught


@pytest.mark.parametrize("optimizer", ["adamw", "fused adamw"])
def test_ranks_agree_before_any_of_them_steps(ranks: Ranks, optimizer):
    results = ranks.run(guarded_against_a_loss_of_one_rank, [(optimizer,)] * 2)
    (first, caught), (second, caught_there) = results
    assert caught == caught_there == 1
    assert same(first, second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "ignore"}, "policy must be one of skip, stop, raise, got 'ignore'"),
        ({"budget": -1}, "budget must be a whole number >= 0, got -1"),
        ({"spike": 0.0}, "spike must be > 0 and finite, got 0.0"),
        ({"window": 0}, "window must be a whole number >= 1, got 0"),
        ({"records": 1.5}, "records must be a whole number >= 0, got 1.5"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LossGuard(**arguments)


def test_a_second_guard_and_a_guard_after_balancing_are_refused():
    with pytest.raises(ValueError, match="must have one LossGuard"):
        make_trainer().attach(LossGuard(), LossGuard())
    with pytest.raises(ValueError, match="attached before ModalityBalancing"):
        make_trainer().attach(ModalityBalancing(), LossGuard())


def test_a_record_names_the_checkpoint_of_any_handler_that_saves_some(tmp_path):
    class Saves:
        def attach(self, _: Trainer) -> None:
            pass

        def get_latest_checkpoint(self) -> Path:
            return Path("runs/latest.pt")

    make_trainer().attach(Saves(), LossGuard(tmp_path)).run(batches(), max_epochs=1)
    [path] = tmp_path.glob("*.pt")
    assert read_record(path)["checkpoint"] == str(Path("runs/latest.pt"))


def test_a_run_has_as_many_iterations_as_without_faults():
    trainer = make_trainer().attach(LossGuard())
    trainer.run(batches(), max_epochs=1)
    assert trainer.state.iteration == BATCHES
