"""Representations: a line of text and a table for a notebook, without a tensor."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch
from ignite.metrics import Accuracy
from torch import nn
from torch.utils.data import TensorDataset

from diptych.engine import Evaluator, SeededLoader, Trainer, in_groups, tasks
from diptych.handlers import LearningRateCurve, find_learning_rate
from tests.handlers.runs import loader, make_trainer

VOID = {"br", "circle", "img", "polyline"}


class Nesting(HTMLParser):
    """Fails if a tag is closed that is not the innermost open one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.tags.append(tag)
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: object) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def curve() -> LearningRateCurve:
    return find_learning_rate(make_trainer(), loader(), start=1e-4, end=1e-2, steps=5)


def test_a_trainer_names_its_parts_its_settings_and_its_position():
    trainer = make_trainer(microbatch_size=1)
    trainer.run(loader(), max_iters=8)

    assert repr(trainer) == (
        "Trainer(model=Sequential of 26 parameters, loss=CrossEntropyLoss, optimizer=SGD, "
        "device=cpu, precision=fp32, microbatch_size=1, epoch=2, iteration=8)"
    )


def test_a_loader_names_its_data_set_and_its_arguments():
    data = TensorDataset(torch.zeros(1200, 2))

    shown = "SeededLoader(dataset=TensorDataset of 1,200, batch_size=8, seed=3, shuffle=True, "
    assert repr(SeededLoader(data, 8, seed=3)) == f"{shown}drop_last=False)"
    assert repr(in_groups(SeededLoader(data, 8, seed=3), 2)).endswith("drop_last=False), count=2)")


def test_an_evaluator_names_its_metrics():
    evaluator = Evaluator(
        nn.Linear(2, 2), task=tasks.classification, metrics=[Accuracy()], device="cpu"
    )

    assert repr(evaluator) == (
        "Evaluator(model=Linear of 6 parameters, task=Classification, metrics=accuracy, device=cpu)"
    )


def test_a_trainer_whose_construction_failed_has_a_representation_too():
    assert repr(Trainer.__new__(Trainer)) == "Trainer()"


def test_a_notebook_shows_a_trainer_as_a_table():
    trainer = make_trainer()
    trainer.model = nn.Sequential()
    trainer.model.__class__ = type("A<B>", (nn.Sequential,), {})

    html = trainer._repr_html_()

    assert "A&lt;B&gt;" in html
    assert Nesting(html).tags.count("tr") == 7


def test_a_learning_rate_curve_is_a_line_of_text_and_a_chart_in_a_notebook(curve):
    assert repr(curve).startswith("LearningRateCurve(updates=5, start=0.0001, end=0.01")
    html = curve._repr_html_()
    assert Nesting(html).tags.count("svg") == 1
    assert "curve" in html


def test_overfitting_shows_its_verdict_instead_of_its_losses():
    found = make_trainer().overfit(loader(), updates=3)

    assert repr(found).startswith("Overfit(batches=1, first=")
    assert found.verdict in repr(found)
