"""What is built installs elsewhere, imports there, and holds `diptych` and nothing else."""

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

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("engine", "handlers", "losses")
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


def test_the_wheel_holds_diptych_and_its_metadata_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()

    tops = {name.partition("/")[0] for name in names}
    assert tops == {"diptych", next(t for t in tops if t.endswith(".dist-info"))}
    assert {name.split("/")[1] for name in names if name.startswith("diptych/")} == set(ROOMS)
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize("room", ROOMS)
def test_the_wheel_holds_every_module_of_a_room_and_its_types(wheel: Path, room: str) -> None:
    source = {p.relative_to(ROOT).as_posix() for p in (ROOT / room).rglob("*.py")}

    with zipfile.ZipFile(wheel) as archive:
        packed = {n.removeprefix("diptych/") for n in archive.namelist()}

    assert {name for name in packed if name.startswith(f"{room}/")} == source | {f"{room}/py.typed"}


def test_the_wheel_imports_from_where_it_was_installed(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--disable-pip-version-check", "--target", target, wheel, cwd=tmp_path)
    # The finder of an editable install would answer first: take it out, torch stays importable.
    script = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        "sys.path[:] = [p for p in sys.path if '__editable__' not in p]\n"
        "import diptych.engine, diptych.handlers, diptych.losses\n"
        "for room in (diptych.engine, diptych.handlers, diptych.losses):\n"
        "    print(room.__file__)\n"
    )

    printed = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(target))

    expected = [target / "diptych" / room / "__init__.py" for room in ROOMS]
    assert [Path(line) for line in printed.split()] == expected


def test_no_room_is_a_package_of_its_own_name_in_site_packages() -> None:
    site_packages = Path(sysconfig.get_path("purelib"))

    assert [room for room in ROOMS if (site_packages / room).exists()] == []


def test_the_sdist_holds_what_a_build_and_its_reader_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    needed = {"pyproject.toml", "README.md", "LICENSE", "engine/trainer.py", "losses/py.typed"}
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
    text = (ROOT / "constraints.txt").read_text("utf-8")
    pinned = {canonicalize_name(name) for name in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)}

    assert installed_by("diptych", frozenset({"dev"})) - {"diptych"} - pinned == set()


def test_constraints_name_no_build_of_torch() -> None:
    assert "+" not in (ROOT / "constraints.txt").read_text("utf-8")
