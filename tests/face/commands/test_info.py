"""`diptych info`: what a bug report needs."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from diptych.__main__ import main
from diptych.commands import info
from diptych.version import __version__
from tests.losses.processes import printed as printed_by

ROOT = Path(__file__).resolve().parents[3]
OF_DEVELOPMENT = {"examples", "docs", "test", "dev"}


def test_it_prints_versions_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"^(\S+) +(\S.*)$", printed, re.MULTILINE))
    assert rows["diptych"].startswith(f"{__version__} in ")
    assert rows["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert rows["torch"] == torch.__version__
    assert rows["pytorch-ignite"] == metadata.version("pytorch-ignite")
    assert rows["plots"] == f"matplotlib {metadata.version('matplotlib')}"
    assert "cores" in rows["cpu"]


def test_an_extra_that_is_missing_is_said_to_be_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "EXTRAS", {"an-extra": "no-such-package"})

    assert main(["info"]) == 0
    assert re.search(r"^an-extra +not installed$", capsys.readouterr().out, re.MULTILINE)


def test_it_lists_every_extra_of_a_user_with_its_package() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    table = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = dict(re.findall(r'^([\w-]+) = \["([\w-]+)[>"]', table, re.MULTILINE))
    names = set(re.findall(r"^([\w-]+) = \[", table, re.MULTILINE)) - OF_DEVELOPMENT

    assert set(info.EXTRAS) == names
    assert all(extras[name] == package for name, package in info.EXTRAS.items())


def test_it_loads_neither_the_compiler_nor_an_extra() -> None:
    script = (
        "import sys, diptych.__main__ as line\n"
        "line.main(['info'])\n"
        "print([m for m in ('torch._dynamo', 'ignite', 'matplotlib', 'PIL') if m in sys.modules])"
    )

    assert printed_by(script).splitlines()[-1] == "[]"
