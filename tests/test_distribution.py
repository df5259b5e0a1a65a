"""The distributions hold `diptych` and nothing else; every way of installing it works."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import diptych

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("engine", "handlers", "losses", "recipes")
PACKAGES = {"diptych": "face"} | {f"diptych.{name}": name for name in FOLDERS}
"""The installed name and the folder of each package."""
BUILT = ("build", "dist", "site", "runs", "*.egg-info", "__pycache__")

# One worker builds, once, and runs every test of this file.
pytestmark = pytest.mark.xdist_group("distribution")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command and return what it printed; a failure shows all of it."""
    # PYTHONPATH and coverage settings of the outer run must not help the inner one.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sdist of a clean copy and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("distribution")
    shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(".*", *BUILT))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=folder / "copy")
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(built: Path) -> Path:
    return next(built.glob("*.tar.gz"))


def packaged(folder: str) -> set[str]:
    """Return the files below a folder that an installation needs, as paths in the wheel."""
    suffixes = {".py", ".pyi", ".typed"}
    files = {p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes}
    parts = (p.relative_to(ROOT / folder).as_posix() for p in files)
    place = "diptych" if folder == "face" else f"diptych/{folder}"
    return {f"{place}/{part}" for part in parts if not part.startswith("uninstalled/")}


def test_the_wheel_holds_the_modules_and_types_of_every_package_and_nothing_else(
    wheel: Path,
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())

    metadata_folder = next(n.split("/")[0] for n in names if n.partition("/")[0] != "diptych")
    of_metadata = {name for name in names if name.startswith(f"{metadata_folder}/")}
    assert names - of_metadata == set[str]().union(*map(packaged, PACKAGES.values()))
    assert f"{metadata_folder}/licenses/LICENSE" in names


def test_the_list_of_packages_names_every_folder_of_modules() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    listed = re.search(r"^packages = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    modules = [path for folder in PACKAGES.values() for path in packaged(folder)]
    folders = {path.rpartition("/")[0].replace("/", ".") for path in modules}

    assert listed
    assert re.findall(r'"(.+)"', listed[1]) == sorted(folders)


def test_the_editable_install_has_a_link_for_every_module() -> None:
    package = Path(diptych.__file__).parent
    if "__editable__" not in str(package):
        pytest.skip("the package that is installed is no strict editable one")
    linked = {p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts}

    expected = set[str]().union(*map(packaged, PACKAGES.values()))
    found = {p.relative_to(package.parent).as_posix() for p in linked}
    assert found == expected, "a module was added or removed: make install"


def test_no_package_has_the_name_of_its_folder_in_site_packages() -> None:
    site_packages = Path(sysconfig.get_path("purelib"))

    assert [name for name in PACKAGES.values() if (site_packages / name).exists()] == []


def environment(folder: Path) -> Path:
    """Make an environment with all that this one has but Diptych, and return its interpreter."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    [site_packages] = folder.glob("lib/python*/site-packages")
    # A path that comes from a .pth file has its own .pth files ignored: no editable Diptych.
    (site_packages / "outer.pth").write_text(sysconfig.get_path("purelib"), "utf-8")
    return folder / "bin" / "python"


def install(python: Path, *what: str | Path) -> None:
    """Install into an environment, without the network."""
    options = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", *options)
    run(*pip, "--ignore-installed", "--no-build-isolation", *what, cwd=python.parent)


@pytest.fixture(scope="module")
def with_wheel(wheel: Path) -> Path:
    """Return the interpreter of an environment that holds the wheel."""
    python = environment(wheel.parent / "with_wheel")
    install(python, wheel)
    return python


@pytest.fixture(scope="module")
def with_links(built: Path) -> Path:
    """Return the interpreter of an environment with a strict editable install of the copy."""
    python = environment(built / "with_links")
    install(python, "--config-settings", "editable_mode=strict", "--editable", built / "copy")
    return python


WAYS = ("wheel", "wheel in the checkout", "editable")


@pytest.fixture
def installed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Return the interpreter and the working directory of a way to install."""
    python = request.getfixturevalue("with_links" if request.param == "editable" else "with_wheel")
    return python, ROOT if request.param == "wheel in the checkout" else tmp_path


@pytest.mark.parametrize("installed", WAYS, indirect=True)
def test_an_installation_imports_from_where_it_is(installed: tuple[Path, Path]) -> None:
    python, here = installed
    script = (
        "from diptych import Trainer, CLIPLoss, default_handlers\n"
        "import diptych.engine, diptych.handlers, diptych.losses, diptych.recipes as last\n"
        "for package in (diptych, diptych.engine, diptych.handlers, diptych.losses, last):\n"
        "    print(package.__file__)\n"
    )

    printed = [Path(line) for line in run(python, "-c", script, cwd=here).splitlines()]

    root = printed[0].parent
    assert root.name == "diptych"
    assert root.is_relative_to(python.parents[1]) or "__editable__" in root.parent.name
    assert printed[1:] == [root / name / "__init__.py" for name in list(PACKAGES.values())[1:]]


@pytest.mark.parametrize("installed", WAYS, indirect=True)
def test_an_installation_has_the_command(installed: tuple[Path, Path]) -> None:
    python, here = installed

    by_script = run(python.with_name("diptych"), "info", cwd=here)

    assert by_script.startswith("diptych ")
    assert run(python, "-m", "diptych", "info", cwd=here) == by_script


def test_a_clone_without_an_installation_has_the_command(built: Path) -> None:
    python = environment(built / "bare")

    printed = run(python, "-m", "face", "info", cwd=built / "copy")

    assert f" in {built / 'copy' / 'face'}\n" in printed


def test_a_clone_without_an_installation_certifies_on_two_ranks(built: Path) -> None:
    python, copy = environment(built / "bare_ranks"), built / "copy"
    factory = "tests.engine.certificate.trainings:build"

    printed = run(python, "-m", "face", "certify", factory, cwd=copy, OMP_NUM_THREADS="1")

    lines = printed.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "run as",
        "the whole batch",
        "micro-batches of 3",
        "tiles of 3",
        "two ranks, 4 + 4",
        "two ranks, 5 + 4",
        "with 0 handlers",
    ]
    assert all("equal" in line for line in lines[1:])


