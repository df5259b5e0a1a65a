"""The progress bar, on a terminal and in a file."""

from __future__ import annotations

import fcntl
import io
import logging
import math
import os
import re
import struct
import termios
from collections.abc import Iterator
from typing import Any

import pytest
from ignite.engine import Events

from diptych.handlers import LearningRate, ProgressBar, Throughput
from tests.handlers.runs import Stop, Terminal, loader, make_trainer, report_each_epoch, stop_at

START_OF_LINE = "\r\x1b[K"


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("diptych.handlers.sinks.progress_bar.perf_counter", clock)
    return clock


def shown(stream: io.StringIO, *handlers: Any, epochs: int = 2, clock: Clock | None = None) -> str:
    """Run with a progress bar that draws at every iteration, each of which takes a second."""
    trainer = make_trainer()
    if clock is not None:
        trainer.add_event_handler(Events.ITERATION_STARTED, lambda: tick(clock, 1.0))
    trainer.attach(*handlers, ProgressBar(stream=stream, refresh=0, interval=0))
    trainer.run(loader(), max_epochs=epochs)
    return stream.getvalue()


def tick(clock: Clock, seconds: float) -> None:
    clock.now += seconds


def drawings(text: str) -> list[str]:
    return re.split(r"[\r\n]+(?:\x1b\[K)?", text.strip())


def test_a_line_shows_progress_loss_rate_speed_and_time_left(clock):
    lines = drawings(shown(io.StringIO(), LearningRate(warmup=1), clock=clock))

    assert lines[2] == "epoch 1/2   25%  2 samples/s  0:09 left"
    # At the log point of iteration 4 the schedule is at 1 + cos(pi 2/11) halves.
    rate = 0.1 * (1 + math.cos(math.pi * 2 / 11)) / 2
    assert re.fullmatch(
        rf"epoch 1/2   42%  loss 0\.\d{{4}}  lr {rate:.3g}  2 samples/s  0:07 left", lines[4]
    )


def test_speed_is_that_of_the_last_log_point_where_it_is_measured(monkeypatch, clock):
    monkeypatch.setattr(Throughput, "_samples_per_second", lambda *_: 12345.6)

    lines = drawings(shown(io.StringIO(), Throughput(), clock=clock))

    assert "12,346 samples/s" in lines[4]


def test_a_terminal_shows_one_line_that_is_rewritten_in_place(clock):
    text = shown(Terminal(), clock=clock)

    assert text.count("\n") == 1
    assert text.endswith("\n")
    *_, last = text.split(START_OF_LINE)
    assert re.fullmatch(r"epoch 2/2  ━{20}  100%  loss 0\.\d+  1 samples/s  in 0:12\n", last)
    assert "━━━━━───────────────   25%" in text


def test_a_terminal_is_rewritten_a_few_times_a_second_only(clock):
    stream, trainer = Terminal(), make_trainer()
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: tick(clock, 0.1))
    trainer.attach(ProgressBar(stream=stream, refresh=0.25))

    trainer.run(loader(), max_epochs=2)

    # Iterations 1, 4, 7 and 10, 0.1 s each, and the end.
    assert stream.getvalue().count(START_OF_LINE) == 5


def test_a_file_gets_a_line_an_interval_and_one_an_epoch(clock):
    stream, trainer = io.StringIO(), make_trainer()
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: tick(clock, 10))
    trainer.attach(ProgressBar(stream=stream, interval=30))

    trainer.run(loader(), max_epochs=2)

    shares = re.findall(r"(\d+)%", stream.getvalue())
    assert shares == ["25", "50", "50", "75", "100", "100"]
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def results(stream: io.StringIO, *values: float, tag: str = "val/recall@1") -> list[str]:
    trainer = make_trainer()
    report_each_epoch(trainer, *values, tag=tag)
    trainer.attach(ProgressBar(stream=stream, refresh=1e9, interval=1e9))
    trainer.run(loader(), max_epochs=len(values))
    return [line for line in re.split(r"[\r\n]+", stream.getvalue()) if "step" in line]


def test_results_have_the_change_and_a_mark_at_the_best():
    assert results(io.StringIO(), 0.25, 0.5, 0.375, 0.5, 0.75) == [
        "epoch 1, step 6  val  recall@1 0.25",
        "epoch 2, step 12  val  recall@1 0.5 (+0.25, best)",
        "epoch 3, step 18  val  recall@1 0.375 (-0.125)",
        "epoch 4, step 24  val  recall@1 0.5 (+0.125)",
        "epoch 5, step 30  val  recall@1 0.75 (+0.25, best)",
    ]


def test_results_of_one_group_name_it_once():
    trainer, stream = make_trainer(), io.StringIO()
    values = {"val/a/r@1": 0.5, "val/loss": 2.0, "val/b/r@1": 0.25, "val/a/r@5": 0.75}
    trainer.add_event_handler(Events.COMPLETED, lambda: trainer.metrics.report(6, values))
    trainer.attach(ProgressBar(stream=stream)).run(loader(), max_epochs=1)

    expected = "epoch 1, step 6  val  loss 2  a  r@1 0.5  r@5 0.75  b  r@1 0.25"
    assert stream.getvalue().splitlines()[-1] == expected


