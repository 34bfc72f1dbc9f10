"""Database URLs, as people write them."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy import text

from kernel.settings.database import Database
from projections import SchemaError
from projections.database import open_database
from projections.urls import database_url, readable_name, sqlite_file

NAMES = ["a b", "ü", "q'\"x", "%2F", "100%", "x?y", "#h", "a%3Fb", "semi;colon", "new\nline"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["path", "uri", "directory"])
def test_a_file_with_any_name_is_written_and_read_by_its_url(tmp_path: Path, name: str, form: str) -> None:
    file = tmp_path / name / "projections.db"
    url = {
        "path": f"sqlite:///{quote(str(file))}",
        "uri": f"sqlite:///file:{quote(str(file))}?uri=true",
        "directory": Database().url_in(file.parent),
    }[form]
    assert sqlite_file(database_url(url)) == file
    writing = open_database(url)
    with writing.begin() as connection:
        connection.execute(text("create table t as select 1 as n"))
    reading = open_database(url, read_only=True)
    with reading.connect() as connection:
        assert connection.scalar(text("select n from t")) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert file.exists()
    writing.dispose()
    reading.dispose()


def test_a_relative_file_is_one_of_the_present_folder_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "50%3F ?"
    folder.mkdir()
    monkeypatch.chdir(folder)
    url = Database.model_validate({"url": "sqlite:///here.db?timeout=3"}).url or ""
    monkeypatch.chdir(tmp_path)
    assert sqlite_file(database_url(url)) == folder / "here.db"


@pytest.mark.parametrize(
    ("url", "user", "password", "host", "port", "database"),
    [
        ("postgresql://h/db", None, None, "h", None, "db"),
        ("postgres://u@h:5433/db", "u", None, "h", 5433, "db"),
        ("postgresql+psycopg://u:p%2Fq%40%3A@h/db", "u", "p/q@:", "h", None, "db"),
        ("postgresql://u:p@ss@h/db", "u", "p@ss", "h", None, "db"),
        ("postgresql://ü:ä%C3%B6@h/d%C3%BC", "ü", "äö", "h", None, "dü"),
        ("postgresql://u@[::1]:5433/db", "u", None, "::1", 5433, "db"),
        ("PostgreSQL://h/db", None, None, "h", None, "db"),
    ],
)
def test_the_parts_of_a_postgresql_url_are_read(
    url: str, user: str | None, password: str | None, host: str | None, port: int | None, database: str
) -> None:
    found = database_url(url)
    assert found.drivername == "postgresql+psycopg"
    assert (found.username, found.password, found.host, found.port) == (user, password, host, port)
    assert found.database == database


def test_several_hosts_are_all_kept() -> None:
    for url in ("postgresql://u@h1:1,h2:2/db", "postgresql://u@/db?host=h1:1&host=h2:2"):
        found = database_url(url)
        assert found.query["host"] == ("h1:1", "h2:2")
        arguments = open_database(url).dialect.create_connect_args(found)[1]
        assert (arguments["host"], arguments["port"]) == ("h1,h2", "1,2")


def test_a_folder_of_sockets_is_a_host() -> None:
    for url in ("postgresql://%2Fvar%2Frun/db", "postgresql:///db?host=/var/run"):
        found = database_url(url)
        assert (found.host, found.query["host"]) == (None, "/var/run")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("projections.db", "is not a URL"),
        ("mysql://u@h/db", "'mysql' is not supported"),
        ("postgresql+asyncpg://h/db", "names the driver 'asyncpg', and eskernel uses psycopg: write postgresql://"),
        ("postgresql+psycopg2://h/db", "names the driver 'psycopg2'"),
        ("sqlite+aiosqlite:///p.db", "names the driver 'aiosqlite'"),
        ("sqlite://p.db", "SQLite is a file: write sqlite:///file.db"),
        ("sqlite:///file:p.db", "add `uri=true`"),
        ("sqlite:///p.db?mode=ro", "sets 'mode', which has no use here"),
        ("sqlite:///p.db?timeout=long", "timeout=long, which is not a number"),
        ("sqlite:///p.db?isolation_level=IMMEDIATE", "sets 'isolation_level'"),
        ("postgresql://h:port/db", "the port is not a number"),
        ("postgresql://h/db?autocommit=true", "sets 'autocommit', which eskernel sets itself"),
        ("postgresql://h/db?client_encoding=latin1", "sets 'client_encoding'"),
        ("postgresql://h/db?connect_timeout=soon", "connect_timeout=soon, which is not a whole number"),
        ("postgresql://h/db?prepare_threshold=often", "use a whole number, or none"),
        ("postgresql://h/db?sslmod=require", "sets 'sslmod'"),
        ("postgresql://h/db?sslmode=require&sslmode=disable", "sets 'sslmode' more than once"),
    ],
)
def test_a_url_that_cannot_work_is_refused_in_a_sentence(url: str, says: str) -> None:
    with pytest.raises(SchemaError) as refused:
        open_database(url)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("postgresql://u:secret@db.example.com/bank", "db.example.com/bank"),
        ("postgresql://u:secret@db.example.com:5433/bank?password=secret", "db.example.com:5433/bank"),
        ("postgresql://u:secret@h1:1,h2:2/bank", "h1:1,h2:2/bank"),
    ],
)
def test_a_database_is_named_without_its_credentials(url: str, name: str) -> None:
    assert readable_name(database_url(url)) == name


def test_what_is_local_is_named_with_its_machine() -> None:
    for url in ("sqlite:////data/p.db", "postgresql:///bank", "postgresql://u:secret@localhost/bank"):
        name = readable_name(database_url(url))
        assert " on " in name
        assert "secret" not in name
