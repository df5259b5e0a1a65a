"""The collector of scalars: means, one transfer a log point, and a state that changes nothing."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diptych.engine import MetricsCollector

NUMBERS = st.floats(-1e6, 1e6, width=32)
SCALARS = st.one_of(
    NUMBERS,
    NUMBERS.map(torch.tensor),
    NUMBERS.map(lambda x: torch.tensor([x], dtype=torch.float64)),
    st.integers(-100, 100),
)
EVENTS = st.lists(
    st.one_of(
        st.dictionaries(st.sampled_from("abc"), SCALARS, min_size=1),
        st.sampled_from(["log", "end_epoch"]),
    ),
    max_size=25,
)


class Listening(MetricsCollector):
    """A collector that keeps its records."""

    def __init__(self) -> None:
        super().__init__(lambda: self.records.append(self.record))
        self.records: list[Any] = []


def play(collector: MetricsCollector, events: list[Any], start: int = 0) -> list[dict[str, float]]:
    """Do what the events say; return what the epochs' ends gave."""
    ends = []
    for step, event in enumerate(events, start):
        if event == "log":
            collector.log(step)
        elif event == "end_epoch":
            ends.append(collector.end_epoch())
        else:
            collector.update(event)
    return ends


def mean(values: list[Any]) -> float:
    return math.fsum(map(float, values)) / len(values)


def means_by_plain_lists(events: list[Any]) -> tuple[list[Any], list[dict[str, float]]]:
    """Return each log point's step and means, and each epoch's means."""
    windows, epochs = [], []
    window: dict[str, list[Any]] = {}
    epoch: dict[str, list[Any]] = {}
    for step, event in enumerate(events):
        if event == "log":
            if window:
                windows.append((step, {tag: mean(values) for tag, values in window.items()}))
            window = {}
        elif event == "end_epoch":
            epochs.append({tag: mean(values) for tag, values in epoch.items()})
            window, epoch = {}, {}
        else:
            for tag, value in event.items():
                window.setdefault(tag, []).append(value)
                epoch.setdefault(tag, []).append(value)
    return windows, epochs


@given(events=EVENTS)
def test_windows_and_epochs_give_the_means_of_plain_lists(events: list[Any]):
    collector = Listening()
    ends = play(collector, events)
    windows, epochs = means_by_plain_lists(events)
    assert [record.step for record in collector.records] == [step for step, _ in windows]
    for record, (_, values) in zip(collector.records, windows, strict=True):
        assert record.values == pytest.approx(values, abs=1e-6)
    assert len(ends) == len(epochs)
    for found, expected in zip(ends, epochs, strict=True):
        assert found == pytest.approx(expected, abs=1e-6)
    for tag in {tag for values in epochs for tag in values}:
        expected_history = [values[tag] for values in epochs if tag in values]
        assert collector.get_history(tag) == pytest.approx(expected_history, abs=1e-6)


@given(before=EVENTS, after=EVENTS)
def test_a_state_in_a_file_gives_the_very_same_later_values(before: list[Any], after: list[Any]):
    first, second, file = Listening(), Listening(), io.BytesIO()
    play(first, before)
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.update(left=1.0)
    second.load_state_dict(torch.load(file, weights_only=True))
    known = len(first.records)
    ends = [play(collector, after, len(before)) for collector in (first, second)]
    assert ends[0] == ends[1]
    assert second.records == first.records[known:]
    assert second.state_dict()["history"] == first.state_dict()["history"]


def test_it_is_used_as_the_original_plan_draws_it_but_gives_means():
    collector = MetricsCollector()
    collector.update(train_loss=3.0, accuracy=0.5)
    collector.update(train_loss=1.0)
    assert collector.end_epoch() == {"train_loss": 2.0, "accuracy": 0.5}
    collector.update(train_loss=5.0)
    assert collector.end_epoch() == {"train_loss": 5.0}
    assert collector.get_history("train_loss") == [2.0, 5.0]
    assert collector.get_history("accuracy") == [0.5]