def test_the_best_loss_is_the_lowest():
    lines = results(io.StringIO(), 2.0, 3.0, 1.0, tag="val/loss")

    assert ["best" in line for line in lines] == [False, False, True]


def test_nan_is_never_the_best():
    lines = results(io.StringIO(), math.nan, 0.5, math.nan, 0.75)

    assert ["best" in line for line in lines] == [False, True, False, True]


def test_the_best_is_green_on_a_terminal_unless_no_color_is_set(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32mbest\x1b[0m)" in results(Terminal(), 0.1, 0.2)[-1]

    monkeypatch.setenv("NO_COLOR", "1")
    assert results(Terminal(), 0.1, 0.2)[-1].endswith("(+0.1, best)")


def test_a_dumb_terminal_is_treated_as_a_file(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")

    assert "\x1b" not in shown(Terminal())


@pytest.fixture
def narrow_terminal() -> Iterator[tuple[Any, int]]:
    reader, writer = os.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        yield stream, reader
    os.close(reader)


def test_nothing_is_wider_than_the_terminal(narrow_terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    stream, reader = narrow_terminal
    trainer = make_trainer()
    names = ("val/recall@1", "val/recall@5", "val/image_to_text/recall@1", "val/loss")
    trainer.add_event_handler(
        Events.COMPLETED, lambda: trainer.metrics.report(6, dict.fromkeys(names, 0.5))
    )
    trainer.attach(ProgressBar(stream=stream, refresh=0))

    trainer.run(loader(), max_epochs=1)

    stream.write("END")
    stream.flush()
    written = b""
    while not written.endswith(b"END"):  # a terminal hands it over bit by bit
        written += os.read(reader, 1 << 16)
    text = written.decode()
    lines = [line for line in re.split(r"[\r\n]+", text.replace("\x1b[K", "")) if line]
    assert max(len(line) for line in lines) <= 40
    assert lines[-5:-2] == [
        "epoch 1, step 6  val  recall@1 0.5",
        "    recall@5 0.5  loss 0.5",
        "  image_to_text  recall@1 0.5",
    ]


def test_a_run_of_unknown_length_shows_its_steps():
    trainer, stream = make_trainer(), io.StringIO()
    trainer.attach(ProgressBar(stream=stream, interval=0))

    trainer.run((batch for batch in loader()), max_epochs=1)

    assert re.match(r"epoch 1/1  step 1  [\d,]+ samples/s\n", stream.getvalue())


def test_a_step_without_a_batch_size_shows_iterations():
    trainer, stream = make_trainer(step=lambda *_: None), io.StringIO()
    trainer.attach(ProgressBar(stream=stream, interval=0))

    trainer.run(loader(), max_epochs=1)

    assert "iterations/s" in stream.getvalue()


def test_a_resumed_run_counts_its_own_time_only(clock):
    trainer, stream = make_trainer(), io.StringIO()
    trainer.load_state_dict({"iteration": 6, "epoch_length": 6, "max_epochs": 1})
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: tick(clock, 2))
    trainer.attach(ProgressBar(stream=stream, interval=0))

    trainer.run(loader(), max_epochs=3)

    assert drawings(stream.getvalue())[1].endswith("44%  1 samples/s  0:20 left")


def test_a_warning_on_the_terminal_takes_the_place_of_the_moving_line(monkeypatch):
    trainer, stream = make_trainer(), Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as where nobody has set any up
    trainer.attach(ProgressBar(refresh=0))
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED(once=3), lambda: logging.getLogger("x").warning("hear, hear")
    )
    filters = list(logging.lastResort.filters)

    trainer.run(loader(), max_epochs=1)

    assert "left\r\x1b[Khear, hear\n\r\x1b[K" in stream.getvalue()
    assert logging.lastResort.filters == filters


def test_the_line_ends_before_an_exception():
    trainer, stream = make_trainer(), Terminal()
    trainer.attach(ProgressBar(stream=stream))
    stop_at(trainer, 3)

    with pytest.raises(Stop):
        trainer.run(loader(), max_epochs=1)

    assert stream.getvalue().endswith("\n")
    assert "100%" not in stream.getvalue()


def test_without_a_stream_it_goes_to_standard_error(capsys):
    make_trainer().attach(ProgressBar(interval=0)).run(loader(), max_epochs=1)

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("epoch 1/1")


def test_a_stream_without_unicode_gets_ascii():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream.isatty = lambda: True  # type: ignore[method-assign]
    trainer = make_trainer().attach(ProgressBar(stream=stream, refresh=0))

    trainer.run(loader(), max_epochs=1)

    stream.seek(0)
    assert "===-" in stream.read()


def test_rank_zero_alone_writes(monkeypatch):
    monkeypatch.setattr("diptych.handlers.output.output_handler.rank", lambda: 1)

    assert shown(io.StringIO()) == ""


def test_a_negative_time_is_refused():
    with pytest.raises(ValueError, match="'refresh' must be >= 0: -1"):
        ProgressBar(refresh=-1)
