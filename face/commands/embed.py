"""Write the features of the images in a folder to a safetensors file."""

from __future__ import annotations

import sys
from pathlib import Path

from tyro.conf import OmitArgPrefixes, Positional

from diptych.commands.encoder_options import EncoderOptions


def embed(
    run: Positional[Path],
    *,
    images: Path,
    out: Path,
    options: OmitArgPrefixes[EncoderOptions] = EncoderOptions(),  # noqa: B008 - it is frozen
) -> int:
    """Write the features of the images in a folder to a safetensors file.

    Args:
        run: directory of a run of diptych train.
        images: folder of the images.
        out: file to write; search reads it instead of the folder.
        options: of the model.
    """
    if out.is_dir():
        raise ValueError(f"--out must be a file to write, got {out}, which is a folder")
    found = options.load(run).embed(images)
    found.save(out)
    sys.stdout.write(f"Wrote {len(found.names):,} features to {out}.\n")
    return 0