class CountingReads(TorchDispatchMode):
    """Counts what goes from tensors to Python, and copies from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_sums_over_samples_give_the_mean_over_all_samples():
    collector = MetricsCollector()
    for total, count in ((3.0, 2), (torch.tensor(0.5), torch.tensor(1.0)), (0, 0)):
        collector.update_sums({"accuracy": total, "loss": 2 * total}, count)
        collector.update_sums({"empty": 0.0}, 0)
        collector.update(other=1.0)
    copied = MetricsCollector()
    copied.load_state_dict(collector.state_dict())
    for one in (collector, copied):
        one.log(1)
        assert one.record.values == {"accuracy": 3.5 / 3, "loss": 7 / 3, "other": 1.0}
        one.update_sums({"accuracy": 1.0}, 1)
        assert one.end_epoch() == {"accuracy": 4.5 / 4, "loss": 7 / 3, "other": 1.0}


def test_sums_with_counts_of_their_own_give_the_mean_of_each():
    collector = MetricsCollector()
    sums, counts = [[3.0, 1.0, 0.0], [0.5, 5.0, 0.0]], [[2.0, 1.0, 0.0], [1.0, 4.0, 0.0]]
    for step_sums, step_counts in zip(sums, counts, strict=True):
        vectors = torch.tensor(step_sums), torch.tensor(step_counts)
        collector.update_all_sums(["accuracy", "auroc", "empty"], *vectors)
    copied = MetricsCollector()
    copied.load_state_dict(collector.state_dict())
    for one in (collector, copied):
        assert one.end_epoch() == {"accuracy": 3.5 / 3, "auroc": 6 / 5}


def test_values_after_a_mark_are_dropped_and_those_before_stay():
    collector = MetricsCollector()
    collector.update({"loss": torch.tensor(1.0)}, host=1)
    mark = collector.mark()
    collector.update({"loss": torch.tensor(5.0)}, host=5, later=torch.tensor(7.0))
    collector.drop_since(mark)
    collector.update(host=2)
    assert collector.end_epoch() == {"loss": 1.0, "host": 1.5}


def test_a_log_point_is_one_transfer_gauges_included(monkeypatch):
    transfers = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: transfers.append(self) or tolist(self))
    collector, counting = Listening(), CountingReads()
    collector.gauge("train/temperature", lambda: torch.tensor(0.07))
    collector.gauge("train/learning_rate", lambda: 0.1)
    with counting:
        for n in range(10):
            collector.update({"train/loss": torch.tensor(float(n)), "host": n}, norm=torch.ones(1))
        assert (counting.reads, len(transfers)) == (0, 0)
        collector.log(10)
    assert (counting.reads, len(transfers)) == (0, 1)
    assert collector.record.values == pytest.approx(
        {
            "train/loss": 4.5,
            "host": 4.5,
            "norm": 1.0,
            "train/temperature": 0.07,
            "train/learning_rate": 0.1,
        }
    )


def test_numbers_alone_need_no_tensor(monkeypatch):
    monkeypatch.setattr(Tensor, "tolist", lambda self: pytest.fail("a tensor was read"))
    collector = Listening()
    collector.gauge("rate", lambda: 0.5)
    collector.update(loss=2.0)
    collector.log(1)
    assert collector.record.values == {"loss": 2.0, "rate": 0.5}


def test_a_gauge_is_asked_at_log_points_only_and_is_no_mean():
    collector, asked = Listening(), []
    collector.gauge("rate", lambda: asked.append(1) or float(len(asked)))
    for step in range(1, 7):
        collector.update(loss=1.0)
        if step % 3 == 0:
            collector.log(step)
    assert [record.values["rate"] for record in collector.records] == [1.0, 2.0]
    assert collector.end_epoch() == {"loss": 1.0}


def test_a_log_point_without_anything_new_gives_no_record():
    collector = Listening()
    collector.gauge("rate", lambda: 0.5)
    collector.log(1)
    collector.update(loss=1.0)
    collector.log(2)
    collector.log(2)
    assert [record.step for record in collector.records] == [2]


def test_a_report_is_a_record_of_its_own_at_once():
    collector = Listening()
    collector.update(loss=1.0)
    collector.report(7, {"val/recall@1": 0.25})
    collector.report(9, {"val/recall@1": torch.tensor(0.5)})
    collector.log(9)
    assert [(record.step, record.values) for record in collector.records] == [
        (7, {"val/recall@1": 0.25}),
        (9, {"val/recall@1": 0.5}),
        (9, {"loss": 1.0}),
    ]
    assert collector.get_history("val/recall@1") == [0.25, 0.5]


def test_a_tensor_of_several_elements_is_refused_by_its_tag():
    collector = Listening()
    message = r"features must be a number or a tensor of one element, got shape \(3, 2\)"
    with pytest.raises(ValueError, match=message):
        collector.update(features=torch.ones(3, 2))
    collector.gauge("features", lambda: torch.ones(3, 2))
    collector.update(loss=1.0)
    with pytest.raises(ValueError, match=message):
        collector.log(1)


@pytest.mark.parametrize("value", [None, "high", [1.0]])
def test_what_is_no_number_is_refused_by_its_tag(value):
    with pytest.raises(TypeError, match="loss must be a number or a tensor of one element, got"):
        MetricsCollector().update(loss=value)


def test_what_is_not_finite_is_kept_and_breaks_nothing():
    collector = Listening()
    for value in (math.inf, -math.inf, 1.0):
        collector.update(host=value, device=torch.tensor(value), fine=1.0)
    collector.log(1)
    assert math.isnan(collector.record.values["host"])
    assert math.isnan(collector.record.values["device"])
    assert collector.record.values["fine"] == 1.0


def test_published_tensors_hold_no_graph_and_a_parameter_is_copied():
    collector, parameter = Listening(), nn.Parameter(torch.tensor(2.0))
    collector.update(scale=parameter, square=parameter**2)
    with torch.no_grad():
        parameter.fill_(100.0)
    collector.log(1)
    assert collector.record.values == {"scale": 2.0, "square": 4.0}


SHARED = {
    "itself": lambda weight: weight,
    "detached": lambda weight: weight.detach(),
    "data": lambda weight: weight.data,
    "a view": lambda weight: weight.detach().view(1)[0],
    "an element": lambda weight: weight.detach().view(1),
    "as another type": lambda weight: weight.detach().view(1).view(torch.int32)[0],
    "several": lambda weight: weight.detach().expand(1),
}


@pytest.mark.parametrize("beside", [{}, {"beside": torch.tensor(1.0)}, {"number": 1.0}])
@pytest.mark.parametrize("kind", ["parameter", "buffer", "double"])
@pytest.mark.parametrize("form", SHARED)
def test_a_published_value_is_that_of_the_moment(form, kind, beside):
    dtype = torch.float64 if kind == "double" else torch.float32
    memory = torch.tensor(2.0, dtype=dtype)
    weight = nn.Parameter(memory) if kind == "parameter" else memory
    shared = SHARED[form](weight)
    expected = float(shared.detach().reshape(-1)[0])
    collector = Listening()
    collector.update({"shared": shared, **beside})
    with torch.no_grad():
        weight.fill_(100.0)  # as an update, or the next iteration, would
    collector.log(1)
    assert collector.record.values["shared"] == expected


def test_values_that_nothing_changes_need_not_be_copied():
    collector, value = Listening(), torch.tensor(2.0)
    collector.update_uncopied({"loss": value})
    assert collector.state_dict()["window"]["rows"][0]["tags"] == ["loss"]
    value.fill_(3.0)
    collector.log(1)
    assert collector.record.values == {"loss": 3.0}


def test_values_of_several_types_are_added_up_in_float64():
    collector = Listening()
    for value in (
        torch.tensor(1, dtype=torch.int64),
        torch.tensor(0.5, dtype=torch.bfloat16),
        True,
    ):
        collector.update(mixed=value)
    collector.update(many=torch.tensor(1e8))
    for _ in range(9):
        collector.update(many=torch.tensor(1.0))
    collector.log(1)
    assert collector.record.values == {"mixed": 2.5 / 3, "many": (1e8 + 9) / 10}


def test_a_history_of_nothing_names_what_there_is():
    collector = MetricsCollector()
    with pytest.raises(KeyError, match=r"^name must be .* got 'loss'\. There are: none\.$"):
        collector.get_history("loss")
    collector.update(accuracy=1.0)
    collector.end_epoch()
    with pytest.raises(KeyError, match="There are: accuracy"):
        collector.get_history("loss")
    collector.get_history("accuracy").append(3.0)
    assert collector.get_history("accuracy") == [1.0]
