"""RepresentationHealth: what it publishes, when rules fire, and that it does not change the run."""

from __future__ import annotations

import inspect
import math
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diptych.engine import BatchError, MetricsEvents, SeededLoader, StepEvents, Trainer, tasks
from diptych.handlers import CheckpointManager, Evaluation, GradientDiagnostics
from diptych.handlers.health import feature_statistics as statistics
from diptych.handlers.health.parameter_gauges import temperature_positions
from diptych.handlers.health.representation_health import RepresentationHealth, _text_ids
from diptych.handlers.health.rules import RULES, History, Rule
from diptych.losses import CLIPLoss, VICRegLoss, WeightedSum

Batch = dict[str, Tensor]
ALWAYS = Rule(name="always", judge=lambda _: "it was asked", remedy="None.")


class Pairs(torch.utils.data.Dataset[Batch]):
    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> Batch:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(6, generator=generator)
        return {"image": image, "text": image[:5] + 0.1, "group": torch.tensor(index)}


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1))
        self.text = nn.Linear(5, 8)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(image), self.text(text)


def make_trainer(loss: nn.Module | None = None, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    model = TwoTowers()
    loss = CLIPLoss() if loss is None else loss
    build = settings.pop("optimizer", torch.optim.Adam)
    optimizer = build([*model.parameters(), *loss.parameters()], lr=1e-2)
    settings = {"task": tasks.image_text, "log_every": 4, **settings}
    return Trainer(model, loss, optimizer, device="cpu", seed=1, **settings)


def make_loader(**settings: Any) -> SeededLoader:
    return SeededLoader(Pairs(), 12, seed=2, **settings)


def run(trainer: Trainer, epochs: int = 3, **settings: Any) -> list[Any]:
    records: list[Any] = []
    trainer.add_event_handler(MetricsEvents.LOGGED, lambda: records.append(trainer.metrics.record))
    trainer.run(make_loader(**settings), max_epochs=epochs)
    return records


def test_the_values_are_those_of_the_measured_batch():
    trainer = make_trainer(log_every=2)
    trainer.attach(RepresentationHealth(every=2))
    expected = {}

    @trainer.on(StepEvents.LOSS_COMPUTED(once=2))
    def look() -> None:
        image, text = (
            statistics.unit(trainer.outputs[name]) for name in ("image_features", "text_features")
        )
        negatives = ~torch.eye(12, dtype=torch.bool)
        expected.update(
            {
                f"health/{k}": v
                for k, v in statistics.pair_statistics(image, text, negatives).items()
            }
        )
        for name, side in (("image", image), ("text", text)):
            deviation = side.std(0, correction=0)
            expected[f"health/{name}/spread"] = deviation.mean() * 8**0.5
            expected[f"health/{name}/uniformity"] = statistics.uniformity(side)
            effective = statistics.rankme(side.double().T @ side.double())
            expected[f"health/{name}/rankme"] = effective
            expected[f"health/{name}/rank_share"] = effective / 8
        expected["health/modality_gap"] = (image.mean(0) - text.mean(0)).norm()
        expected["health/loss_over_chance"] = trainer.terms["contrastive"] / math.log(12)

    found = run(trainer, 1)[0].values
    assert {tag: found[tag] for tag in expected} == pytest.approx(
        {tag: float(value) for tag, value in expected.items()}, rel=1e-4
    )
    low, high = math.log(1), math.log(100)
    place = (float(trainer.loss.temperature.logit_scale.detach()) - low) / (high - low)
    assert found["health/temperature_position"] == pytest.approx(place, abs=0.01)
    assert found["health/image/moving"] == found["health/text/moving"] == 1
    assert "health/lidar" not in found


def test_two_views_have_lidar():
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 8)

        def forward(self, view: Tensor) -> Tensor:
            return self.layer(view)

    model = Tower()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    trainer = Trainer(
        model, VICRegLoss(), optimizer, task=tasks.two_views, device="cpu", log_every=1
    )
    trainer.attach(RepresentationHealth(every=1))
    batch = {"first": torch.randn(12, 5), "second": torch.randn(12, 5)}
    trainer.run([batch], max_epochs=1)
    values = trainer.metrics.record.values
    views = [statistics.unit(trainer.outputs[f"{n}_features"]) for n in ("first", "second")]
    assert values["health/lidar"] == pytest.approx(float(statistics.lidar(views)), rel=1e-6)
    assert "health/temperature_position" not in values


def test_every_record_has_finite_spectra_after_the_first():
    trainer = make_trainer(log_every=3)  # an epoch has four iterations
    records = run(trainer.attach(RepresentationHealth(every=1)), 3)
    assert [record.step for record in records] == [3, 4, 6, 8, 9, 12]
    ranks = [record.values["health/image/rankme"] for record in records]
    assert all(math.isfinite(value) for value in ranks)
    assert ranks[0] == ranks[1]
    assert ranks[2] != ranks[0]


