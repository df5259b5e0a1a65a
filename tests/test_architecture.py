"""The house rules hold in every file, and every checker finds a planted stray."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests import house_rules as rules
from tests.house_rules import ROOMS, SCRIPTS, Source

Checker = Callable[[Source], Iterator[str]]
TEXT = (".py", ".md", ".toml", ".yml", ".yaml", ".cff", ".txt", ".cfg", ".json", ".css", ".ipynb")
PYTHON_FOLDERS = (*ROOMS, *SCRIPTS, "tests", "docs")


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


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_files_to_check(room: str) -> None:
    assert len(rules.read(room)) > 1


def test_losses_import_torch_alone() -> None:
    find_none(rules.wrong_arrows, rules.read("losses"))


def test_the_engine_imports_neither_handlers_nor_losses() -> None:
    find_none(rules.wrong_arrows, rules.read("engine"))


def test_handlers_import_the_engine_and_what_it_stands_on() -> None:
    find_none(rules.wrong_arrows, rules.read("handlers"))


def test_everybody_imports_the_rooms_by_their_installed_name() -> None:
    find_none(rules.uninstalled_names, rules.read(*PYTHON_FOLDERS))


def test_imports_are_absolute() -> None:
    find_none(rules.relative_imports, rules.read(*PYTHON_FOLDERS))


def test_files_are_short() -> None:
    find_none(rules.long_files, rules.read(*PYTHON_FOLDERS))


def test_functions_are_short() -> None:
    find_none(rules.long_functions, rules.read(*PYTHON_FOLDERS))


def test_functions_are_simple() -> None:
    find_none(rules.complex_functions, rules.read(*PYTHON_FOLDERS))


def test_file_names_say_what_is_in_the_file() -> None:
    find_none(rules.vague_names, rules.read(*PYTHON_FOLDERS))


def test_the_library_prints_nothing_and_leaves_logging_to_the_user() -> None:
    find_none(rules.prints, rules.read(*ROOMS))


def test_no_function_is_a_stub() -> None:
    find_none(rules.empty_bodies, rules.read(*ROOMS, *SCRIPTS))


def test_nothing_that_is_read_is_run() -> None:
    find_none(rules.unsafe_imports, rules.read(*ROOMS, *SCRIPTS))
    find_none(rules.unsafe_calls, rules.read(*ROOMS, *SCRIPTS))


def test_losses_never_wait_for_the_device() -> None:
    find_none(rules.synchronising_losses, rules.read("losses"))


def test_a_misspelt_argument_of_a_loss_is_an_error() -> None:
    find_none(rules.swallowed_arguments, rules.read("losses"))


def test_text_speaks_of_the_project_alone() -> None:
    find_none(rules.outside_talk, rules.read(*PYTHON_FOLDERS, suffixes=TEXT) + top_level_files())


PLANTED: list[tuple[Checker, str, str, str]] = [
    (rules.wrong_arrows, "losses/x.py", "import ignite", "losses must not import ignite"),
    (rules.wrong_arrows, "losses/x.py", "from diptych.engine import Trainer", "diptych.engine"),
    (rules.wrong_arrows, "losses/base/tiled.py", "import triton", "must not import triton"),
    (rules.wrong_arrows, "engine/x.py", "from diptych import losses", "diptych.losses"),
    (rules.wrong_arrows, "engine/x.py", "import diptych.handlers.sinks.jsonl", "diptych.handlers"),
    (rules.wrong_arrows, "engine/x.py", "import_module('diptych.losses')", "diptych.losses"),
    (rules.wrong_arrows, "engine/x.py", "def f():\n    import diptych.losses", "diptych.losses"),
    (rules.wrong_arrows, "handlers/x.py", "import diptych.losses", "diptych.losses"),
    (rules.wrong_arrows, "handlers/x.py", "import safetensors", "is an extra"),
    (rules.wrong_arrows, "handlers/x.py", "import numpy", "must not import numpy"),
    (
        rules.uninstalled_names,
        "examples/x.py",
        "from engine.trainer import Trainer",
        "diptych.engine",
    ),
    (rules.relative_imports, "engine/x.py", "from . import events", "relative import"),
    (rules.long_files, "engine/x.py", "x = 1\n" * 401, "401 lines"),
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
    (rules.wrong_arrows, "losses/x.py", "import math\nimport torch\nfrom diptych.losses import x"),
    (rules.wrong_arrows, "engine/x.py", "import attrs\nfrom ignite.engine import Engine"),
    (rules.wrong_arrows, "handlers/x.py", "from diptych.engine import x\nimport tensorboard"),
    (rules.wrong_arrows, "handlers/x.py", "def f():\n    import safetensors.torch"),
    (rules.uninstalled_names, "examples/x.py", "import diptych.engine\nimport data"),
    (rules.long_files, "engine/x.py", "x = 1\n" * 400),
    (rules.long_functions, "engine/x.py", "def f():\n    '''" + "\n" * 50 + "'''\n    return 1"),
    (rules.complex_functions, "engine/x.py", "def f(x):\n" + "    if x: x()\n" * 9),
    (rules.long_functions, "losses/x.py", "@triton.jit\ndef f():\n" + "    x = 1\n" * 50),
    (rules.complex_functions, "tests/test_x.py", "def f(x):\n" + "    assert x\n" * 20),
    (rules.wrong_arrows, "losses/base/triton_kernels.py", "import triton.language as tl"),
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
