"""Markdown tables of a run: the parameters of its model, and the findings of its handlers."""

from __future__ import annotations

from collections.abc import Sequence

from diptych.engine.handler import Finding
from diptych.engine.modules import named_parameters
from diptych.engine.trainer import Trainer
from diptych.handlers.components import find_components


def model_table(trainer: Trainer) -> str:
    """Return the number of parameters of each component and of the loss: all, and trainable."""
    named = {
        id(parameter): parameter
        for parameter in named_parameters(trainer.model, trainer.loss).values()
    }
    components = find_components(trainer, None) if named else {}
    counts = [
        (
            component,
            sum(named[member].numel() for member in members),
            sum(named[member].numel() for member in members if named[member].requires_grad),
        )
        for component, members in components.items()
    ]
    counts.append(("all", sum(c[1] for c in counts), sum(c[2] for c in counts)))
    rows = [(name, f"{size:,}", f"{trainable:,}") for name, size, trainable in counts]
    return markdown_table(("component", "parameters", "trainable"), rows)


def findings_table(findings: Sequence[Finding]) -> str:
    """Return findings, one per row, with their iterations."""
    rows = [(str(f.step), f.rule, f.evidence, f.remedy) for f in findings]
    return markdown_table(("step", "finding", "evidence", "remedy"), rows)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; bars and line breaks inside cells are escaped."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
