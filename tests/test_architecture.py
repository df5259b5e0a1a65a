"""The house rules hold in every file and on the map of imports; a planted stray is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest

from tests import house_rules as rules
from tests import import_map
from tests.house_rules import PACKAGES, SCRIPTS, Source

Checker = Callable[[Source], Iterator[str]]
TEXT = (".py", ".md", ".toml", ".yml", ".yaml", ".cff", ".txt", ".cfg", ".json", ".css", ".ipynb")
PYTHON_FOLDERS = (*PACKAGES, *SCRIPTS, "tests", "docs")


def find_none(checker: Checker, sources: list[Source]) -> None:
    """Fail with everything that a checker finds in these files, a line each."""
    found = [stray for source in sources for stray in checker(source)]
    assert not found, "\n" + "\n".join(found)


def top_level_files() -> list[Source]:
    """Return the text files that stand in the repository's root and in its hidden folders."""
    paths = [
        p for p in rules.ROOT.glob("*") if p.suffix in TEXT or p.name in {"Makefile", "LICENSE"}
    ]
    paths += [p for d in (".ci", ".github") for p in (rules.ROOT / d).rglob("*") if p.is_file()]
    return [Source(p.relative_to(rules.ROOT).as_posix(), p.read_text("utf-8")) for p in paths]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_files_to_check(package: str) -> None:
    assert len(rules.read(package)) > 1


RULES: list[tuple[Checker, Sequence[str]]] = [
    (rules.foreign_imports, PACKAGES),
    (rules.uninstalled_names, PYTHON_FOLDERS),
    (import_map.facade_imports, PACKAGES),
    (import_map.forbidden_imports, PACKAGES),
    (rules.relative_imports, PYTHON_FOLDERS),
    (rules.long_files, PYTHON_FOLDERS),
    (rules.long_functions, PYTHON_FOLDERS),
    (rules.complex_functions, PYTHON_FOLDERS),
    (rules.vague_names, PYTHON_FOLDERS),
    (rules.prints, PACKAGES),
    (rules.empty_bodies, (*PACKAGES, *SCRIPTS)),
    (rules.unsafe_imports, (*PACKAGES, *SCRIPTS)),
    (rules.unsafe_calls, (*PACKAGES, *SCRIPTS)),
    (rules.synchronising_losses, ("losses",)),
    (rules.swallowed_arguments, ("losses",)),
]
"""Each rule with the folders in which it holds."""


@pytest.mark.parametrize(("checker", "folders"), RULES, ids=lambda x: getattr(x, "__name__", ""))
def test_every_file_keeps_the_rule(checker: Checker, folders: Sequence[str]) -> None:
    find_none(checker, rules.read(*folders))


def test_the_table_allows_no_import_that_nobody_makes() -> None:
    assert import_map.unused_permissions() == []


def test_the_table_has_no_cycle() -> None:
    assert import_map.cycles(import_map.without_nesting(import_map.ALLOWED)) == []


def test_modules_form_no_cycle() -> None:
    assert import_map.cycles(import_map.import_graph()) == []


def test_there_are_few_layers() -> None:
    layers = import_map.library_layers()
    too_high = {name: layer for name, layer in layers.items() if layer > import_map.LAYERS}

    assert too_high == {}


def test_no_folder_is_crowded_and_none_holds_a_single_module() -> None:
    sizes = import_map.folder_sizes()

    assert {f: n for f, n in sizes.items() if n not in import_map.FOLDER_MODULES} == {}


def test_text_speaks_of_the_project_alone() -> None:
    find_none(rules.outside_talk, rules.read(*PYTHON_FOLDERS, suffixes=TEXT) + top_level_files())


