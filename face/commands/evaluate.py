"""Print what a model reaches: retrieval both ways for captions, accuracies for classes."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes

from diptych.commands.encoder_options import EncoderOptions, Run
from diptych.handlers.files import write_atomically
from diptych.recipes.data.image_files import unreadable
from diptych.recipes.data.image_table import image_rows
from diptych.recipes.data.rows import problem_report
from diptych.recipes.evaluation import evaluate_with_chance


def evaluate(
    run: Run,
    *,
    images: Path,
    captions: Path | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    part: Literal["all", "train", "val", "test"] = "all",
    out: Path | None = None,
    model: OmitArgPrefixes[EncoderOptions] = EncoderOptions(),  # noqa: B008 - it is frozen
) -> int:
    """Print what a model reaches: retrieval both ways for captions, accuracies for classes.

    Args:
        run: directory of a run of diptych train.
        images: folder of the images.
        captions: file of captions, or folder of text files; none: metadata or text files in the
            folder of the images, or its subfolders as classes.
        image_column: column of the image names; none: recognised.
        caption_column: column of the captions; none: recognised.
        part: part that the data name; if they name none, that of the run: val was held out.
        out: file to write the values to, as JSON.
        model: how it is loaded and run.
    """
    encoder = model.load(run)
    decode = partial(unreadable, size=encoder.towers.image.size, workers=model.workers)
    table = image_rows(images, captions, columns=(image_column, caption_column), decode=decode)
    if table.problems:
        report = problem_report(table.problems, len(table.rows))
        sys.stderr.write(f"{report}\nThese rows are left out.\n")
    found = evaluate_with_chance(encoder, table, part=part)
    width = max(map(len, found.values))
    sys.stdout.write(f"{'':{width}} {'reached':>9} {'chance':>9}\n")
    for name, value in found.values.items():
        chance = f"{found.chance[name]:9.4f}" if name in found.chance else f"{'-':>9}"
        sys.stdout.write(f"{name:{width}} {value:9.4f} {chance}\n")
    if out is not None:
        chances = {f"chance/{name}": value for name, value in found.chance.items()}
        write_atomically(out, json.dumps(found.values | chances, indent=2) + "\n")
    return 0
