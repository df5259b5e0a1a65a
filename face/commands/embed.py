"""Write the features of the images in a folder to a safetensors file."""

from __future__ import annotations

import sys
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from diptych.commands.encoder_options import EncoderOptions, Run


def embed(
    run: Run,
    *,
    images: Path,
    out: Path,
    model: OmitArgPrefixes[EncoderOptions] = EncoderOptions(),  # noqa: B008 - it is frozen
) -> int:
    """Write the features of the images in a folder to a safetensors file.

    Args:
        run: directory of a run of diptych train.
        images: folder of the images.
        out: file to write; search reads it instead of the folder.
        model: how it is loaded and run.
    """
    if out.is_dir():
        raise ValueError(f"--out must be a file to write, got {out}, which is a folder")
    found = model.load(run).embed(images)
    found.save(out)
    sys.stdout.write(f"Wrote {len(found.names):,} features to {out}.\n")
    return 0
