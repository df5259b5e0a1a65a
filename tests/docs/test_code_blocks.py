"""Every Python block of the README and the documentation runs, page by page, from top to bottom."""

from __future__ import annotations

import gc
import re
import runpy
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])

# Nothing hidden runs: a reader who copies a page's blocks has what the test runs. What a page takes
# for granted stands in a fold. `<!-- not run: why -->` stands before a block that cannot run in a
# test, `<!-- needs: package -->` before one that runs where the package is installed.
BLOCK = re.compile(
    r"^(?:<!-- not run:(?P<reason>[^\n]*)-->\n+)?(?:<!-- needs: (?P<package>\w+) -->\n+)?"
    r"```python[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One block of code.

    Attributes:
        line: the line of the page on which it starts.
        code: its text.
        reason: why it is not run; None: it is run.
        package: what it imports beside the packages that the tests install.
    """

    line: int
    code: str
    reason: str | None
    package: str | None


def blocks(text: str) -> list[Block]:
    """Return the blocks of a page in their order."""
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(line, match["code"], match["reason"], match["package"]))
    return found


def with_packages() -> list[tuple[Path, str]]:
    """Return the pages with the packages that some of their blocks need."""
    return [
        (page, package)
        for page in PAGES
        for package in sorted({b.package for b in blocks(page.read_text("utf-8")) if b.package})
    ]


def run(page: str, found: list[Block], folder: Path, *packages: str) -> None:
    """Run the blocks of a page in one namespace; an error's traceback names the page's line."""
    lines: list[str] = []
    for block in found:
        if block.reason is None and block.package in {None, *packages}:
            lines += [""] * (block.line - 1 - len(lines))
            lines += block.code.splitlines()
    script = folder / page
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    runpy.run_path(str(script))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    run(f"{page.stem}.py", blocks(page.read_text("utf-8")), tmp_path / "code")


@pytest.mark.filterwarnings("ignore")  # what another package warns of is its own affair
@pytest.mark.parametrize(
    ("page", "package"),
    with_packages(),
    ids=lambda value: value if isinstance(value, str) else value.relative_to(ROOT).as_posix(),
)
def test_the_code_of_a_page_runs_with_what_it_needs(
    page: Path, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package, reason=f"{package} cannot be imported", exc_type=ImportError)
    monkeypatch.chdir(tmp_path)

    run(f"{page.stem}.py", blocks(page.read_text("utf-8")), tmp_path / "code", package)
    gc.collect()  # what it warns of when it is deleted, too


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_block_that_is_not_run_says_why(page: Path) -> None:
    reasons = [block.reason for block in blocks(page.read_text("utf-8"))]

    assert all(reason is None or len(reason.split()) > 2 for reason in reasons)


def test_the_documentation_has_code_to_run() -> None:
    shown = [block for page in PAGES for block in blocks(page.read_text("utf-8"))]

    assert sum(block.reason is None for block in shown) >= 10


def test_blocks_share_a_namespace_and_what_is_hidden_does_not_run(tmp_path: Path) -> None:
    page = "<!-- x = 0\n-->\n```python\ny = 2\n```\n```python\nassert y == 2\n```\n"

    run("page.py", blocks(page), tmp_path)

    assert [block.line for block in blocks(page)] == [4, 7]


def test_a_failing_block_names_the_line_of_its_page(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        run("page.py", blocks("# Title\n\n```python\nx = 1\n1 / 0\n```\n"), tmp_path)

    assert caught.traceback[-1].lineno + 1 == 5


def test_a_block_that_needs_a_package_runs_with_it_alone(tmp_path: Path) -> None:
    setup = "<!-- needs: rare -->\n```python\nx = 0\n```\n"
    page = f"{setup}\n<!-- needs: rare -->\n\n```python\n1 / x\n```\n"

    run("page.py", blocks(page), tmp_path)

    assert [block.package for block in blocks(page)] == ["rare", "rare"]
    with pytest.raises(ZeroDivisionError):
        run("page.py", blocks(page), tmp_path, "rare")


def test_only_a_marked_block_is_left_out(tmp_path: Path) -> None:
    marked = "<!-- not run: needs a second machine -->\n\n```python\n1 / 0\n```\n"

    run("page.py", blocks(marked), tmp_path)

    assert blocks(marked)[0].reason == " needs a second machine "
    with pytest.raises(ZeroDivisionError):
        run("page.py", blocks("not run: because\n\n```python\n1 / 0\n```\n"), tmp_path)
