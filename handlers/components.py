"""Components: named parts of a model and its loss, and their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from diptych.engine.modules import named_parameters
from diptych.engine.name_patterns import matches
from diptych.engine.trainer import Trainer

Components = Mapping[str, str | Sequence[str]] | Sequence[str]
"""Names of components with the paths of their parameters; a path alone is its own name.

A path is the beginning of a parameter's name, in whole parts: "image.blocks" matches
"image.blocks.0.weight" and not "image.blocks_2.weight". A part may contain wildcards:
"image.blocks.*.attention". Names of the loss's parameters begin with "loss".
"""


def find_components(trainer: Trainer, components: Components | None) -> dict[str, set[int]]:
    """Return the ids of each component's parameters, by the component's name.

    Args:
        trainer: the trainer of model and loss.
        components: the components; None: each top-level child of the model, each parameter of the
            model itself, and the loss.

    Raises:
        ValueError: if a component has no parameter; the message lists the first parts of names.
    """
    named = named_parameters(trainer.model, trainer.loss)
    if components is None:
        components = list(dict.fromkeys(name.partition(".")[0] for name in named))
    found: dict[str, set[int]] = {}
    for component, patterns in _with_patterns(components):
        found[component] = {
            id(parameter)
            for name, parameter in named.items()
            if any(matches(name, pattern) for pattern in patterns)
        }
        if not found[component]:
            raise ValueError(
                f"component {component!r} must have parameters, got none that begin with "
                f"{' or '.join(patterns)}; names begin with "
                f"{', '.join(dict.fromkeys(name.partition('.')[0] for name in named))}"
            )
    return found


def _with_patterns(components: Components) -> Iterator[tuple[str, Sequence[str]]]:
    if not isinstance(components, Mapping):
        components = {name: name for name in components}
    for component, patterns in components.items():
        yield component, [patterns] if isinstance(patterns, str) else list(patterns)
