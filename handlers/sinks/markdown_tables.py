"""Markdown of a run: its identity, its model's parameters, and its handlers' findings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from diptych.engine.handler import Finding
from diptych.engine.state.run_identity import RunIdentity
from diptych.handlers.components import component_sizes, total_size


def model_table(model: nn.Module, loss: nn.Module) -> str:
    """Return the number of parameters of each component and of the loss: all, and trainable."""
    sizes = component_sizes(model, loss)
    rows = [
        (name, f"{size.parameters:,}", f"{size.trainable:,}")
        for name, size in {**sizes, "all": total_size(sizes)}.items()
    ]
    return markdown_table(("component", "parameters", "trainable"), rows)


def identity_table(identity: RunIdentity) -> str:
    """Return what decides a run's result, without what is declared for each module.

    Of parameters and modules, those that are frozen or in eval mode are listed.
    """
    values = dict(identity.values)
    off = {
        title: ", ".join(name for name, on in values.pop(section).items() if not on) or "none"
        for section, title in (("requires_grad", "frozen"), ("training", "in eval mode"))
    }
    del values["modules"], values["tensors"]
    rows = [(name, str(value)) for name, value in RunIdentity(values).flat().items()]
    return markdown_table(("name", "value"), [*rows, *off.items()])


def findings_list(findings: Sequence[Finding]) -> str:
    """Return findings as a list: TensorBoard breaks words in the narrow columns of a table."""
    lines = [f"**{f.rule}**, step {f.step}: {f.evidence}. {f.remedy}" for f in findings]
    return "\n".join(f"- {' '.join(line.split())}" for line in lines)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; bars and line breaks inside cells are escaped."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
