"""The guide's tables of losses list every loss, with its class and its paper."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import diptych.losses
from diptych.losses import available_losses, get_loss_class

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "losses.md"
ROW = re.compile(
    r"^\| `(?P<name>\w+)` \| `(?P<loss>\w+)`(?P<papers>[^|]*)\|(?P<rest>.*)\|$", re.MULTILINE
)
ROWS = {row["name"]: row for row in ROW.finditer(PAGE.read_text("utf-8"))}
# Pages and tests register other losses too.
NAMES = [
    name
    for name in available_losses()
    if get_loss_class(name).__module__.startswith(f"{diptych.losses.__name__}.")
]


def test_the_tables_list_every_loss_and_no_other() -> None:
    assert sorted(ROWS) == NAMES


def test_the_chooser_names_only_losses_that_exist() -> None:
    chooser = PAGE.read_text("utf-8").split("## Which loss to use")[1].split("##")[0]
    advised = [row.split("|")[3] for row in chooser.splitlines() if row.startswith("| ")][1:]
    named = {name for cell in advised for name in re.findall(r"`(\w+)`", cell)}
    assert len(advised) >= 15
    assert named - {"groups", "share_logit_scale"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_the_table_names_the_class_and_its_papers(name: str) -> None:
    row = ROWS[name]
    cells = [cell.strip() for cell in row["rest"].split("|")]
    papers = re.findall(r"\[(\d{4}\.\d{4,5})\]\(https://arxiv\.org/abs/(\d{4}\.\d{4,5})\)", row[0])
    docstring = inspect.getdoc(get_loss_class(name)) or ""

    assert row["loss"] == get_loss_class(name).__name__
    assert len(cells) == 4, "value, use it if, cost, elsewhere"
    assert all(cells)
    assert all(text == link and f"arXiv:{text}" in docstring for text, link in papers)