def measured(trainer: Trainer, epochs: int, every: int | None = None) -> dict[int, dict[str, Any]]:
    """Return the statistics of the features and gradients in each record that has them."""
    handlers = RepresentationHealth(every=every), GradientDiagnostics(every=every)
    records = run(trainer.attach(*handlers), epochs)
    kept = ("health/", "gradients/", "updates/")
    found = {r.step: {t: v for t, v in r.values.items() if t.startswith(kept)} for r in records}
    return {step: values for step, values in found.items() if "health/margin" in values}


def test_a_run_shorter_than_log_every_is_measured_at_the_end_of_each_epoch():
    found = measured(make_trainer(log_every=50), 2)
    assert found == measured(make_trainer(log_every=4), 2)  # an epoch has four iterations
    assert [*found] == [4, 8]
    assert "health/image/rankme" in measured(make_trainer(log_every=50), 1, every=2)[4]


def test_a_run_that_is_continued_beyond_log_every_is_measured_there_alone():
    trainer = make_trainer(log_every=10)
    assert [*measured(trainer, 2)] == [4, 8]
    records = run(trainer, 4)
    assert [r.step for r in records if "health/margin" in r.values] == [10]


def test_it_does_not_change_the_run():
    bare, watched = make_trainer(), make_trainer()
    watched.attach(RepresentationHealth(every=1))
    run(bare)
    run(watched)
    for name, value in bare.model.state_dict().items():
        assert torch.equal(watched.model.state_dict()[name], value), name
    assert watched.metrics.get_history("train/loss") == bare.metrics.get_history("train/loss")


