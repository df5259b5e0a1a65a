"""Train on your own images and captions, then search them: the commands as a few lines of Python.

    python examples/own_data.py --images DIR --captions captions.csv --epochs 20

takes the flags of `diptych train`, which does the same. Copy this file to change a part of it:
`diptych.recipes` has the functions that read the data, build the towers and encode.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from diptych.commands.train import parse
from diptych.engine import Trainer, process_group
from diptych.handlers import new_run
from diptych.recipes import DataError, Encoder, ImageTable, image_rows, train

QUERY = "a smiling face"


def read_pairs(images: Path, captions: Path) -> tuple[ImageTable, str]:
    """Return the rows of a folder and its captions, and their summary.

    Raises:
        SystemExit: if the folder or the file cannot be read, with the reason.
    """
    try:
        table = image_rows(images, captions)
    except DataError as error:
        raise SystemExit(str(error)) from error
    return table, table.summary(held_out=0.1)


def main(arguments: Sequence[str] | None = None) -> Trainer:
    """Train, search the images for a text, and return the trainer."""
    flags = parse(sys.argv[1:] if arguments is None else arguments)
    run_dir = flags.run_dir or new_run("runs", "own")
    trainer = train(flags.settings, run_dir, resume=flags.resume)
    if flags.settings.images is not None:
        encoder = Encoder.load(run_dir)
        for hit in encoder.search(QUERY, encoder.embed(flags.settings.images), top=5):
            print(f"{hit.score:.3f}  {hit.name}")
    return trainer


if __name__ == "__main__":
    with process_group():
        main()