PLANTED: list[tuple[Checker, str, str, str]] = [
    (rules.foreign_imports, "losses/x.py", "import ignite", "losses must not import ignite"),
    (rules.foreign_imports, "losses/base/tiled.py", "import triton", "must not import triton"),
    (rules.foreign_imports, "handlers/x.py", "import safetensors", "is an extra"),
    (rules.foreign_imports, "handlers/x.py", "import numpy", "must not import numpy"),
    (
        rules.uninstalled_names,
        "examples/x.py",
        "from engine.trainer import Trainer",
        "import diptych.engine.trainer, not engine.trainer",
    ),
    (rules.uninstalled_names, "examples/x.py", "import face.version", "import diptych.version"),
    (
        import_map.facade_imports,
        "engine/x.py",
        "from diptych.engine import Trainer",
        "import from a module of diptych.engine",
    ),
    (import_map.facade_imports, "engine/x.py", "from diptych import losses", "diptych.losses"),
    (import_map.facade_imports, "face/x.py", "import diptych", "from a module of diptych"),
    (import_map.facade_imports, "engine/x.py", "import_module('diptych.losses')", "diptych.losses"),
    (
        import_map.facade_imports,
        "engine/__init__.py",
        "from diptych.engine.trainer import Trainer",
        "imports diptych._lazy alone",
    ),
    (
        import_map.forbidden_imports,
        "losses/x.py",
        "from diptych.engine.trainer import Trainer",
        "losses must not import from engine",
    ),
    (
        import_map.forbidden_imports,
        "engine/x.py",
        "import diptych.handlers.sinks.jsonl",
        "engine must not import from handlers.sinks",
    ),
    (
        import_map.forbidden_imports,
        "engine/data/x.py",
        "if TYPE_CHECKING:\n    from diptych.engine.loop.event_loop import EventLoop",
        "engine.data must not import from engine.loop",
    ),
    (
        import_map.forbidden_imports,
        "handlers/x.py",
        "def f():\n    import_module('diptych.losses.registry')",
        "handlers must not import from losses",
    ),
    (rules.relative_imports, "engine/x.py", "from . import events", "relative import"),
    (rules.long_files, "engine/x.py", "x = 1\n" * 601, "601 lines"),
    (rules.long_functions, "engine/x.py", "def f():\n" + "    x = 1\n" * 40, "f has 41 lines"),
    (
        rules.complex_functions,
        "engine/x.py",
        "def f(x):\n" + "    if x: x()\n" * 10,
        "complexity 11",
    ),
    (rules.complex_functions, "engine/x.py", "def f(x):\n    return " + "x or " * 10 + "x", "11"),
    (rules.vague_names, "engine/utils.py", "", "utils says nothing"),
    (rules.vague_names, "losses/common/x.py", "", "common says nothing"),
    (rules.prints, "engine/x.py", "print('loss')", "print in the library"),
    (rules.prints, "engine/x.py", "logging.basicConfig()", "basicConfig in the library"),
    (
        rules.empty_bodies,
        "engine/x.py",
        "def f():\n    '''Do it.'''\n    pass",
        "f has an empty body",
    ),
    (rules.empty_bodies, "engine/x.py", "class A:\n    def f(self): ...", "f has an empty body"),
    (rules.unsafe_imports, "engine/x.py", "import pickle", "pickle runs what it reads"),
    (rules.unsafe_calls, "engine/x.py", "eval('1')", "eval runs text"),
    (rules.unsafe_calls, "engine/x.py", "os.system('ls')", "os.system runs text"),
    (rules.unsafe_calls, "engine/x.py", "subprocess.run('ls', shell=True)", "runs text as code"),
    (rules.unsafe_calls, "engine/x.py", "torch.load(p)", "without weights_only=True"),
    (
        rules.unsafe_calls,
        "engine/x.py",
        "torch.load(p, weights_only=False)",
        "without weights_only",
    ),
    (rules.synchronising_losses, "losses/x.py", "loss.item()", "waits for the device"),
    (rules.swallowed_arguments, "losses/x.py", "def __init__(self, **kwargs): x()", "misspelt"),
    (rules.outside_talk, "docs/x.md", "see https://py" + "pi.org/project/x", "speaks of"),
    (rules.outside_talk, "docs/x.md", "as this ses" + "sion found", "speaks of"),
]


