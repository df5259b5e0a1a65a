"""The map of the library's imports: modules, folders, layers, cycles, and what may import what.

Imports inside functions and under `TYPE_CHECKING` count. `python -m tests.import_map` prints the
figures of the map.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from functools import cache
from pathlib import Path

from tests.house_rules import PACKAGES, ROOT, Source, imported_by, read

LAYERS = 16
FOLDER_MODULES = range(2, 16)
LAZY = "diptych._lazy"
"""All that a facade, the `__init__` of a package with public names, imports."""
SHARED = frozenset(
    {LAZY, *(f"diptych._{name}" for name in ("argument_names", "loss_arguments", "summaries"))}
)
"""The modules that every folder may import; they import nothing of the library."""

Graph = Mapping[str, Set[str]]

ALLOWED: dict[str, set[str]] = {
    "engine": {
        "engine.data",
        "engine.distributed",
        "engine.loop",
        "engine.metrics",
        "engine.optimizers",
        "engine.state",
        "engine.step",
        "engine.trials",
    },
    "engine.certificate": {
        "engine",
        "engine.data",
        "engine.distributed",
        "engine.loop",
        "engine.state",
        "engine.step",
    },
    "engine.data": {"engine", "engine.distributed"},
    "engine.distributed": {"engine"},
    "engine.loop": {"engine", "engine.data", "engine.distributed"},
    "engine.metrics": {"engine", "engine.distributed"},
    "engine.optimizers": {"engine.distributed"},
    "engine.state": {
        "engine",
        "engine.data",
        "engine.distributed",
        "engine.loop",
        "engine.metrics",
    },
    "engine.step": {
        "engine",
        "engine.data",
        "engine.distributed",
        "engine.loop",
        "engine.metrics",
    },
    "engine.trials": {"engine", "engine.data", "engine.distributed"},
    "face": {"engine"},
    "face.commands": {
        "engine",
        "engine.certificate",
        "engine.distributed",
        "face",
        "handlers",
        "handlers.loss_guard",
        "handlers.reports",
        "recipes",
        "recipes.data",
    },
    "handlers": {
        "engine",
        "engine.distributed",
        "engine.loop",
        "handlers.checkpointing",
        "handlers.health",
        "handlers.optimization",
        "handlers.performance",
        "handlers.reports",
        "handlers.sinks",
    },
    "handlers.checkpointing": {
        "engine",
        "engine.distributed",
        "engine.loop",
        "engine.optimizers",
        "engine.state",
        "engine.trials",
        "handlers",
        "handlers.evaluation",
    },
    "handlers.evaluation": {
        "engine",
        "engine.data",
        "engine.distributed",
        "engine.optimizers",
        "engine.step",
        "engine.trials",
        "handlers",
    },
    "handlers.health": {"engine", "engine.distributed", "engine.metrics", "handlers"},
    "handlers.loss_guard": {
        "engine",
        "engine.data",
        "engine.distributed",
        "engine.state",
        "handlers",
        "handlers.optimization",
    },
    "handlers.optimization": {
        "engine",
        "engine.data",
        "engine.distributed",
        "engine.loop",
        "engine.state",
        "engine.trials",
        "handlers",
        "handlers.checkpointing",
        "handlers.evaluation",
        "handlers.reports",
    },
    "handlers.output": {
        "engine",
        "engine.distributed",
        "engine.loop",
        "engine.metrics",
        "engine.state",
        "handlers",
    },
    "handlers.performance": {"engine", "engine.distributed", "handlers", "handlers.output"},
    "handlers.pictures": {
        "engine",
        "engine.distributed",
        "handlers",
        "handlers.evaluation",
        "handlers.output",
        "handlers.sinks",
    },
    "handlers.reports": {
        "engine",
        "engine.state",
        "handlers",
        "handlers.health",
        "handlers.output",
        "handlers.pictures",
        "handlers.sinks",
    },
    "handlers.sinks": {
        "engine",
        "engine.data",
        "engine.distributed",
        "engine.metrics",
        "engine.state",
        "handlers",
        "handlers.output",
    },
    "handlers.stages": {
        "engine",
        "engine.data",
        "engine.optimizers",
        "engine.state",
        "engine.trials",
        "handlers",
        "handlers.evaluation",
        "handlers.optimization",
    },
    "losses": {"losses.base"},
    "losses.base": {"losses.base.tiles"},
    "losses.base.tiles": {"losses.base"},
    "losses.combine": {"losses", "losses.base", "losses.contrastive"},
    "losses.contrastive": {"losses", "losses.base"},
    "losses.distillation": {"losses", "losses.base"},
    "losses.multimodal": {
        "losses",
        "losses.base",
        "losses.combine",
        "losses.contrastive",
        "losses.supervised",
    },
    "losses.self_supervised": {"losses", "losses.base"},
    "losses.supervised": {"losses", "losses.base"},
    "recipes": {
        "engine",
        "engine.data",
        "engine.distributed",
        "engine.step",
        "handlers",
        "handlers.checkpointing",
        "handlers.evaluation",
        "handlers.optimization",
        "handlers.sinks",
        "losses",
        "losses.base",
        "recipes.data",
        "recipes.towers",
    },
    "recipes.data": {
        "engine",
        "engine.data",
        "engine.distributed",
        "handlers",
        "recipes",
        "recipes.towers",
    },
    "recipes.towers": {
        "handlers",
    },
}
"""The folders from which the modules of a folder may import, beside their own: no more, no less.

