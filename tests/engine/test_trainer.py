"""The trainer as an Ignite engine: what attaches to it, and what a run leaves behind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch
from ignite.engine import Engine, Events
from ignite.handlers import (
    BasicTimeProfiler,
    Checkpoint,
    EarlyStopping,
    EMAHandler,
    HandlersTimeProfiler,
    TerminateOnNan,
    Timer,
)
from ignite.metrics import RunningAverage
from torch import Tensor, nn

from diptych.engine import (
    BatchError,
    EvaluationEvents,
    MetricsEvents,
    RunEvents,
    StepEvents,
    Trainer,
    TrainStep,
    tasks,
)
from tests.engine.loop.loops import call_at
from tests.engine.models import CoupledLoss, TwoTower, paired, sgd, trainer_of, twins


def batches(count: int, samples: int = 5) -> list[dict[str, Tensor]]:
    return [paired(samples) for _ in range(count)]


def weights_of(trainer: Trainer) -> list[Tensor]:
    modules = (trainer.model, trainer.loss)
    return [p.detach().clone() for module in modules for p in module.parameters()]


@attrs.define(kw_only=True, eq=False)
class LargestGradient:
    """Publishes the largest entry of any gradient."""

    every: int = 1

    def attach(self, trainer: Trainer) -> None:
        trainer.every(self.every, self.publish, StepEvents.GRADIENTS_READY)

    def publish(self, trainer: Trainer) -> None:
        sizes = [p.grad.abs().max() for p in trainer.model.parameters()]
        trainer.metrics.update({"gradients/largest": torch.stack(sizes).max()})


def test_a_handler_of_ten_lines_publishes_its_own_metric():
    trainer, records = trainer_of(log_every=4), []
    assert trainer.attach(LargestGradient(every=2)) is trainer
    trainer.add_event_handler("LOGGED", lambda: records.append(trainer.metrics.record))
    trainer.run(batches(8), max_epochs=1)
    assert [record.step for record in records] == [4, 8]
    assert all(record.values["gradients/largest"] > 0 for record in records)
    assert isinstance(trainer.handlers[0], LargestGradient)


def test_ignites_ema_handler_follows_the_weights():
    trainer = trainer_of()
    ema = EMAHandler(trainer.model, momentum=0.5)
    expected = trainer.model.image[0].weight.detach().clone()
    trainer.attach(ema)

    @trainer.on(Events.ITERATION_COMPLETED)
    def average() -> None:
        expected.mul_(0.5).add_(trainer.model.image[0].weight.detach(), alpha=0.5)

    trainer.run(batches(5), max_epochs=2)
    torch.testing.assert_close(ema.ema_model.image[0].weight, expected)


def test_ignites_running_average_reads_the_steps_output():
    trainer, seen = trainer_of(), []
    RunningAverage(output_transform=lambda output: output.loss, alpha=0.5).attach(
        trainer, "average"
    )
    expected: list[float] = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def compare() -> None:
        loss = trainer.state.output.loss.item()
        expected.append(loss if not expected else 0.5 * expected[-1] + 0.5 * loss)
        seen.append(float(trainer.state.metrics["average"]))

    trainer.run(batches(4), max_epochs=1)
    assert seen == pytest.approx(expected)


def test_ignites_terminate_on_nan_ends_the_run():
    trainer, data = trainer_of(), batches(4)
    data[2]["image"][0, 0] = math.nan
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())
    trainer.run(data, max_epochs=3)
    assert trainer.state.iteration == 3


def test_ignites_timer_measures_the_iterations():
    trainer, timer = trainer_of(), Timer(average=True)
    timer.attach(
        trainer,
        start=Events.STARTED,
        resume=Events.ITERATION_STARTED,
        pause=Events.ITERATION_COMPLETED,
        step=Events.ITERATION_COMPLETED,
    )
    trainer.run(batches(4), max_epochs=1)
    assert timer.step_count == 4
    assert 0 < timer.value() < 5


def test_ignites_early_stopping_stops_at_an_epochs_end_and_the_epoch_counts():
    trainer = trainer_of()
    stopping = EarlyStopping(patience=2, score_function=lambda _: 0.0, trainer=trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, stopping)
    trainer.run(batches(3), max_epochs=10)
    assert (trainer.state.epoch, trainer.epoch_iteration) == (3, 0)


def test_ignites_checkpoint_saves_and_loads_model_loss_optimizer_and_position(tmp_path):
    trainer, data = trainer_of(), batches(3)
    parts = {
        "trainer": trainer,
        "model": trainer.model,
        "loss": trainer.loss,
        "optimizer": trainer.optimizer,
    }
    keeper = Checkpoint(parts, str(tmp_path), n_saved=None)
    trainer.add_event_handler(RunEvents.SAFE_POINT(every=3), keeper)
    trainer.run(data, max_epochs=3)
    model, loss = TwoTower().double(), CoupledLoss().double()
    other = trainer_of(model, loss)
    file = torch.load(tmp_path / "checkpoint_6.pt", weights_only=True)
    places = {"trainer": other, "model": model, "loss": loss, "optimizer": other.optimizer}
    Checkpoint.load_objects(places, file)
    assert (other.state.epoch, other.state.iteration) == (2, 6)
    other.run(data, max_epochs=3)
    assert all(a.equal(b) for a, b in zip(weights_of(other), weights_of(trainer), strict=True))


def test_ignites_profilers_count_the_iterations(capsys):
    trainer, data = trainer_of(), batches(4)
    basic, handlers = BasicTimeProfiler(), HandlersTimeProfiler()
    trainer.attach(basic, handlers)
    trainer.run(data, max_epochs=2)
    assert basic.get_results()["processing_stats"]["total"] > 0
    assert len(handlers.get_results()) > 2
    assert capsys.readouterr().out == ""


def test_train_returns_the_mean_loss_of_each_epoch():
    trainer, data, losses = trainer_of(log_every=2), batches(5), []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: losses.append(trainer.state.output.loss.item())
    )
    history = trainer.train(data, 2)
    assert history == pytest.approx([sum(losses[:5]) / 5, sum(losses[5:]) / 5])
    assert trainer.train(data, 3)[:2] == history
    assert trainer.state.metrics["train/loss"] == trainer.train(data, 3)[2]


def test_train_that_is_stopped_before_its_first_epoch_ends_returns_no_loss():
    trainer = trainer_of()
    call_at(trainer, 2, trainer.terminate)
    assert trainer.train(batches(4), 1) == []


def test_starting_over_forgets_the_losses_of_the_run_before():
    trainer, data = trainer_of(), batches(4)
    trainer.train(data, 1)
    handle = trainer.add_event_handler(Events.ITERATION_COMPLETED(once=6), trainer.interrupt)
    trainer.run(data, max_epochs=3)
    handle.remove()
    trainer.state.max_epochs = None
    losses: list[float] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: losses.append(trainer.state.output.loss.item())
    )
    assert trainer.train(data, 1) == pytest.approx([sum(losses) / 4])


def test_a_seed_makes_two_runs_equal_bit_for_bit():
    model = TwoTower(lambda: nn.Dropout(0.5)).double()
    data = batches(3)
    runs = []
    for draws in range(2):
        torch.rand(draws)  # whatever was drawn before
        trainer = trainer_of(*twins(model, CoupledLoss().double()), seed=11)
        trainer.run(data, max_epochs=2)
        runs.append(weights_of(trainer))
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))


def test_without_a_seed_the_generators_are_left_alone():
    trainer, data = trainer_of(), batches(2)
    state = torch.get_rng_state()
    trainer.run(data, max_epochs=1)
    assert torch.get_rng_state().equal(state)


def modes(*modules: nn.Module) -> list[bool]:
    """Return whether each part is in train mode."""
    return [part.training for module in modules for part in module.modules()]


def test_a_model_in_eval_mode_is_put_into_train_mode_and_logged_once(caplog):
    trainer = trainer_of(TwoTower(lambda: nn.Dropout(0.5)).double())
    for epochs in (1, 2):
        trainer.model.eval()
        trainer.loss.eval()
        trainer.run(batches(1), max_epochs=epochs)
        assert all(modes(trainer.model, trainer.loss))
    found = [record.message for record in caplog.records if "put into train mode" in record.message]
    assert [message.split(" was ")[0] for message in found] == ["The model", "The loss"]


def test_a_part_in_eval_mode_stays_there_in_several_runs_whatever_evaluates_the_model():
    trainer = trainer_of(TwoTower(lambda: nn.Dropout(0.5)).double())
    trainer.model.image.eval().requires_grad_(False)
    expected = modes(trainer.model)
    seen: list[list[bool]] = []
    trainer.add_event_handler(
        StepEvents.FORWARD_COMPLETED, lambda: seen.append(modes(trainer.model))
    )
    # Ignite's evaluators, and many of users, leave the model in eval mode.
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED(every=2), lambda: trainer.model.eval() and None
    )
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: trainer.model.eval() and None)
    for epochs in (2, 3):
        trainer.run(batches(3), max_epochs=epochs)
        trainer.model.eval()
    assert seen == [expected] * 9


def test_a_part_that_a_function_freezes_later_stays_in_eval_mode():
    trainer = trainer_of(TwoTower(lambda: nn.Dropout(0.5)).double())
    seen: list[bool] = []
    trainer.add_event_handler(
        Events.EPOCH_STARTED(once=2), lambda: trainer.model.text.eval() and None
    )
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: trainer.model.eval() and None)
    trainer.add_event_handler(
        StepEvents.FORWARD_COMPLETED, lambda: seen.append(trainer.model.text.training)
    )
    trainer.run(batches(1), max_epochs=4)
    assert seen == [True, False, False, False]


def test_a_part_in_eval_mode_with_trainable_parameters_is_named_once(caplog):
    trainer = trainer_of(TwoTower(lambda: nn.Dropout(0.5)).double())
    trainer.model.image.eval()
    trainer.model.text[1].eval()  # a dropout has no parameters
    for epochs in (1, 2):
        trainer.run(batches(1), max_epochs=epochs)
    found = [
        record.message for record in caplog.records if "trainable parameters" in record.message
    ]
    assert [message.split(".\n")[0] for message in found] == [
        "In eval mode (dropout is off), but with trainable parameters: model.image"
    ]


def test_a_frozen_part_in_eval_mode_is_not_reported(caplog):
    trainer = trainer_of()
    trainer.model.image.eval().requires_grad_(False)
    trainer.run(batches(1), max_epochs=1)
    assert "trainable parameters" not in caplog.text


def test_records_come_every_log_every_iterations_and_at_the_epochs_end():
    trainer, steps = trainer_of(log_every=3), []
    trainer.add_event_handler("LOGGED", lambda: steps.append(trainer.metrics.record.step))
    trainer.run(batches(4), max_epochs=2)
    assert steps == [3, 4, 6, 8]


def test_a_stopped_run_logs_what_an_unstopped_one_logs():
    def records(stops: tuple[int, ...], method: str) -> list[Any]:
        torch.manual_seed(1)
        trainer, data, found = trainer_of(log_every=3), batches(5), []
        for stop in stops:
            call_at(trainer, stop, getattr(trainer, method))
        trainer.add_event_handler("LOGGED", lambda: found.append(trainer.metrics.record))
        for _ in range(len(stops) + 1):
            trainer.run(data, max_epochs=2)
        return found

    whole = records((), "interrupt")
    assert [record.step for record in whole] == [3, 5, 6, 9, 10]
    for method in ("interrupt", "terminate"):
        assert records((2, 5, 7), method) == whole


def test_a_step_of_ones_own_replaces_the_step():
    seen = []

    def step(trainer: Trainer, batch: Any) -> float:
        seen.append(batch)
        trainer.metrics.update({"train/loss": batch})
        return batch

    trainer = trainer_of(step=step)
    assert trainer.train([1.0, 2.0, 6.0], 1) == [3.0]
    assert seen == [1.0, 2.0, 6.0]


def test_scalars_of_the_loss_are_read_at_log_points_only():
    calls = []

    class WithScalars(CoupledLoss):
        def scalars(self) -> dict[str, Tensor]:
            calls.append(1)
            return {"temperature": (-self.log_scale).exp().detach()}

    trainer = trainer_of(loss=WithScalars().double(), log_every=2)
    built = len(calls)
    trainer.run(batches(4), max_epochs=1)
    assert len(calls) - built == 2
    expected = math.exp(-trainer.loss.log_scale.item())
    assert trainer.metrics.record.values["train/temperature"] == pytest.approx(expected)


def test_terms_are_published_beside_the_loss_and_a_single_one_is_the_loss():
    trainer = trainer_of(log_every=1)
    trainer.run(batches(1), max_epochs=1)
    values = trainer.metrics.record.values
    assert set(values) == {"train/loss", "train/contrast", "train/spread"}
    total = values["train/contrast"] + values["train/spread"]
    assert values["train/loss"] == pytest.approx(total)


def test_a_term_called_loss_does_not_hide_the_loss():
    class Two(nn.Module):
        def terms(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
            return {"loss": image.mean(), "rest": text.mean()}

    trainer = trainer_of(loss=Two(), log_every=1)
    trainer.run(batches(1), max_epochs=1)
    total = sum(trainer.state.output.terms.values())
    assert trainer.metrics.record.values["train/loss"] == pytest.approx(total.item())


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"model": print}, TypeError, "model must be a torch Module, got .*print"),
        ({"loss": nn.functional.mse_loss}, TypeError, "loss must be a torch Module, got .*mse"),
        ({"loss": CoupledLoss}, TypeError, "loss must be a torch Module, got .*CoupledLoss"),
        ({"optimizer": 0.1}, TypeError, "optimizer must be a torch Optimizer, got 0.1"),
        ({"task": "image_text"}, TypeError, "task must be a function"),
        ({"precision": "fp8"}, ValueError, "precision must be one of fp32, bf16, fp16, got 'fp8'"),
        ({"optimizer": sgd(TwoTower())}, ValueError, "log_scale, spread"),
    ],
)
def test_a_wrong_argument_is_named(wrong, error, message):
    loss = CoupledLoss()
    model = TwoTower()
    arguments = {
        "model": model,
        "loss": loss,
        "optimizer": sgd(model, loss),
        "task": tasks.image_text,
    }
    arguments |= wrong
    with pytest.raises(error, match=message):
        Trainer(**arguments)


def test_an_optimizer_of_another_model_is_a_clear_error():
    loss = nn.MSELoss()
    with pytest.raises(ValueError, match="optimizer must hold parameters of the model, got those"):
        Trainer(TwoTower(), loss, sgd(TwoTower()), task=tasks.image_text, device="cpu")


@pytest.mark.parametrize("handler", [print, LargestGradient, 3])
def test_what_has_no_attach_is_refused_and_nothing_is_attached(handler):
    trainer = trainer_of()
    with pytest.raises(TypeError, match="must be an object with attach"):
        trainer.attach(LargestGradient(), handler)
    assert trainer.handlers == []


def test_a_trainer_is_an_ignite_engine():
    assert isinstance(trainer_of(), Engine)


def test_a_phase_of_the_step_can_be_replaced_by_a_subclass():
    class Doubled(TrainStep):
        def scaled(self, value: Tensor) -> Tensor:
            return 2 * value

    seen: list[Tensor] = []
    for step in (None, Doubled):
        torch.manual_seed(0)
        model, loss = TwoTower().double(), CoupledLoss().double()
        trainer = Trainer(
            model, loss, sgd(model, loss), task=tasks.image_text, device="cpu", step=step
        )
        trainer.add_event_handler(
            StepEvents.GRADIENTS_READY(once=1),
            lambda own: seen.append(next(own.model.parameters()).grad.clone()),
        )
        torch.manual_seed(1)
        trainer.run(batches(1), max_epochs=1)
    torch.testing.assert_close(seen[1], 2 * seen[0])


def published_at(event: Any, *, epochs: int = 2) -> tuple[Trainer, list[tuple[int, float]]]:
    """Return a run with a value that a handler of `event` publishes, and its records."""
    trainer = trainer_of(log_every=2)
    records: list[tuple[int, float]] = []
    trainer.add_event_handler(
        MetricsEvents.LOGGED,
        lambda: records.extend(
            (trainer.metrics.record.step, value)
            for tag, value in trainer.metrics.record.values.items()
            if tag == "own/score"
        ),
    )
    trainer.add_event_handler(
        event, lambda: trainer.metrics.update({"own/score": float(trainer.state.epoch)})
    )
    if event is EvaluationEvents.EVALUATED:
        trainer.add_event_handler(
            Events.EPOCH_COMPLETED, lambda: trainer.fire_and_report(EvaluationEvents.EVALUATED)
        )
    trainer.run([paired(3)] * 3, max_epochs=epochs)
    return trainer, records


@pytest.mark.parametrize(
    "event", [Events.EPOCH_COMPLETED, EvaluationEvents.EVALUATED, MetricsEvents.EPOCH_PUBLISHED]
)
def test_a_value_that_is_published_at_the_end_of_an_epoch_belongs_to_that_epoch(event):
    trainer, records = published_at(event)

    assert records == [(3, 1.0), (6, 2.0)]
    assert trainer.metrics.get_history("own/score") == [1.0, 2.0]
    assert trainer.state.metrics["own/score"] == 2.0


def test_a_value_that_is_published_at_the_end_of_a_run_is_reported():
    trainer, records = published_at(Events.COMPLETED)

    assert records == [(6, 2.0)]
    assert trainer.state.metrics["own/score"] == 2.0


def test_a_value_that_is_published_when_a_run_is_stopped_is_reported():
    trainer, records = trainer_of(), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), trainer.terminate)
    trainer.add_event_handler(Events.TERMINATE, lambda: trainer.metrics.update({"own/reason": 7.0}))
    trainer.add_event_handler(
        MetricsEvents.LOGGED, lambda: records.append(dict(trainer.metrics.record.values))
    )
    trainer.run([paired(3)] * 3, max_epochs=1)

    assert {"own/reason": 7.0} in records
    assert trainer.state.metrics["own/reason"] == 7.0


def test_a_value_of_an_epoch_is_known_when_the_epoch_is_published():
    trainer = trainer_of()
    seen: list[float] = []
    trainer.add_event_handler(
        MetricsEvents.EPOCH_PUBLISHED, lambda: seen.append(trainer.state.metrics["own/score"])
    )
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED,
        lambda: trainer.metrics.update({"own/score": float(trainer.state.epoch)}),
    )
    trainer.run([paired(3)] * 3, max_epochs=2)

    assert seen == [1.0, 2.0]


def test_a_value_at_the_end_of_an_epoch_does_not_split_a_window_of_the_next_one():
    plain = trainer_of(log_every=2)
    torch.manual_seed(0)
    watched = trainer_of(log_every=2)
    watched.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: watched.metrics.update({"own/score": 1.0})
    )
    found: dict[str, list[Any]] = {}
    batches = [paired(3)] * 3
    for name, trainer in (("plain", plain), ("watched", watched)):
        records = found.setdefault(name, [])
        trainer.add_event_handler(
            MetricsEvents.LOGGED,
            lambda t, records=records: records.append(
                (t.metrics.record.step, t.metrics.record.values.get("train/loss"))
            ),
        )
        trainer.run(batches, max_epochs=2)

    assert [record for record in found["watched"] if record[1] is not None] == found["plain"]


class WithoutLength:
    """A loader of three batches that has no length, or a wrong one."""

    def __init__(self, length: int | None = None) -> None:
        self.length = length

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError
        return self.length

    def __iter__(self) -> Iterator[Any]:
        return iter([paired(3)] * 3)


@pytest.fixture
def as_if_of_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diptych.engine.trainer.world_size", lambda: 2)
    monkeypatch.setattr("diptych.engine.trainer.check_equal_over_ranks", lambda *_: None)
    monkeypatch.setattr("diptych.engine.trainer.check_ranks_agree", lambda *_: None)


def test_over_ranks_a_loader_without_a_length_is_refused_with_the_way_out(as_if_of_two_ranks):
    with pytest.raises(ValueError, match=r"got a WithoutLength without one.* epoch_length= to run"):
        trainer_of().run(WithoutLength(), max_epochs=1)


@pytest.mark.parametrize(("length", "found"), [(2, "more than 2 batches"), (5, "3 batches")])
def test_over_ranks_a_wrong_length_is_refused(as_if_of_two_ranks, length, found):
    with pytest.raises(BatchError, match=f"got {length} as the length and {found} in epoch 1"):
        trainer_of().run(WithoutLength(length), max_epochs=1)


def test_over_ranks_a_number_of_iterations_serves_a_loader_without_a_length(as_if_of_two_ranks):
    trainer = trainer_of()
    trainer.run(WithoutLength(), max_epochs=2, epoch_length=2)

    assert trainer.state.iteration == 4


def lbfgs_step(trainer: Trainer, batch: Any) -> Tensor:
    def closure() -> Tensor:
        trainer.optimizer.zero_grad()
        loss = trainer.loss(*trainer.task(trainer.model, batch).values())
        loss.backward()
        return loss

    return trainer.optimizer.step(closure)


def test_an_optimizer_that_needs_a_closure_needs_a_step_of_its_own():
    model, loss = TwoTower().double(), CoupledLoss().double()
    optimizer = torch.optim.LBFGS([*model.parameters(), *loss.parameters()])
    with pytest.raises(ValueError, match=r"got LBFGS.*custom_step"):
        Trainer(model, loss, optimizer, task=tasks.image_text, device="cpu")
    trainer = Trainer(model, loss, optimizer, task=tasks.image_text, step=lbfgs_step, device="cpu")
    losses: list[float] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda: losses.append(float(trainer.state.output.detach()))
    )
    trainer.run([paired(6)] * 3, max_epochs=1)

    assert losses == sorted(losses, reverse=True)


def test_an_attribute_error_within_a_property_of_a_subclass_is_not_hidden():
    class Own(Trainer):
        @property
        def evaluate(self) -> Any:
            return nn.Identity().absent

    with pytest.raises(AttributeError, match="'Identity' object has no attribute 'absent'"):
        Own.__new__(Own).evaluate  # noqa: B018
