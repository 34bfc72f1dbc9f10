"""What users may import: the list in tests/public_names.txt. Each name in it is a promise for the next versions."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "public_names.txt"
PUBLIC = (
    "aggregates",
    "kernel",
    "kernel.errors",
    "kernel.log",
    "kernel.settings",
    "kernel.testing",
    "kernel.web",
    "projections",
)
PACKAGES = ("aggregates", "kernel", "migrations", "projections")
ACCEPT = "python -m tests.kernel.test_public_names > tests/public_names.txt"


def public_names() -> list[str]:
    """Return what the public modules export, as `module.name`."""
    return sorted(f"{module}.{name}" for module in PUBLIC for name in importlib.import_module(module).__all__)


def imported_names(source: str) -> Iterator[str]:
    """Yield what a source imports of our packages, as `module.name`, or the module where it is imported whole."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in found if name.split(".", 1)[0] in PACKAGES)


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def users_sources() -> dict[str, str]:
    """Return the code that a user reads: the examples, and the blocks of Python in README and docs."""
    sources = {path: path.read_text() for path in (ROOT / "examples").rglob("*.py")}
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        sources[page] = "\n".join(python_blocks(page.read_text()))
    return {str(path.relative_to(ROOT)): source for path, source in sources.items()}


def private_imports() -> set[tuple[str, str]]:
    allowed = {*public_names(), *PUBLIC}
    return {
        (where, name)
        for where, source in users_sources().items()
        for name in imported_names(source)
        if name not in allowed
    }


def test_the_public_names_are_those_of_the_list() -> None:
    listed = GOLDEN.read_text().split()
    added, gone = sorted({*public_names()} - {*listed}), sorted({*listed} - {*public_names()})
    assert public_names() == listed, (
        f"new: {', '.join(added) or 'none'}; gone: {', '.join(gone) or 'none'}. A new name is a promise, and one "
        f"that is gone breaks users' programs. If that is what you want, accept it: {ACCEPT}"
    )


@pytest.fixture(params=PUBLIC)
def module(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(request.param)


def test_a_public_module_lists_its_names_once_and_in_order(module: ModuleType) -> None:
    assert list(module.__all__) == sorted(set(module.__all__))


def test_every_public_name_is_there_and_says_what_it_is(module: ModuleType) -> None:
    silent = []
    for name in module.__all__:
        thing = getattr(module, name)
        text = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
        # dataclasses and named tuples without a text are given their signature
        if not text or text.startswith(f"{name}("):
            silent.append(f"{module.__name__}.{name}")
    assert silent == [], "give it a docstring"


def test_the_names_that_are_loaded_when_used_are_those_that_type_checkers_see() -> None:
    tree = ast.parse((ROOT / "kernel" / "__init__.py").read_text())
    checked = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kernel.")
        for alias in node.names
    }
    assert checked == set(importlib.import_module("kernel").__all__)


def test_there_is_code_of_users_to_look_at() -> None:
    sources = users_sources()
    assert [*imported_names(sources["README.md"])], "README has blocks of Python that import eskernel"
    assert "examples/bank/__init__.py" in sources


def test_examples_and_docs_import_only_what_is_public() -> None:
    assert private_imports() == set(), f"these modules are private; users may import {', '.join(PUBLIC)}"


if __name__ == "__main__":
    print("\n".join(public_names()))
