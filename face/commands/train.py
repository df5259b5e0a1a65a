"""Train two towers on your own images and captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs
import tyro
from tyro.conf import OmitArgPrefixes

from diptych.commands.encoder_options import factory_named
from diptych.engine.distributed.process_group import process_group
from diptych.recipes.settings import RECIPE, Settings, read_settings
from diptych.recipes.training import train


@attrs.frozen(kw_only=True)
class TrainFlags:
    """Train two towers on your own images and captions.

    The data are checked before anything is written. The run's directory holds recipe.yaml, the
    settings that repeat the run.

    Attributes:
        settings: what is trained, and how.
        run_dir: directory of the run; none: a new one below runs/.
        config: recipe.yaml of an earlier run: the settings that are not given here.
        resume: continue the run of run-dir, or of the directory of config.
        dry_run: do everything once, and leave nothing behind.
        overfit: train on so many batches alone, to see whether the loss falls.
        factory: module:function that builds towers from the settings, in your own code.
    """

    settings: OmitArgPrefixes[Settings] = attrs.field(factory=Settings)
    run_dir: Path | None = None
    config: Path | None = None
    resume: bool = False
    dry_run: bool = False
    overfit: int = 0
    factory: str | None = None


@attrs.frozen(kw_only=True)
class _Source:
    """The flags that say which settings the others override."""

    run_dir: Path | None = None
    config: Path | None = None
    resume: bool = False


def main(arguments: Sequence[str]) -> int:
    """Train; return 0."""
    flags = parse(arguments)
    run_dir = flags.run_dir
    if run_dir is None and flags.resume and flags.config is not None:
        run_dir = flags.config.parent
    with process_group():
        train(
            flags.settings,
            run_dir,
            factory=factory_named(flags.factory),
            resume=flags.resume,
            dry_run=flags.dry_run,
            overfit=flags.overfit,
        )
    return 0


def parse(arguments: Sequence[str]) -> TrainFlags:
    """Return the flags; settings that are not given are those of `config`, or of a resumed run.

    Raises:
        DataError: if the file of settings cannot be used.
        ValueError: if `resume` is given without a run.
    """
    source, _ = tyro.cli(_Source, args=arguments, return_unknown_args=True, add_help=False)
    file = source.config
    if file is None and source.resume:
        if source.run_dir is None:
            raise ValueError("--resume must come with --run-dir or --config, got neither")
        file = source.run_dir / RECIPE
    default = TrainFlags(settings=Settings() if file is None else read_settings(file))
    return tyro.cli(TrainFlags, args=arguments, default=default, prog="diptych train")