@pytest.mark.parametrize(("checker", "path", "text", "expected"), PLANTED)
def test_a_planted_stray_is_found(checker: Checker, path: str, text: str, expected: str) -> None:
    found = list(checker(Source(path, text)))

    assert len(found) == 1
    assert expected in found[0]
    assert found[0].startswith(f"{path}:")


KEPT: list[tuple[Checker, str, str]] = [
    (rules.foreign_imports, "losses/x.py", "import math\nimport torch\nimport diptych.losses"),
    (rules.foreign_imports, "engine/x.py", "import attrs\nfrom ignite.engine import Engine"),
    (rules.foreign_imports, "handlers/x.py", "def f():\n    import safetensors.torch"),
    (import_map.facade_imports, "engine/x.py", "from diptych.engine import tasks"),
    (import_map.facade_imports, "losses/__init__.py", "from diptych._lazy import lazy_names"),
    (
        import_map.forbidden_imports,
        "handlers/sinks/x.py",
        "from diptych.handlers.sinks.jsonl import JsonLines\nimport diptych.engine.trainer",
    ),
    (import_map.forbidden_imports, "losses/__init__.py", "from diptych._lazy import lazy_names"),
    (rules.uninstalled_names, "examples/x.py", "import diptych.engine\nimport data"),
    (rules.long_files, "engine/x.py", "x = 1\n" * 600),
    (rules.long_functions, "engine/x.py", "def f():\n    '''" + "\n" * 50 + "'''\n    return 1"),
    (rules.complex_functions, "engine/x.py", "def f(x):\n" + "    if x: x()\n" * 9),
    (rules.long_functions, "losses/x.py", "@triton.jit\ndef f():\n" + "    x = 1\n" * 50),
    (rules.complex_functions, "tests/test_x.py", "def f(x):\n" + "    assert x\n" * 20),
    (rules.foreign_imports, "losses/base/triton_kernels.py", "import triton.language as tl"),
    (rules.vague_names, "handlers/checkpoint_manager.py", ""),
    (rules.empty_bodies, "engine/x.py", "class A(Protocol):\n    def f(self): ..."),
    (rules.empty_bodies, "engine/x.py", "class A:\n    @abstractmethod\n    def f(self): ..."),
    (rules.unsafe_calls, "engine/x.py", "model.eval()\ntorch.load(p, weights_only=True)"),
    (rules.swallowed_arguments, "losses/registry.py", "def get_loss(name, **kwargs): return 1"),
    (rules.swallowed_arguments, "losses/x.py", "def forward(self, **kw): return f(**kw)"),
    (rules.outside_talk, "docs/x.md", "Install it with pip."),
]


@pytest.mark.parametrize(("checker", "path", "text"), KEPT)
def test_what_keeps_the_rules_is_left_alone(checker: Checker, path: str, text: str) -> None:
    assert list(checker(Source(path, text))) == []


CHAIN = {"a": {"b"}, "b": {"c"}, "c": set[str]()}


def test_a_planted_cycle_is_found_with_its_members() -> None:
    assert import_map.cycles(CHAIN) == []
    assert import_map.cycles(CHAIN | {"c": {"b"}}) == [["b", "c"]]


def test_layers_are_counted_along_the_longest_path() -> None:
    assert import_map.layers(CHAIN | {"d": {"c", "a"}}) == {"a": 3, "b": 2, "c": 1, "d": 4}


def test_the_modules_of_a_cycle_share_a_layer() -> None:
    looped = CHAIN | {"c": {"b", "d"}, "d": set()}

    assert import_map.layers(looped) == {"a": 3, "b": 2, "c": 2, "d": 1}


def test_an_arrow_between_a_folder_and_one_inside_it_makes_no_cycle() -> None:
    nested = {"engine": {"engine.loop"}, "engine.loop": {"engine"}}

    assert import_map.cycles(import_map.without_nesting(nested)) == []


def test_a_permission_that_nobody_uses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(import_map.ALLOWED, "losses", {"losses.base", "engine"})

    assert "losses does not import from engine" in import_map.unused_permissions()
