"""The quickstart as a notebook: its cells run in their order, and it is kept without outputs."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "quickstart.ipynb"


def test_the_cells_run_from_top_to_bottom(tmp_path, monkeypatch, emoji):
    monkeypatch.chdir(tmp_path)
    # A part of the emoji: the notebook itself takes all of them.
    monkeypatch.setattr("examples.emoji.data.read_emoji", lambda: emoji[::12])
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    script = tmp_path / "quickstart.py"
    script.write_text(code, encoding="utf-8")

    names = runpy.run_path(str(script))

    assert len(names["trainer"].metrics.get_history("val/recall@1")) == 5
    assert (names["run_dir"] / "metrics.jsonl").is_file()


def test_it_is_kept_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))

    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4
    assert len(code) == 4
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
