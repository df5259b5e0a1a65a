"""Batches on their way to a device: the order of the streams, whose memory, and no number changed.

The CPU's streams do nothing, so that all of this runs there; `tests/test_cuda_prefetch.py` is about
a real device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ignite.engine import Events
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from diptych.engine import SeededLoader, Trainer
from diptych.engine.data import prefetch
from diptych.engine.data.prefetch import Prefetcher, kind_of, mover
from diptych.engine.state.run_state import load_run_state, run_state
from tests.engine.loop.loops import Positioned
from tests.engine.models import paired, trainer_of

CPU = torch.device("cpu")


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefetch on the CPU too."""
    monkeypatch.setattr(prefetch, "DEVICES_WITH_STREAMS", {"cpu", "cuda"})


# -- the order of the streams --------------------------------------------------------------------


class Streams:
    """Streams and events that take down what is asked of them.

    Attributes:
        log: what was asked, in order.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = "own"

    def Stream(self, _: object) -> Stream:  # noqa: N802 - as torch.cuda calls it
        return Stream("side", self)

    def Event(self) -> Event:  # noqa: N802
        return Event(self)

    def current_stream(self, _: object) -> Stream:
        return Stream(self.current, self)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before


class Stream:
    def __init__(self, name: str, streams: Streams) -> None:
        self.name, self.streams = name, streams

    def wait_event(self, _: object) -> None:
        self.streams.log.append(f"{self.name} waits for the event")

    def wait_stream(self, other: Stream) -> None:
        self.streams.log.append(f"{self.name} waits for {other.name}")


class Event:
    def __init__(self, streams: Streams) -> None:
        self.streams = streams

    def record(self, stream: Stream) -> None:
        self.streams.log.append(f"event on {stream.name}")


class Operations(TorchDispatchMode):
    """Takes down on which stream memory is taken and a batch is copied."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.streams = streams

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = {"aten::copy_": "copy", "aten::empty_strided": "memory"}.get(func._schema.name)
        if name:
            self.streams.log.append(f"{name} on {self.streams.current}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    streams = Streams()
    monkeypatch.setattr(torch, "get_device_module", lambda _: streams)
    return streams


def test_a_copy_waits_for_its_memory_and_the_update_for_the_copy(streams):
    bring = Prefetcher(CPU)
    batch = {"image": torch.ones(2, 3), "text": "two words"}
    with Operations(streams):
        bring(batch)
        first, streams.log = streams.log, []
        bring(batch)
    # Nothing is known of the first batch before it comes: a plain copy, and memory for the next.
    assert first == ["memory on own", "event on own"]
    assert streams.log == [
        "side waits for the event",
        "copy on side",
        "own waits for side",
        "memory on own",
        "event on own",
    ]


def test_the_update_waits_for_what_was_copied_before_a_failure(streams):
    class Strange(torch.Tensor):
        def to(self, *_: Any, **__: Any) -> Tensor:
            raise ArithmeticError("planted")

    bring, image = Prefetcher(CPU), torch.ones(2, 3)
    bring([image, torch.ones(1)])
    streams.log.clear()
    with pytest.raises(ArithmeticError):
        bring([image, torch.ones(1).as_subclass(Strange)])
    assert streams.log == ["side waits for the event", "own waits for side"]


def test_nothing_is_asked_of_a_batch_that_is_there_already(streams):
    bring, batch = Prefetcher(torch.device("meta")), torch.ones(3, device="meta")
    for _ in range(3):
        assert bring([batch])[0] is batch
    assert streams.log == []


# -- whose memory it is --------------------------------------------------------------------------


def test_a_batch_that_somebody_keeps_is_not_written_over():
    bring = Prefetcher(CPU)
    kept = [bring({"image": torch.full((4,), float(number))}) for number in range(5)]
    assert [float(batch["image"].sum()) for batch in kept] == [0, 4, 8, 12, 16]
    assert len({batch["image"].data_ptr() for batch in kept}) == 5


def test_no_more_than_one_batch_of_memory_is_held():
    bring = Prefetcher(CPU)
    for samples in (4, 4, 2, 2):
        bring({"image": torch.ones(samples, 3), "again": torch.ones(samples, 3)})
        [held] = bring._memory.values()
        assert [tuple(tensor.shape) for tensor in held] == [(samples, 3)] * 2


SHAPES = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["plain", "last", "holes", "int"])))


def leaf_of(samples: int, how: str) -> Tensor:
    if how == "last":
        return torch.randn(samples, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    if how == "holes":
        return torch.randn(samples, 6)[:, ::2]
    return torch.randn(samples, 5) if how == "plain" else torch.randint(9, (samples,))


@given(batches=st.lists(SHAPES, max_size=5))
def test_whatever_the_batches_are_they_arrive_as_plain_copies_do(batches):
    bring = Prefetcher(CPU)
    for shapes in batches:
        batch = [leaf_of(*shape) for shape in shapes]
        arrived = bring(batch)
        for given_leaf, found in zip(batch, arrived, strict=True):
            expected = given_leaf.to(CPU, copy=True)
            assert torch.equal(found, expected)
            assert found.dtype == expected.dtype
            if how_is_dense(given_leaf):
                assert found.stride() == expected.stride()


def how_is_dense(leaf: Tensor) -> bool:
    return kind_of(leaf) is not None


@pytest.mark.parametrize(
    "leaf",
    [
        torch.ones(2, requires_grad=True),
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, device="meta"),
        torch.ones(4)[::2],
        torch.nn.Parameter(torch.ones(2), requires_grad=False),
    ],
)
def test_what_is_no_plain_tensor_of_the_host_is_left_to_torch(leaf):
    assert kind_of(leaf) is None


