"""The lazy facades: what they list, what importing them loads, and what it does not."""

from __future__ import annotations

import ast
import importlib
import inspect
import pydoc
import re
import subprocess
import sys
import textwrap

import pytest

OTHERS = ("diptych.engine", "diptych.handlers", "diptych.losses")
PACKAGES = ("diptych", *OTHERS, "diptych.recipes")
HEAVY = {"matplotlib", "PIL", "torch._dynamo", "diptych.engine.certificate"}


def loaded_by(statement: str, modules: set[str]) -> set[str]:
    """Return which of the modules a fresh process has loaded after a statement."""
    script = f"import sys\n{statement}\nprint(*({modules!r} & set(sys.modules)))"
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("package", PACKAGES)
def test_a_facade_lists_public_names_alone(package: str) -> None:
    facade = importlib.import_module(package)

    assert dir(facade) == sorted(facade.__all__)
    assert [n for n in dir(facade) if n.startswith("_")] == (
        ["__version__"] if package == "diptych" else []
    )


def test_the_package_has_every_public_name_of_the_others() -> None:
    own, *others = (set(importlib.import_module(name).__all__) for name in ("diptych", *OTHERS))

    assert own == {"__version__", "engine", "handlers", "losses", "recipes"}.union(*others)


@pytest.mark.parametrize("package", PACKAGES)
def test_each_public_name_is_there(package: str) -> None:
    facade = importlib.import_module(package)

    assert [name for name in facade.__all__ if getattr(facade, name) is None] == []


def test_a_name_is_one_object_wherever_it_is_imported_from() -> None:
    import diptych
    from diptych.engine import Trainer
    from diptych.engine.trainer import Trainer as Original

    assert diptych.Trainer is diptych.engine.Trainer is Trainer is Original


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    import diptych.losses

    with pytest.raises(AttributeError, match=r"module 'diptych\.losses' has no attribute 'Clip'"):
        diptych.losses.Clip  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_facade_loads_neither_torch_nor_ignite(package: str) -> None:
    assert loaded_by(f"import {package}", {"torch", "ignite", *HEAVY}) == set()


def test_every_public_handler_loads_nothing_heavy() -> None:
    assert loaded_by("from diptych.handlers import *", HEAVY) == set()


def test_every_public_loss_loads_no_ignite() -> None:
    assert loaded_by("from diptych.losses import *", {"ignite"}) == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_help_begins_with_a_page_of_the_public_names_by_folder(package: str) -> None:
    facade = importlib.import_module(package)
    page = inspect.getdoc(facade) or ""
    lines = page.splitlines()

    shown = pydoc.plain(pydoc.render_doc(facade)).partition("DESCRIPTION\n")[2]
    description = textwrap.dedent(shown.partition("\nPACKAGE CONTENTS")[0]).rstrip()
    assert description.splitlines() == lines[2:]  # the first line is beside the name
    assert len(lines) < 150
    assert max(map(len, lines)) <= 100
    words = re.findall(r"^    ([A-Za-z_, ]*?)(?:  .*)?$", page, re.MULTILINE)
    listed = [name for line in words for name in re.split(r",\s*|\s+", line) if name]
    assert {*facade.__all__} <= {*listed}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_example_of_a_page_has_three_lines_and_uses_public_names(package: str) -> None:
    facade = importlib.import_module(package)
    text = (inspect.getdoc(facade) or "").partition("\nNames:")[0]
    example = re.search(r"(?:^    .*\n?){3,}", text, re.MULTILINE)

    assert example is not None
    tree = ast.parse(inspect.cleandoc(example[0]))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    public = {*facade.__all__} | {*importlib.import_module("diptych").__all__}
    assert len(tree.body) == 3
    assert {name for name in used if name[0].isupper()} <= public
