"""The diagrams of the documentation are what their source draws, and tell the truth."""

from __future__ import annotations

import inspect
from xml.etree import ElementTree as ET

import pytest
from ignite.engine import Events

import diptych.handlers
from diptych.engine import EvaluationEvents, MetricsEvents, RunEvents, StepEvents
from docs.diagrams.draw import AFTER, BEFORE, DIAGRAMS, EPOCH_BEGINS, EPOCH_ENDS, FOLDER, UPDATE
from docs.diagrams.picture import Picture, TooWideError

EVENTS = {
    event.name
    for events in (Events, StepEvents, MetricsEvents, EvaluationEvents, RunEvents)
    for event in events
}
WAITING = [
    (event, handler)
    for row in (*BEFORE, *EPOCH_BEGINS, *UPDATE, *EPOCH_ENDS, *AFTER)
    if not isinstance(row, str)
    for event, handlers in [row]
    for handler in handlers
]


@pytest.mark.parametrize("name", DIAGRAMS)
def test_a_diagram_is_what_its_source_draws(name: str) -> None:
    drawn = DIAGRAMS[name]().svg()

    again = "draw them again: python -m docs.diagrams.draw"
    assert (FOLDER / f"{name}.svg").read_text("utf-8") == drawn, again


@pytest.mark.parametrize("name", DIAGRAMS)
def test_a_diagram_is_one_piece_of_svg_that_loads_nothing(name: str) -> None:
    text = (FOLDER / f"{name}.svg").read_text("utf-8")
    root = ET.fromstring(text)  # noqa: S314 - the repository's own
    attributes = [value for element in root.iter() for value in element.attrib.values()]

    assert root.get("aria-label")
    assert "\n\n" not in text
    assert not [a for a in attributes if "url(" in a and not a.startswith("url(#")]
    assert not [a for a in attributes if "//" in a]


@pytest.mark.parametrize(("event", "handler"), WAITING)
def test_a_handler_of_the_loop_waits_for_its_event(event: str, handler: str) -> None:
    docstring = inspect.getdoc(getattr(diptych.handlers, handler)) or ""

    assert event in EVENTS
    assert event in docstring


def test_the_loop_shows_every_event_of_the_step() -> None:
    shown = [row[0] for row in UPDATE if not isinstance(row, str)]

    assert [name for name in shown if name in StepEvents.__members__] == list(
        StepEvents.__members__
    )


def test_a_text_that_does_not_fit_into_its_box_is_an_error() -> None:
    with pytest.raises(TooWideError, match="must fit into 32 pixels"):
        Picture("x", 100, 100, "a box").box((0, 0, 40, 20), "much too wide for it")
