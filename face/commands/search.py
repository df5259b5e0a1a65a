"""Print the names of the images that match a text best, with their cosine similarities."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from diptych.commands.encoder_options import EncoderOptions, Run, features_of


def search(
    run: Run,
    query: Annotated[str, arg(metavar="TEXT"), Positional],
    *,
    images: Path,
    top: int = 12,
    model: OmitArgPrefixes[EncoderOptions] = EncoderOptions(),  # noqa: B008 - it is frozen
) -> int:
    """Print the names of the images that match a text best, with their cosine similarities.

    Args:
        run: directory of a run of diptych train.
        query: what the images are to show.
        images: folder of the images, or a file that diptych embed wrote.
        top: images to print.
        model: how it is loaded and run.
    """
    encoder = model.load(run)
    found = features_of(images, encoder)
    for hit in encoder.search(query, found, top=top):
        sys.stdout.write(f"{hit.score:.4f}  {hit.name}\n")
    return 0
