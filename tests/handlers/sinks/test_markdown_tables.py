"""The Markdown tables."""

from __future__ import annotations

from diptych.handlers import Finding
from diptych.handlers.sinks.markdown_tables import findings_list, markdown_table, model_table
from tests.handlers.runs import make_trainer


def test_the_model_is_counted_by_component():
    trainer = make_trainer()
    for parameter in trainer.model[0].parameters():
        parameter.requires_grad_(False)

    assert model_table(trainer.model, trainer.loss).splitlines() == [
        "| component | parameters | trainable |",
        "| --- | --- | --- |",
        "| 0 | 16 | 0 |",
        "| 2 | 10 | 10 |",
        "| all | 26 | 10 |",
    ]


def test_a_finding_is_a_line_with_its_step():
    lines = findings_list([Finding("collapse", 120, "spread\n0.01", "Lower the rate.")])

    assert lines == "- **collapse**, step 120: spread 0.01. Lower the rate."


def test_a_cell_cannot_break_the_table():
    assert markdown_table(["a"], [["x|y\nz"]]).splitlines()[-1] == "| x\\|y z |"
