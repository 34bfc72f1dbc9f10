"""`eskernel check --database` and `eskernel projections`, on databases that other versions of the app have filled."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, inspect, text

from kernel.app import App, load_app
from tests.commands import eskernel
from tests.conftest import ReadSide

SOURCE = """
from aggregates import Aggregate, applies, event
from kernel import App
from projections import Rows
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


@event
class Noted:
    text: str


class Notebook(Aggregate):
    @applies
    def noted(self, event: Noted) -> None: ...


class Base(DeclarativeBase): ...


class Page(Base):
    __tablename__ = "pages"
    id: Mapped[str] = mapped_column(primary_key=True)
    count: Mapped[int] = mapped_column(default=0)


class Line(Base):
    __tablename__ = "lines"
    id: Mapped[str] = mapped_column(primary_key=True)
    {column}: Mapped[int] = mapped_column(default=0)


class Pages(Rows[Page], of=Notebook):
    @applies
    def noted(self, row: Page, event: Noted) -> None: ...


class Lines(Rows[Line], of=Notebook, version={version}):
    @applies
    def noted(self, row: Line, event: Noted) -> None: ...


app = App("books", aggregates=[Notebook], projections=[{projections}])
"""
Write = Callable[..., App]


class Shell:
    """Runs `eskernel` in a folder of its own, on a database."""

    def __init__(self, folder: Path, database: str) -> None:
        self.folder, self.database = folder, database

    def write(self, projections: str = "Pages, Lines", column: str = "number", version: int = 1) -> None:
        source = SOURCE.format(projections=projections, column=column, version=version)
        (self.folder / "books_app.py").write_text(source)
        # its like of the same size and the same second would be taken for this one
        shutil.rmtree(self.folder / "__pycache__", ignore_errors=True)

    def __call__(self, *arguments: str, code: int = 0) -> str:
        done = eskernel(*arguments, folder=self.folder, COLUMNS="200")
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def check(self, *arguments: str, code: int = 0) -> str:
        return self("check", "books_app:app", "--database", self.database, *arguments, code=code)

    def findings(self, code: int = 0) -> list[tuple[str, str]]:
        found: list[dict[str, Any]] = json.loads(self.check("--json", code=code))["database"]
        return [(finding["level"], f"{finding['what']}: {finding['detail']} {finding['remedy']}") for finding in found]


@pytest.fixture
def shell(tmp_path: Path, database_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """The app with both projections has been started on the database."""
    shell = Shell(tmp_path, database_url)
    shell.write()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "books_app", raising=False)
    ReadSide(engine, load_app("books_app:app"))
    monkeypatch.delitem(sys.modules, "books_app")
    return shell


def test_check_says_that_the_tables_are_those_of_the_models(shell: Shell) -> None:
    found = shell.findings()
    assert {level for level, _ in found} == {"ok"}
    assert [sentence for _, sentence in found if "its tables are those that the model declares" in sentence] != []
    assert "projection Lines: its tables are those that the model declares" in shell.check()


def test_check_says_what_a_start_would_build_and_what_would_prevent_it(shell: Shell, engine: Engine) -> None:
    shell.write(column="amount")
    (problem,) = [sentence for level, sentence in shell.findings(code=1) if level == "error"]
    assert "Lines was changed" in problem
    assert "the column number is no longer declared; the column amount is not in the table" in problem
    assert "Raise it to version=2" in problem
    shell.write(column="amount", version=2)
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            connection.execute(text("CREATE VIEW long AS SELECT number FROM lines"))
        text_ = shell.check(code=1)
        assert "loses number" in text_
        assert "view long" in text_
        with engine.begin() as connection:
            connection.execute(text("DROP VIEW long"))
    assert "projection Lines: the next start builds it from the log: version 1 is live" in shell.check()


def test_check_of_a_database_that_does_not_exist_says_what_a_start_builds(shell: Shell) -> None:
    shell.database = "sqlite:///nowhere.db"
    assert "projection Pages: the next start builds it from the log: it is new" in shell.check()
    assert not (shell.folder / "nowhere.db").exists()


def test_check_without_a_url_examines_the_configured_database(shell: Shell) -> None:
    (shell.folder / "eskernel.toml").write_text(f'[database]\nurl = "{shell.database}"\n')
    for arguments in (("books_app:app", "--database"), ("--database", "books_app:app")):
        assert "projection Lines: its tables are those that the model declares" in shell("check", *arguments)
    assert "projection" not in shell("check", "books_app:app").replace("Pages (rows", "")


def test_a_projection_that_the_app_no_longer_has_is_listed_and_dropped(shell: Shell, engine: Engine) -> None:
    shell.write(projections="Pages")
    ((_, warning),) = [finding for finding in shell.findings() if finding[0] == "warning"]
    assert "projection Lines: the app does not declare it; these views are not kept up to date: lines" in warning
    assert "eskernel projections drop Lines" in warning
    options = ("--app", "books_app:app", "--nats", "nats://nobody.invalid", "--database", shell.database)
    assert "Lines, not in the app: eskernel projections drop Lines" in shell("projections", "list", *options)
    listed = json.loads(shell("projections", "list", "--json", *options))
    assert [(known["name"], known["declared"], known["live"]) for known in listed] == [
        ("Lines", None, 1),
        ("Pages", 1, 1),
    ]
    assert listed[0]["generations"][0]["tables"] == [{"view": "lines", "table": "lines__1"}]
    assert "the app declares the projection Pages" in shell("projections", "drop", "Pages", *options, code=1)
    assert "Lines is dropped: views lines; tables lines__1" in shell("projections", "drop", "Lines", *options)
    assert not inspect(engine).has_table("lines__1")
    assert shell.findings()[-1][0] == "ok"
