"""The types that users see, checked by mypy and pyright as a user's checkers see them: from an installed package.

The checkers are run on copies of right.py and wrong.py beside an environment that holds what the wheel holds. They must
not find the working copy: a checker reads sources that lie before it, and reports nothing missing, where an installed
package without `py.typed` is untyped to it (PEP 561).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[2]
PROGRAMS = ("right.py", "wrong.py")
MARK = re.compile(r"# E: (?P<mypy>[\w, -]+) \| (?P<pyright>[\w, ]+)$")
CHECKERS = ("mypy", "pyright")
pytestmark = pytest.mark.timeout(300)  # the first run reads SQLAlchemy and pydantic, mypy's later ones its cache


class Finding(NamedTuple):
    """An error that a checker reports."""

    program: str
    line: int
    code: str
    message: str


def install(environment: Path) -> Path:
    """Make an environment with what the wheel holds, beside the packages that eskernel needs. Return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    site = environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    data = setuptools.get("package-data", {})
    for package in find_packages(str(ROOT), include=setuptools["packages"]["find"]["include"]):
        folder = package.replace(".", "/")
        # setuptools takes py.typed along unasked
        for pattern in ("*.py", "py.typed", *data.get("*", ()), *data.get(package, ())):
            for path in (ROOT / folder).glob(pattern):
                (site / folder).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, site / folder)
    (site / "dependencies.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return python


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *arguments, *PROGRAMS]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def of_mypy(output: str) -> list[Finding]:
    found = [json.loads(line) for line in output.splitlines()]
    return [
        Finding(one["file"], one["line"], one["code"], one["message"]) for one in found if one["severity"] == "error"
    ]


def of_pyright(output: str) -> list[Finding]:
    return [
        Finding(Path(one["file"]).name, one["range"]["start"]["line"] + 1, one.get("rule", "syntax"), one["message"])
        for one in json.loads(output)["generalDiagnostics"]
        if one["severity"] == "error"
    ]


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Finding]]:
    """Run both checkers, at the same time: most of it is reading SQLAlchemy."""
    folder = tmp_path_factory.mktemp("user")
    python = str(install(tmp_path_factory.mktemp("environment")))
    for program in PROGRAMS:
        shutil.copy(Path(__file__).parent / program, folder)
    (folder / "pyrightconfig.json").write_text("{}")
    cache = ROOT / ".mypy_cache" / "of-users"
    mypy = ["mypy", "--strict", "--config-file=", "--python-executable", python, "--output", "json"]
    running = {
        "mypy": start([*mypy, "--cache-dir", str(cache)], folder),
        "pyright": start(["pyright", "--outputjson", "--pythonpath", python], folder),
    }
    outputs = {checker: process.communicate() for checker, process in running.items()}
    for checker, process in running.items():
        assert process.returncode == 1, f"{checker}: {outputs[checker]}"  # wrong.py has errors; 2 is a broken run
    return {"mypy": of_mypy(outputs["mypy"][0]), "pyright": of_pyright(outputs["pyright"][0])}


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_users_program_is_accepted_with_the_types_that_it_states(
    findings: dict[str, list[Finding]], checker: str
) -> None:
    assert [found for found in findings[checker] if found.program == "right.py"] == []


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_users_mistakes_are_found_each_in_its_line(findings: dict[str, list[Finding]], checker: str) -> None:
    marked = {
        number: sorted(mark[checker].split(", "))
        for number, line in enumerate((Path(__file__).parent / "wrong.py").read_text().splitlines(), 1)
        if (mark := MARK.search(line))
    }
    found: defaultdict[int, set[str]] = defaultdict(set)
    for finding in findings[checker]:
        if finding.program == "wrong.py":
            found[finding.line].add(finding.code)
    assert {number: sorted(codes) for number, codes in found.items()} == marked


def test_there_are_mistakes_to_find() -> None:
    lines = (Path(__file__).parent / "wrong.py").read_text().splitlines()
    assert len([line for line in lines if MARK.search(line)]) > 20
    assert [line for line in lines if "# E:" in line and not MARK.search(line)] == []


@pytest.mark.parametrize("package", ["aggregates", "kernel", "migrations", "projections"])
def test_a_package_says_that_it_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