class NoReading(TorchDispatchMode):
    """Fails if an operation makes the host wait for a device."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "_linalg_eigh")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.waits, func
        return func(*args, **(kwargs or {}))


def test_nothing_synchronises_between_two_log_points():
    # Adam reads its own count on a CPU.
    trainer = make_trainer(log_every=4, optimizer=torch.optim.SGD)
    trainer.attach(RepresentationHealth(every=1))
    guard = ExitStack()
    trainer.add_event_handler(
        Events.ITERATION_STARTED(once=5), lambda: guard.enter_context(NoReading())
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=8), guard.close)
    with guard:
        records = run(trainer, 2)
    assert [record.step for record in records] == [4, 8]


def test_rules_wait_for_the_learning_rate_and_for_records_in_a_row(caplog):
    def rise(trainer: Trainer) -> None:
        rate = min(trainer.state.iteration, 8) * 1e-3
        trainer.optimizer.param_groups[0]["lr"] = rate

    trainer = make_trainer(log_every=2)
    trainer.add_event_handler(Events.ITERATION_STARTED, rise)
    health = RepresentationHealth(every=2, warmup=5, patience=2, rules=(ALWAYS,))
    run(trainer.attach(health), 6)
    assert [finding.step for finding in health.findings] == [14]  # 8 + 5, at a log point
    assert caplog.messages == ["always at iteration 14: it was asked. None."]


def test_a_rule_is_silent_if_another_explains_it():
    first = Rule(name="cause", judge=lambda _: "seen", remedy="None.")
    second = Rule(name="effect", judge=lambda _: "seen", remedy="None.", unless=("cause",))
    health = RepresentationHealth(every=2, warmup=0, rules=(first, second))
    run(make_trainer(log_every=2).attach(health))
    assert [finding.rule for finding in health.findings] == ["cause"]


def test_a_custom_rule_can_be_added():
    def judge(history: History) -> str | None:
        narrow = history.always("health/margin", lambda value: value < 2)
        return f"margin {history.latest['health/margin']:.1f}" if narrow else None

    mine = Rule(name="narrow margin", judge=judge, remedy="Go on.")
    health = RepresentationHealth(every=2, warmup=0, rules=(*RULES, mine))
    run(make_trainer(log_every=2).attach(health))
    assert "narrow margin" in [finding.rule for finding in health.findings]


def test_held_out_pairs_are_published_once_per_evaluation():
    trainer = make_trainer()
    health = RepresentationHealth(every=2)
    trainer.attach(Evaluation(make_loader(shuffle=False), prefix="seen"), health)
    run(trainer, 2)
    run(trainer, 3)
    assert len(trainer.metrics.get_history("health/seen/auroc")) == 3
    assert 0.5 < trainer.metrics.get_history("health/seen/auroc")[-1] <= 1


def test_a_batch_of_one_pair_takes_no_part_in_the_loss_over_chance():
    sizes = {"image": 6, "text": 5}
    batches = [{name: torch.randn(n, dim) for name, dim in sizes.items()} for n in (4, 1)]
    found = []
    for part in (batches[:1], batches):
        trainer = make_trainer().attach(RepresentationHealth(every=1))
        trainer.run(part, max_epochs=1)
        found.append(trainer.state.metrics["health/loss_over_chance"])
    assert found[0] == found[1] > 0


def test_an_evaluation_of_one_side_publishes_no_pairs():
    def images(model: TwoTowers, batch: Batch) -> Batch:
        return {"image_features": model.image(batch["image"]), "groups": batch["group"]}

    trainer = make_trainer().attach(Evaluation(make_loader(), task=images), RepresentationHealth())
    run(trainer, 1)
    assert "health/val/auroc" not in trainer.metrics.record.values


def test_a_resumed_run_logs_and_finds_what_an_uninterrupted_one_does(tmp_path):
    def build(folder: str) -> tuple[Trainer, RepresentationHealth]:
        health = RepresentationHealth(every=1, warmup=9, patience=2, rules=(ALWAYS,))
        trainer = make_trainer(log_every=3)
        return trainer.attach(health, CheckpointManager(tmp_path / folder, every=1)), health

    whole, expected = build("whole")
    records = run(whole, 4)
    cut, _ = build("cut")
    cut.add_event_handler(Events.ITERATION_COMPLETED(once=7), cut.terminate)
    before = run(cut, 4)
    resumed, found = build("cut")
    after = run(resumed, 4)
    assert [*before, *after] == records
    assert found.findings == expected.findings
    assert found.state_dict() == expected.state_dict()


def test_a_run_that_starts_over_forgets_its_findings():
    health = RepresentationHealth(every=1, warmup=0, patience=1, rules=(ALWAYS,))
    trainer = make_trainer(log_every=2).attach(health)
    run(trainer, 1)
    trainer.state.max_epochs = None
    trainer.run(make_loader(), max_iters=2)
    assert [finding.step for finding in health.findings] == [2]


def in_group(sizes: list[int], part: int | None = None) -> dict[str, float]:
    from diptych.engine.distributed.collectives import rank

    trainer = make_trainer(log_every=1)
    trainer.attach(RepresentationHealth(every=1))
    part = rank() if part is None else part
    start = sum(sizes[:part])
    samples = [Pairs()[i] for i in range(start, start + sizes[part])]
    trainer.run([{k: torch.stack([s[k] for s in samples]) for k in samples[0]}], max_epochs=1)
    return trainer.metrics.record.values


def test_spread_gap_and_spectra_are_those_of_all_ranks(ranks):
    # Dropout draws per rank, so look at the text alone.
    alone = in_group([12])
    parts = [in_group([5, 7], part)["health/text/uniformity"] for part in (0, 1)]
    for found in ranks.run(in_group, [([5, 7],)] * 2):
        for tag in ("health/text/spread", "health/text/rankme", "health/text/rank_share"):
            assert found[tag] == pytest.approx(alone[tag], rel=1e-5), tag
        assert found["health/loss_over_chance"] == pytest.approx(
            found["train/loss"] / math.log(12), rel=1e-5
        )
        mean = (5 * parts[0] + 7 * parts[1]) / 12  # over samples: seven count more than five
        assert found["health/text/uniformity"] == pytest.approx(mean, rel=1e-5)


def test_several_temperatures_have_different_names():
    loss = WeightedSum(losses={"clip": CLIPLoss(), "sharp": CLIPLoss(temperature=0.02)})
    trainer = make_trainer(loss, log_every=1).attach(RepresentationHealth(every=1))
    values = run(trainer, 1)[-1].values
    places = [tag for tag in values if tag.endswith("temperature_position")]
    assert len(places) == 2
    assert values[places[0]] < values[places[1]]


def test_a_scale_that_only_getattr_finds_is_measured():
    """From Python 3.12 on, isinstance with a runtime protocol does not see parameters."""
    loss = CLIPLoss()
    scale = next(m for m in loss.modules() if getattr(m, "logit_scale", None) is not None)
    with pytest.raises(AttributeError):
        inspect.getattr_static(scale, "logit_scale")
    assert list(temperature_positions(loss)) == ["temperature_position"]


@pytest.mark.parametrize(
    ("text", "equal"),
    [
        (torch.tensor([[1, 2], [2, 1], [1, 2]]), [[0, 2]]),
        (["cat", "dog", "cat"], [[0, 2]]),
        (torch.randn(3, 2), None),
    ],
)
def test_equal_texts_have_equal_ids(text, equal):
    trainer = make_trainer()
    trainer.state.batch = {"text": text}
    found = _text_ids(trainer, 3)
    if equal is None:
        assert found == []
        return
    same = (found[0][:, None] == found[0]).triu(1).nonzero().tolist()
    assert same == equal


def test_a_custom_task_has_no_texts():
    def own(model: nn.Module, batch: Batch) -> Batch:
        return tasks.image_text(model, batch)

    trainer = make_trainer(task=own)
    trainer.state.batch = {"text": ["cat"]}
    assert _text_ids(trainer, 1) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be a whole number >= 1, got 0"),
        ({"samples": 1}, "samples must be a whole number >= 2, got 1"),
        ({"warmup": -1}, "warmup must be a whole number >= 0, got -1"),
        ({"patience": 0}, "patience must be a whole number >= 1, got 0"),
        ({"features": "image"}, "features must be 1 or 2 names in a list, got 'image'"),
        ({"features": ("a", "b", "c")}, "features must be 1 or 2 names"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RepresentationHealth(**arguments)


def test_outputs_without_features_are_refused():
    trainer = make_trainer().attach(RepresentationHealth(every=1, features=("pixels",)))
    with pytest.raises(BatchError, match=r"must have pixels of shape \[B, D\], got image_features"):
        run(trainer, 1)


def test_its_representation_has_no_addresses_of_rules():
    assert "0x" not in repr(RepresentationHealth())
