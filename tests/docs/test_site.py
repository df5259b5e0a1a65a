"""The documentation builds without a warning."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Trainer" in (tmp_path / "api" / "engine" / "index.html").read_text("utf-8")
    handlers = (tmp_path / "api" / "handlers" / "index.html").read_text("utf-8")
    shown = " ".join(re.sub(r"<[^>]+>", "", handlers).split())
    # What attrs makes and what a docstring says of events are for griffe to be told.
    assert "GradientClipping( *, max_norm: float | None = None" in shown
    assert "Evaluation( loader: Iterable[Any], *, metrics: Metrics = ()" in shown
    assert "loss: bool = ..., )" in shown
    assert "<strong>Event:</strong>" in handlers
