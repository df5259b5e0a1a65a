"""The house rules as checkers: each takes one source file and yields what breaks the rule."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("face", "engine", "handlers", "losses", "recipes")
SCRIPTS = ("examples", "benchmarks")

# Beside the standard library and one another (tests/import_map.py): what a package may import
# anywhere, and, of the extras that not everybody installs, inside a function only.
MAY_IMPORT = {
    # tyro parses the arguments of the commands of the extra `recipes`.
    "face": {"torch", "attrs", "tyro"},
    "losses": {"torch"},
    # NumPy for its random state, which is part of a run's.
    "engine": {"torch", "ignite", "attrs", "numpy"},
    "handlers": {"torch", "ignite", "attrs", "tensorboard"},
    # Those of the extra `recipes`, apart from Pillow, are imported in functions.
    "recipes": {"torch", "ignite", "attrs", "numpy"},
}
MAY_IMPORT_LATE = {
    "handlers": {"PIL", "matplotlib", "mlflow", "safetensors"},
    "recipes": {"PIL", "yaml", "safetensors", "peft", "transformers", "webdataset"},
}

FILE_LINES = 600
FUNCTION_LINES = 40
COMPLEXITY = 10
VAGUE = {
    "util",
    "utils",
    "helper",
    "helpers",
    "common",
    "misc",
    "core",
    "manager",
    "stuff",
    "tools",
}

# Written with brackets, so that this file does not mention what it looks for.
HOSTS = re.compile(
    r"py[p]i\.org|python[h]osted|npm[j]s|yarn[p]kg|download\.py[t]orch|deb[.]debian|con[d]a\.(io|org)",
    re.IGNORECASE,
)
TALK = re.compile(
    r"\b(this|next|previous|last) sessi[o]n\b|\bsub-?ag[e]nts?\b|/wor[k]/|/\.librar[y]/"
    r"|\bcha[t]bot\b|\bas an A[I]\b|\bthe brie[f]\b|\bclau[d]e\b",
    re.IGNORECASE,
)

Function = ast.FunctionDef | ast.AsyncFunctionDef
BRANCHES = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.IfExp,
    ast.ExceptHandler,
    ast.comprehension,
    ast.match_case,
)
TYPING = "TYPE_CHECKING"
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "__import__", "os.system", "os.popen"}


@dataclass(frozen=True)
class Source:
    """One text file of the repository.

    Attributes:
        path: its path below the repository's root, with forward slashes.
        text: what stands in it.
    """

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree of a Python file."""
        return ast.parse(self.text, filename=self.path)

    @property
    def package(self) -> str:
        """The first folder of the path."""
        return self.path.partition("/")[0]

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """Every node of the syntax tree."""
        return list(ast.walk(self.tree))

    @property
    def functions(self) -> Iterator[Function]:
        """Every function, methods and nested functions included."""
        return (n for n in self.nodes if isinstance(n, Function))

    @property
    def calls(self) -> Iterator[ast.Call]:
        """Every call."""
        return (n for n in self.nodes if isinstance(n, ast.Call))

    def at(self, line: int, message: str) -> str:
        """Return the message with the place that it speaks of."""
        return f"{self.path}:{line}: {message}"


def read(*folders: str, suffixes: Iterable[str] = (".py",)) -> list[Source]:
    """Return the files below these folders of the repository, in order of their paths."""
    found = [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in suffixes and "__pycache__" not in path.parts
    ]
    return [_source(path) for path in found]


@cache
def _source(path: Path) -> Source:
    return Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


def imported_by(node: ast.AST) -> list[str]:
    """Return the modules that a statement imports, or a call of `import_module` that spells one."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module="diptych", names=names):
            return [f"diptych.{alias.name}" for alias in names]
        case ast.ImportFrom(module=str(module), level=0):
            return [module]
        case ast.Call(args=[ast.Constant(value=str(name)), *_]) if called(node) == "import_module":
            return [name]
    return []


def imports(source: Source) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, module, whether it is late) for each absolute import.

    Late are those in functions, and those for type checkers alone.
    """
    found = [(node, module) for node in source.nodes for module in imported_by(node)]
    typing = [n for n in source.nodes if isinstance(n, ast.If) and last_name(n.test) == TYPING]
    parts = [*source.functions, *typing] if found else []
    late = {node for part in parts for node in ast.walk(part)}
    for node, module in found:
        yield getattr(node, "lineno", 1), module, node in late


def last_name(node: ast.expr) -> str:
    """Return the last part of a dotted name: `load` for `torch.load`."""
    return str(getattr(node, "id", getattr(node, "attr", "")))


def called(call: ast.Call) -> str:
    """Return the last part of the name that is called: `load` for `torch.load(path)`."""
    return last_name(call.func)


def complexity(function: Function, *, is_test: bool = False) -> int:
    """Return the cyclomatic complexity of a function, what is nested in it included.

    An assert is a branch, but in a test: there it is what the test is for.
    """
    branches = BRANCHES if is_test else (*BRANCHES, ast.Assert)
    nodes = list(ast.walk(function))
    operators = sum(len(n.values) - 1 for n in nodes if isinstance(n, ast.BoolOp))
    return 1 + sum(isinstance(n, branches) for n in nodes) + operators


def body_lines(function: Function) -> int:
    """Return the number of lines of a function without its docstring."""
    docstring = ast.get_docstring(function, clean=False)
    last = function.end_lineno or function.lineno
    return last - function.lineno + 1 - (len(docstring.splitlines()) if docstring else 0)


