"""Print the most probable class of each image in a folder."""

from __future__ import annotations

import sys
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from diptych.commands.encoder_options import EncoderOptions, Run, features_of
from diptych.recipes.data.captions import decoded
from diptych.recipes.encoder import TEMPLATES


def zero_shot(
    run: Run,
    *,
    images: Path,
    classes: Path,
    templates: tuple[str, ...] = TEMPLATES,
    model: OmitArgPrefixes[EncoderOptions] = EncoderOptions(),  # noqa: B008 - it is frozen
) -> int:
    """Print the most probable class of each image in a folder.

    Args:
        run: directory of a run of diptych train.
        images: folder of the images, or a file that diptych embed wrote.
        classes: text file with the name of a class on each line.
        templates: texts with {} where the name of a class goes.
        model: how it is loaded and run.
    """
    if not classes.exists():
        raise ValueError(
            f"--classes must be a file with the name of a class on each line, got {classes}"
        )
    names = [line.strip() for line in decoded(classes).splitlines() if line.strip()]
    encoder = model.load(run)
    found = features_of(images, encoder)
    best = encoder.zero_shot(found.features, names, templates=templates).max(dim=1)
    for name, index, probability in zip(found.names, best.indices, best.values, strict=True):
        sys.stdout.write(f"{probability:.3f}  {names[index]}  {name}\n")
    return 0
