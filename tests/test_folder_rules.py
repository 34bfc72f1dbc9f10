"""What each folder may know of the others, and how large a room may be."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = ("aggregates", "projections", "kernel", "migrations", "examples", "benchmarks")
MODULES = sorted(path for folder in PRODUCT for path in (ROOT / folder).rglob("*.py"))
OWN = {*PRODUCT, "tests"}
MAX_BYTES = 20_000
OUR_NAMES = {"aggregates", "projections", "kernel", "migrations", "examples", "benchmarks"}

MAY_IMPORT = {
    "aggregates": {"aggregates", "msgspec", "orjson"},
    "projections": {"projections", "aggregates", "sqlalchemy", "msgspec", "orjson"},
    "migrations": {"migrations", "projections", "alembic", "sqlalchemy"},
    "kernel/log": {"kernel", "aggregates", "nats", "nkeys", "msgspec", "orjson"},
    "kernel/settings": {"kernel", "annotated_types", "click", "pydantic", "pydantic_settings", "orjson"},
}
MUST_NOT_IMPORT = {
    "kernel": {"examples", "benchmarks", "tests"},
    "examples": {"benchmarks", "tests"},
    "benchmarks": {"tests"},
}


def imported(source: str) -> Iterator[str]:
    """Yield the modules that a source imports anywhere, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path.read_text())}


def test_there_is_something_to_look_at() -> None:
    found = {path.relative_to(ROOT).parts[0] for path in MODULES}
    assert {"aggregates", "projections", "kernel", "migrations", "examples"} <= found


def test_an_import_anywhere_is_seen() -> None:
    source = "import a.b\nif X:\n    from c.d import e\ndef f():\n    import g as h\n"
    assert list(imported(source)) == ["a.b", "c.d", "g"]


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_a_folder_imports_only_what_it_may(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | sys.stdlib_module_names
    wrong = {
        str(path.relative_to(ROOT)): strange
        for path in (ROOT / folder).rglob("*.py")
        if (strange := tops(path) - allowed)
    }
    assert wrong == {}


@pytest.mark.parametrize("folder", sorted(MUST_NOT_IMPORT))
def test_a_folder_does_not_import_what_is_built_on_it(folder: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): strange
        for path in (ROOT / folder).rglob("*.py")
        if (strange := tops(path) & MUST_NOT_IMPORT[folder])
    }
    assert wrong == {}


def test_the_log_knows_nothing_of_the_rest_of_the_kernel() -> None:
    for path in (ROOT / "kernel" / "log").glob("*.py"):
        known = {name for name in imported(path.read_text()) if name.startswith("kernel")}
        allowed = ("kernel.log", "kernel.settings", "kernel.log.subjects")
        assert all(name.startswith(allowed) for name in known), path.name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_read_in_one_sitting(path: Path) -> None:
    assert path.stat().st_size <= MAX_BYTES


def test_modules_are_small_on_average() -> None:
    sizes = [path.stat().st_size for path in MODULES if path.relative_to(ROOT).parts[0] != "benchmarks"]
    assert sum(sizes) / len(sizes) < 6_000


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is_for(path: Path) -> None:
    source = path.read_text()
    if source.strip():
        assert ast.get_docstring(ast.parse(source)), "begin with a docstring"


def test_nothing_names_a_place_on_somebodys_machine() -> None:
    homes = ["/" + "home/", "/" + "Users/", "/" + "root/", "/" + "work/", "C:" + "\\"]
    texts = [*MODULES, *(ROOT / "tests").rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    texts += [ROOT / "pyproject.toml", ROOT / "Makefile"]
    wrong = [f"{path.relative_to(ROOT)}: {home}" for path in texts for home in homes if home in path.read_text()]
    assert wrong == []