OF_A_USER = """\
import diptych
import torch
from diptych import CLIPLoss, default_handlers
from diptych.engine import tasks
from diptych.handlers import LearningRate

model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
trainer = diptych.Trainer(model, CLIPLoss(), optimizer, task=tasks.image_text)
trainer.attach(LearningRate(warmup=2), *default_handlers("runs/a"))
other: diptych.engine.Trainer = trainer.no_such_method()
diptych.losses.CLIPLoss(temprature=1)
diptych.handlers.NoSuchHandler()
"""


@pytest.mark.parametrize("installed", ["wheel", "editable"], indirect=True)
def test_a_type_checker_finds_everything(
    installed: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("mypy")
    python, here = installed
    (here / "of_a_user.py").write_text(OF_A_USER, "utf-8")
    cache = tmp_path_factory.getbasetemp() / "mypy_cache"
    mypy = (sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", cache)

    done = subprocess.run(
        [*mypy, "--python-executable", python, "of_a_user.py"],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )

    errors = re.findall(r"of_a_user.py:(\d+): error: (.*)  \[([\w-]+)\]", done.stdout)
    assert [(int(line), code) for line, _, code in errors] == [
        (11, "attr-defined"),
        (12, "call-arg"),
        (13, "attr-defined"),
    ], done.stdout


def test_the_sdist_holds_what_a_build_and_its_reader_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    needed = {"pyproject.toml", "README.md", "LICENSE", "face/__main__.py", "losses/py.typed"}
    assert needed <= names
    assert not [n for n in names if n.startswith((".venv", ".git/", "runs", "site", "tests"))]


def requirements(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """Yield what a distribution requires here, with these extras asked for."""
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        contexts = [{"extra": extra} for extra in extras] or [{"extra": ""}]
        if requirement.marker is None or any(map(requirement.marker.evaluate, contexts)):
            yield requirement


def installed_by(name: str, extras: frozenset[str]) -> set[str]:
    """Return the names of all distributions that an installation brings along."""
    pending, seen = [(name, extras)], set[tuple[str, frozenset[str]]]()
    while pending:
        item = pending.pop()
        if item not in seen:
            seen.add(item)
            found = requirements(*item)
            pending += [(canonicalize_name(r.name), frozenset(r.extras)) for r in found]
    return {name for name, _ in seen}


def test_constraints_pin_everything_that_development_installs() -> None:
    pytest.importorskip("twine", reason="the development tools are not installed")
    text = (ROOT / "constraints.txt").read_text("utf-8")
    pinned = {canonicalize_name(name) for name in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)}

    assert installed_by("diptych", frozenset({"dev"})) - {"diptych"} - pinned == set()


def test_constraints_name_no_build_of_torch() -> None:
    assert "+" not in (ROOT / "constraints.txt").read_text("utf-8")