def foreign_imports(source: Source) -> Iterator[str]:
    """Imports of packages other than this library that a package must do without."""
    always = MAY_IMPORT[source.package] | {"diptych"} | sys.stdlib_module_names
    late = MAY_IMPORT_LATE.get(source.package, set())
    if Path(source.path).name.startswith("triton_"):  # torch brings Triton where there are GPUs
        always = always | {"triton"}
    for line, module, inside_function in imports(source):
        name = module.split(".")[0]
        if name in late and not inside_function:
            yield source.at(line, f"{module} is an extra: import it in the function that needs it")
        elif name not in always | late:
            yield source.at(line, f"{source.package} must not import {module}")


def uninstalled_names(source: Source) -> Iterator[str]:
    """Imports of a package by its folder's name, which exists in a checkout only."""
    for line, module, _ in imports(source):
        folder, _, rest = module.partition(".")
        if folder in PACKAGES:
            installed = "diptych" if folder == "face" else f"diptych.{folder}"
            yield source.at(line, f"import {installed}{'.' * bool(rest)}{rest}, not {module}")


def relative_imports(source: Source) -> Iterator[str]:
    """Imports that start with a dot."""
    for node in source.nodes:
        if isinstance(node, ast.ImportFrom) and node.level:
            yield source.at(node.lineno, "relative import")


def long_files(source: Source) -> Iterator[str]:
    """Files over the limit of lines."""
    lines = len(source.text.splitlines())
    if lines > FILE_LINES:
        yield source.at(1, f"{lines} lines, at most {FILE_LINES}")


def long_functions(source: Source) -> Iterator[str]:
    """Functions over the limit of lines, their docstrings left out.

    A GPU kernel (`@triton.jit`) may be longer: to cut one up is to pass a dozen registers around.
    """
    for function in source.functions:
        if any(last_name(decorator) == "jit" for decorator in function.decorator_list):
            continue
        if (lines := body_lines(function)) > FUNCTION_LINES:
            yield source.at(function.lineno, f"{function.name} has {lines} lines")


def complex_functions(source: Source) -> Iterator[str]:
    """Functions over the limit of cyclomatic complexity."""
    for function in source.functions:
        branches = complexity(function, is_test=source.package == "tests")
        if branches > COMPLEXITY:
            yield source.at(function.lineno, f"{function.name} has complexity {branches}")


def vague_names(source: Source) -> Iterator[str]:
    """Files and folders whose names say nothing about what is in them."""
    for part in Path(source.path).with_suffix("").parts:
        if part in VAGUE:
            yield source.at(1, f"{part} says nothing about what is in it")


def prints(source: Source) -> Iterator[str]:
    """Calls of print, and logging set up over the user's head."""
    for call in source.calls:
        if called(call) in {"print", "basicConfig"}:
            yield source.at(call.lineno, f"{called(call)} in the library")


def empty_bodies(source: Source) -> Iterator[str]:
    """Functions that do nothing and are neither abstract nor part of a protocol."""
    declared = protocol_methods(source.tree)
    for function in source.functions:
        marks = {last_name(decorator) for decorator in function.decorator_list}
        if function in declared or marks & {"abstractmethod", "overload"}:
            continue
        if all(is_nothing(statement) for statement in function.body):
            yield source.at(function.lineno, f"{function.name} has an empty body")


def protocol_methods(tree: ast.Module) -> set[ast.stmt]:
    """Return what stands in the bodies of the classes that are protocols."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    protocols = [c for c in classes if any(last_name(base) == "Protocol" for base in c.bases)]
    return {statement for protocol in protocols for statement in protocol.body}


def is_nothing(statement: ast.stmt) -> bool:
    """Say whether a statement is `pass`, `...` or a docstring."""
    constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return constant or isinstance(statement, ast.Pass)


def unsafe_imports(source: Source) -> Iterator[str]:
    """Modules that run what they read."""
    for line, module, _ in imports(source):
        if module.split(".")[0] in UNSAFE_MODULES:
            yield source.at(line, f"{module} runs what it reads")


def unsafe_calls(source: Source) -> Iterator[str]:
    """Text run as code, text handed to a shell, checkpoints loaded as code."""
    for call in source.calls:
        keywords = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
        name = ast.unparse(call.func)
        if name in UNSAFE_CALLS or keywords.get("shell") is True:
            yield source.at(call.lineno, f"{name} runs text as code")
        if name == "torch.load" and keywords.get("weights_only") is not True:
            yield source.at(call.lineno, "torch.load without weights_only=True")


def synchronising_losses(source: Source) -> Iterator[str]:
    """Calls in a loss that wait for the device."""
    for call in source.calls:
        if called(call) == "item" and not call.args:
            yield source.at(call.lineno, ".item() waits for the device")


def swallowed_arguments(source: Source) -> Iterator[str]:
    """Constructors and calls whose `**kwargs` would take a misspelt argument and drop it."""
    for function in source.functions:
        rest = function.args.kwarg
        if rest is None or function.name not in {"__init__", "forward", "terms"}:
            continue
        calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
        passed_on = {ast.unparse(k.value) for call in calls for k in call.keywords if not k.arg}
        if rest.arg not in passed_on and not isinstance(function.body[-1], ast.Raise):
            yield source.at(function.lineno, f"{function.name} swallows misspelt arguments")


def outside_talk(source: Source) -> Iterator[str]:
    """Text that speaks of a package registry's host or of anything but the project."""
    for number, line in enumerate(source.text.splitlines(), start=1):
        for match in (HOSTS.search(line), TALK.search(line)):
            if match:
                yield source.at(number, f"speaks of {match.group()!r}")
