"""What a run has to say in words, as Markdown tables: its model, and what went wrong."""

from __future__ import annotations

from collections.abc import Sequence

from diptych.engine.trainer import Trainer
from diptych.handlers.components import find_components, parameter_names
from diptych.handlers.health.rules import Finding


def model_table(trainer: Trainer) -> str:
    """Return the parameters of each component, of the loss too, and how many of them train."""
    named = {id(parameter): parameter for parameter in parameter_names(trainer).values()}
    rows, all_sizes, all_trained = [], 0, 0
    for component, members in (find_components(trainer, None) if named else {}).items():
        sizes = sum(named[i].numel() for i in members)
        trained = sum(named[i].numel() for i in members if named[i].requires_grad)
        rows.append((component, f"{sizes:,}", f"{trained:,}"))
        all_sizes, all_trained = all_sizes + sizes, all_trained + trained
    rows.append(("all", f"{all_sizes:,}", f"{all_trained:,}"))
    return markdown_table(("component", "parameters", "trainable"), rows)


def findings_of(trainer: Trainer) -> list[Finding]:
    """Return what the rules of the attached handlers have found so far, in order."""
    found = [finding for h in trainer.handlers for finding in getattr(h, "findings", ())]
    return sorted(found, key=lambda finding: finding.step)


def findings_table(findings: Sequence[Finding]) -> str:
    """Return findings, a row each, with the step at which each was made."""
    rows = [(str(f.step), f.rule, f.evidence, f.remedy) for f in findings]
    return markdown_table(("step", "finding", "evidence", "what to do"), rows)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; bars and line breaks in its cells are made harmless."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
