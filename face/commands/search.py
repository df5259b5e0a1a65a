"""Print the names of the images that match a text best, with their cosine similarities."""

from __future__ import annotations

import sys
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from diptych.commands.encoder_options import EncoderOptions, features_of


def search(
    run: Positional[Path],
    query: Positional[str],
    *,
    images: Path,
    top: int = 12,
    options: OmitArgPrefixes[EncoderOptions] = EncoderOptions(),  # noqa: B008 - it is frozen
) -> int:
    """Print the names of the images that match a text best, with their cosine similarities.

    Args:
        run: directory of a run of diptych train.
        query: text.
        images: folder of the images, or a file that diptych embed wrote.
        top: images to print.
        options: of the model.
    """
    encoder = options.load(run)
    found = features_of(images, encoder)
    for hit in encoder.search(query, found, top=top):
        sys.stdout.write(f"{hit.score:.4f}  {hit.name}\n")
    return 0
