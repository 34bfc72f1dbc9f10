"""What a command imports before it answers: the modules that take long are left to the commands that need them."""

from __future__ import annotations

import inspect
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from kernel.cli import _COMMANDS
from kernel.runtime.directory import DataDirectory, running_as
from kernel.settings import Database, Settings
from projections.database import open_database

SLOW = ("aiohttp", "alembic", "apscheduler", "nats", "prometheus_client", "sqlalchemy", "structlog", "thespian")
TAKE_SETTINGS = {"run", "check", "config"}
"""Their help lists settings, which are pydantic's."""
LISTING = """
import atexit, sys
atexit.register(lambda: print("imported", *sorted(sys.modules), file=sys.stderr))
from kernel.cli import main
main()
"""


def imported_by(*arguments: str, folder: Path) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", LISTING, *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split()[1:])


@pytest.mark.parametrize("command", ["", *_COMMANDS])
def test_help_imports_nothing_that_takes_long(command: str, tmp_path: Path) -> None:
    slow = SLOW if command in TAKE_SETTINGS else (*SLOW, "pydantic")
    assert imported_by(*filter(None, [command]), "--help", folder=tmp_path).isdisjoint(slow)


def test_a_query_imports_neither_the_app_nor_what_only_a_service_needs(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'rows.db'}"
    sqlite3.connect(tmp_path / "rows.db").execute("create table rows (number)").connection.close()
    directory = DataDirectory(tmp_path / ".eskernel", "bank")
    directory.hold()
    try:
        directory.describe(running_as("bank", "no.such:app", Settings(), "nats://127.0.0.1:1", database, ""))
        found = imported_by("query", "select 1", folder=tmp_path)
    finally:
        directory.release()
    needed = {"sqlalchemy"}
    assert needed <= found
    assert found.isdisjoint({*SLOW, "pydantic", "sqlalchemy.orm", "kernel.app"} - needed)


def test_a_query_opens_the_database_with_the_defaults_of_the_settings() -> None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(open_database).parameters.items()}
    assert Database().options().items() <= defaults.items()


@pytest.mark.parametrize("package", ["kernel", "projections"])
def test_a_public_package_imports_its_names_when_they_are_used(package: str, tmp_path: Path) -> None:
    code = f"import sys, {package}; print(sys.modules.keys() & {set(SLOW)!r})"
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": root}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
