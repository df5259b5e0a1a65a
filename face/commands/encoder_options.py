"""The arguments of the commands that use a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import attrs
from tyro.conf import Positional, arg

from diptych.commands.factory import find_factory
from diptych.recipes.encoder import Embeddings, Encoder

Run = Annotated[Path, arg(metavar="RUN"), Positional]
"""The first argument of a command."""


@attrs.frozen(kw_only=True)
class EncoderOptions:
    """How to load and run a trained model.

    Attributes:
        factory: module:function that built the towers, if they are of own code.
        checkpoint: the best one by the run's metric, or the last one.
        device: such as cuda:0; none: an accelerator, else the CPU.
        precision: fp32, bf16 or fp16.
        batch_size: images or texts at once.
        workers: processes that read images.
    """

    factory: str | None = None
    checkpoint: Literal["best", "last"] = "best"
    device: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch_size: int = 256
    workers: int = 0

    def load(self, run: Path) -> Encoder:
        """Return the encoder of a run."""
        return Encoder.load(
            run,
            factory=factory_named(self.factory),
            checkpoint=self.checkpoint,
            device=self.device,
            precision=self.precision,
            batch_size=self.batch_size,
            workers=self.workers,
        )


def features_of(images: Path, encoder: Encoder) -> Embeddings:
    """Return the features of a folder of images, or those in a file."""
    return Embeddings.load(images) if images.is_file() else encoder.embed(images)


def factory_named(text: str | None) -> Any:
    """Return the function that `module:function` names; None for None."""
    return None if text is None else find_factory(text)