A folder and one inside it may import from each other, as long as their modules form no cycle.
Between all other folders there is no cycle.
"""


def module_name(path: str) -> str:
    """Return the installed name of a file: `diptych.engine.trainer` for `engine/trainer.py`."""
    parts = Path(path).with_suffix("").parts
    if parts[0] == "face":
        parts = parts[1:]
    return ".".join(["diptych", *(part for part in parts if part != "__init__")])


def folder_of(path: str) -> str:
    """Return the folder of a file as the table names it: `engine.loop`."""
    return ".".join(Path(path).parent.parts)


@cache
def paths() -> dict[str, str]:
    """Return the file of each installed module and package, by name."""
    sources = [Path(source.path) for source in read(*PACKAGES)]
    return {module_name(p.as_posix()): p.as_posix() for p in sources if _is_installed(p)}


def _is_installed(path: Path) -> bool:
    return all((ROOT / folder / "__init__.py").is_file() for folder in list(path.parents)[:-1])


def is_facade(name: str) -> bool:
    """Return whether a name is that of a package instead of a module."""
    return Path(paths()[name]).name == "__init__.py"


def targets(node: ast.AST) -> Iterator[str]:
    """Yield the modules of the library that a statement imports; packages for names of theirs."""
    names = imported_by(node)
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
        found = next((n for n in (name, name.rpartition(".")[0]) if n in paths()), None)
        if found:
            yield found


def imports_of(source: Source) -> Iterator[tuple[int, str]]:
    """Yield (line, module of the library) for each import of a file."""
    for node in source.nodes:
        for target in targets(node):
            yield getattr(node, "lineno", 1), target


def facade_imports(source: Source) -> Iterator[str]:
    """Imports from a package instead of a module, and imports of an `__init__` itself."""
    is_init = Path(source.path).name == "__init__.py"
    for line, target in imports_of(source):
        if is_facade(target):
            yield source.at(line, f"import from a module of {target}, not from the package")
        elif is_init and target != LAZY:
            yield source.at(line, f"an __init__ imports {LAZY} alone, not {target}")


def forbidden_imports(source: Source) -> Iterator[str]:
    """Imports between folders that the table does not allow."""
    here = folder_of(source.path)
    allowed = ALLOWED.get(here, set()) | {here}
    for line, target in imports_of(source):
        there = folder_of(paths()[target])
        if there not in allowed and target not in SHARED:
            yield source.at(line, f"{here} must not import from {there}")


def import_graph() -> dict[str, set[str]]:
    """Return the modules that each module imports; packages are left out."""
    sources = {module_name(source.path): source for source in read(*PACKAGES)}
    modules = {name for name in paths() if not is_facade(name) and name not in SHARED}
    return {
        name: {target for _, target in imports_of(sources[name]) if target in modules} - {name}
        for name in modules
    }


def folder_graph() -> dict[str, set[str]]:
    """Return the folders from which the modules of each folder import, beside their own."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, imported in import_graph().items():
        here = folder_of(paths()[name])
        found[here] |= {folder_of(paths()[target]) for target in imported} - {here}
    return dict(found)


def unused_permissions() -> list[str]:
    """Return the entries of the table that no import uses."""
    used = folder_graph()
    return [
        f"{here} does not import from {there}"
        for here, allowed in ALLOWED.items()
        for there in sorted(allowed - used.get(here, set()))
    ]


def without_nesting(graph: Graph) -> dict[str, set[str]]:
    """Return a graph of folders without the arrows between a folder and one inside it."""
    return {
        here: {
            t for t in there if not f"{t}.".startswith(f"{here}.") | f"{here}.".startswith(f"{t}.")
        }
        for here, there in graph.items()
    }


def reachable(graph: Graph, start: str) -> set[str]:
    """Return everything that a node leads to; itself, if it is part of a cycle."""
    found, pending = set[str](), [*graph.get(start, ())]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += graph.get(node, ())
    return found


def cycles(graph: Graph) -> list[list[str]]:
    """Return the groups of nodes that lead to one another, each sorted."""
    reach = {node: reachable(graph, node) for node in graph}
    groups = {frozenset(n for n in reach[node] if node in reach.get(n, ())) for node in graph}
    return sorted(sorted(group) for group in groups if group)


def layers(graph: Graph) -> dict[str, int]:
    """Return the layer of each module, one above the highest layer that it imports, from 1.

    The modules of a cycle share a layer.
    """
    group = {node: frozenset([node]) for node in graph}
    group |= {node: frozenset(members) for members in cycles(graph) for node in members}

    @cache
    def layer(members: frozenset[str]) -> int:
        below = {group[target] for node in members for target in graph[node]} - {members}
        return 1 + max(map(layer, below), default=0)

    return {node: layer(group[node]) for node in graph}


def library_layers() -> dict[str, int]:
    """Return the layers of all modules but recipes and the command line, which are on top."""
    graph, on_top = import_graph(), ("face/", "recipes/")
    return layers({name: graph[name] for name in graph if not paths()[name].startswith(on_top)})


def folder_sizes() -> Counter[str]:
    """Return the number of modules of each folder."""
    return Counter(folder_of(path) for name, path in paths().items() if not is_facade(name))


def figures() -> Iterator[str]:
    """Yield the figures of the map, a line each."""
    graph, found, sizes = import_graph(), library_layers(), folder_sizes()
    facades = [stray for source in read(*PACKAGES) for stray in facade_imports(source)]
    top = max(found.values())
    yield f"modules: {len(graph)} in {len(sizes)} folders of up to {max(sizes.values())}"
    yield f"layers: {top}; highest: {_listed(name for name in found if found[name] == top)}"
    yield f"cycles: {'; '.join(map(_listed, cycles(graph))) or 'none'}"
    yield f"imports of facades: {len(facades)}"
    yield "folders import from:"
    yield from (f"    {here}: {_listed(there)}" for here, there in sorted(folder_graph().items()))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


if __name__ == "__main__":
    sys.stdout.write("".join(f"{line}\n" for line in figures()))
