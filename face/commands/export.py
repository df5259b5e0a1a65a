"""Write a trained model for other programs, with a model card."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from diptych.commands.encoder_options import Run, factory_named
from diptych.recipes.export import export as exported


def export(
    run: Run,
    *,
    to: Literal["safetensors", "huggingface", "onnx"],
    out: Path | None = None,
    checkpoint: Literal["best", "last"] = "best",
    factory: str | None = None,
) -> int:
    """Write a trained model for other programs, with a model card.

    Args:
        run: directory of a run of diptych train.
        to: format.
        out: new folder to write; none: a folder of the format's name in the run's directory.
        checkpoint: the best one by the run's metric, or the last one.
        factory: module:function that built the towers, if they are of own code.
    """
    folder = run / to if out is None else out
    exported(run, to, folder, factory=factory_named(factory), checkpoint=checkpoint)
    sys.stdout.write(f"Wrote {folder}.\n")
    return 0
