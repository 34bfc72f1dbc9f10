"""What the pages point to exists: files, headings, modules, commands and settings."""

from __future__ import annotations

import ast
import re
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from kernel.cli import main
from kernel.settings.sources import leaves
from tests.docs.pages import GUIDE, ROOT, files_left_behind, read_blocks

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_PATH = re.compile(r"`((?:kernel|aggregates|projections|migrations|tests|docs|examples|benchmarks)/[\w./*-]+)`")
_TEST = re.compile(r"`(test_\w+)\*?`")
_COMMAND = re.compile(r"(?:`|^ {0,4})eskernel ([a-z][a-z-]*)", re.MULTILINE)
_SETTING = re.compile(r"`([a-z_]+\.[a-z_]+(?:\.[a-z_]+)?)`")
PROSE = {"lacks"}
"""Words behind the product's name at the beginning of a line."""
_PUNCTUATION = str.maketrans("", "", string.punctuation.replace("-", "").replace("_", ""))


PUBLIC = {
    "aggregates",
    "projections",
    "kernel",
    "kernel.errors",
    "kernel.settings",
    "kernel.log",
    "kernel.testing",
    "kernel.web",
    "examples.bank",
}
OTHERS = {"alembic", "fastapi", "httpx", "pytest", "sqlalchemy", "sqlalchemy.orm"}


def anchors(page: Path) -> set[str]:
    """Return the names by which a page's headings can be linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {heading.lower().translate(_PUNCTUATION).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    for target in _LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_path_leads_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []
    text = page.read_text()
    assert [path for path in _PATH.findall(text) if not list(ROOT.glob(path))] == []
    assert [name for name in _TEST.findall(text) if not list((ROOT / "tests").rglob(f"{name}*.py"))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_exists(page: Path) -> None:
    known = main.list_commands(click.Context(main))
    assert set(_COMMAND.findall(page.read_text())) - set(known) <= PROSE


def test_every_setting_that_a_page_names_exists() -> None:
    names = {name for name, _ in leaves()}
    sections = {name.rpartition(".")[0] for name in names}
    tops = {section.partition(".")[0] for section in sections if section}
    mentioned = {
        (str(page.relative_to(ROOT)), name)
        for page in PAGES
        for name in _SETTING.findall(page.read_text())
        if name.partition(".")[0] in tops
    }
    assert {(page, name) for page, name in mentioned if name not in names | sections} == set()


def test_every_page_can_be_reached_from_the_index() -> None:
    found, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in found or page.suffix != ".md":
            continue
        found.add(page)
        waiting += [(page.parent / target.partition("#")[0]).resolve() for target in _LINK.findall(page.read_text())]
    tracked = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {ROOT / name for name in tracked.split()} <= found


def imported(source: str) -> Iterator[str]:
    """Yield the modules that a source imports, at its top or anywhere."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(GUIDE.glob("*.md"))], ids=lambda page: page.name)
def test_snippets_import_only_what_is_public(page: Path) -> None:
    own = {Path(name).stem for name in files_left_behind(page)}
    blocks = [block for block in read_blocks(page) if block.language == "python"]
    used = {name for block in blocks for name in imported(block.text)}
    assert {name for name in used if name.partition(".")[0] not in sys.stdlib_module_names} <= PUBLIC | OTHERS | own