def test_only_a_device_with_streams_prefetches():
    batch = {"image": torch.ones(2)}
    assert mover(CPU, prefetch=True)(batch)["image"] is batch["image"]
    assert not isinstance(mover(torch.device("meta"), prefetch=True), Prefetcher)
    assert not isinstance(mover(torch.device("cuda"), prefetch=False), Prefetcher)


# -- no number, and not the place in the data ----------------------------------------------------


class PairsAt(Positioned):
    """`Positioned`, with batches in place of numbers."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for index in super().__iter__():
            yield paired_at(index)


def paired_at(index: int) -> dict[str, Tensor]:
    torch.manual_seed(index)
    return paired(6 if index < 4 else 3)


def rows() -> list[dict[str, Tensor]]:
    torch.manual_seed(7)
    batch = paired(27)
    return [{key: value[i] for key, value in batch.items()} for i in range(27)]


def seeded() -> SeededLoader:
    return SeededLoader(rows(), batch_size=6, seed=3)


def stateful() -> PairsAt:
    return PairsAt(5)


def plain() -> DataLoader[Any]:
    return DataLoader(rows(), batch_size=6, shuffle=True)  # type: ignore[arg-type]


def made(**settings: Any) -> Trainer:
    torch.manual_seed(1)
    return trainer_of(seed=0, **settings)


def state_of(trainer: Trainer) -> list[Tensor]:
    return [p.detach() for m in (trainer.model, trainer.loss) for p in m.parameters()]


def same(first: Trainer, second: Trainer) -> bool:
    return all(map(torch.equal, state_of(first), state_of(second)))


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("data", [seeded, stateful, plain])
def test_prefetching_changes_no_weight(everywhere, data, size):
    with_it, without = made(microbatch_size=size), made(microbatch_size=size, prefetch=False)
    assert isinstance(with_it._process_function.to_device, Prefetcher)
    assert not isinstance(without._process_function.to_device, Prefetcher)
    for trainer in (with_it, without):
        trainer.run(data(), max_epochs=3)
    assert same(with_it, without)
    assert torch.equal(run_state(with_it)["random"][0]["torch"], torch.get_rng_state())


@pytest.mark.parametrize("stop", [1, 4, 5, 7])
@pytest.mark.parametrize("data", [seeded, stateful])
def test_a_checkpoint_knows_the_batches_that_were_trained_on_and_no_other(everywhere, data, stop):
    whole, cut = made(), made()
    whole.run(data(), max_epochs=3)
    cut.add_event_handler(Events.ITERATION_COMPLETED(once=stop), cut.terminate)
    cut.run(data(), max_epochs=3)
    state = run_state(cut)
    position = state["data"][0]["position"]
    assert position.get("batch", position.get("position")) == (stop - 1) % 5 + 1
    resumed = made()
    resumed.state.dataloader = rest = data()
    load_run_state(resumed, state)
    resumed.run(rest, max_epochs=3)
    assert same(whole, resumed)


def test_a_plain_loader_is_continued_where_the_run_stands(everywhere):
    whole, cut = made(), made()
    whole.run(plain(), max_epochs=2)
    cut.add_event_handler(Events.ITERATION_COMPLETED(once=3), cut.terminate)
    data = plain()
    cut.run(data, max_epochs=2)
    cut.run(data, max_epochs=2)
    assert same(whole, cut)


def test_a_failing_loader_fails_in_its_own_iteration(everywhere):
    trainer, data = made(), PairsAt(5, {2: ArithmeticError("planted")})
    with pytest.raises(ArithmeticError):
        trainer.run(data, max_epochs=1)
    assert trainer.state.iteration == 2
    trainer.run(data, max_epochs=1)
    whole = made()
    whole.run(stateful(), max_epochs=1)
    assert same(whole, trainer)


def test_a_loader_is_asked_for_a_batch_when_its_iteration_comes(everywhere):
    asked: list[tuple[str, int]] = []

    class Noting(PairsAt):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for index, batch in enumerate(super().__iter__()):
                asked.append(("batch", index))
                yield batch

    trainer = made()
    for event in (Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED, Events.ITERATION_COMPLETED):
        trainer.add_event_handler(
            event, lambda e, name=event.name: asked.append((name, e.state.iteration))
        )
    trainer.run(Noting(3), max_epochs=1)
    assert asked == [
        entry
        for i in range(3)
        for entry in (
            ("GET_BATCH_STARTED", i),
            ("batch", i),
            ("GET_BATCH_COMPLETED", i),
            ("ITERATION_COMPLETED", i + 1),
        )
    ]


def test_data_that_take_the_place_of_others_are_the_next_batch(everywhere):
    trainer, seen = made(), []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.batch))
    first, second = [paired_at(0)] * 4, [paired_at(1)] * 4
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=2), lambda e: e.set_data(second))
    trainer.run(first, max_epochs=1)
    assert [batch is second[0] for batch in seen] == [False, False, True, True]
