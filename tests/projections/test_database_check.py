"""A database that can't hold projections is refused before anything is written to it, in a sentence with a remedy."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

import migrations
from kernel import Service
from kernel.preflight import check_database
from projections import SchemaError
from projections.database import open_database
from projections.database_check import check_usable
from tests.apps import bank
from tests.conftest import settings_for


class Admin:
    """A superuser's connection to the test's PostgreSQL server, and the databases and roles made with it."""

    def __init__(self, url: str) -> None:
        self.url = make_url(url)
        self._engine = create_engine(self.url.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
        self._undo: list[str] = []

    def do(self, statement: str, database: str = "") -> None:
        engine = create_engine(
            self.url.set(drivername="postgresql+psycopg", database=database or self.url.database),
            isolation_level="AUTOCOMMIT",
        )
        with engine.connect() as connection:
            connection.execute(text(statement))
        engine.dispose()

    def database(self, options: str = "") -> str:
        name = f"c{uuid.uuid4().hex}"
        self.do(f"CREATE DATABASE {name} {options}")
        self._undo.append(f"DROP DATABASE {name} WITH (FORCE)")
        return name

    def role(self) -> str:
        name = f"r{uuid.uuid4().hex[:12]}"
        self.do(f"CREATE ROLE {name} LOGIN")
        self._undo.insert(0, f"DROP ROLE {name}")
        return name

    def address(self, database: str, role: str = "postgres") -> str:
        return self.url.set(database=database, username=role).render_as_string(hide_password=False)

    def close(self) -> None:
        for statement in reversed(self._undo):
            self.do(statement)
        self._engine.dispose()


@pytest.fixture
def admin(postgres_url: str) -> Iterator[Admin]:
    made = Admin(postgres_url)
    yield made
    made.close()


def refusal(url: str) -> str:
    engine = open_database(url)
    with pytest.raises(SchemaError) as refused:
        check_usable(engine)
    engine.dispose()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_database_that_is_fit_is_taken(database_url: str) -> None:
    engine = open_database(database_url)
    check_usable(engine)
    migrations.upgrade(engine)
    check_usable(engine)
    engine.dispose()


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_an_encoding_that_lacks_letters_is_refused(admin: Admin, encoding: str) -> None:
    name = admin.database(f"ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
    assert f"has the encoding {encoding}" in (says := refusal(admin.address(name)))
    assert "ENCODING 'UTF8' TEMPLATE template0" in says


def test_a_role_that_may_not_create_tables_is_refused(admin: Admin) -> None:
    name, role = admin.database(), admin.role()
    says = refusal(admin.address(name, role))
    assert f"the role {role} may not create tables in the schema public" in says
    assert f"GRANT CREATE ON SCHEMA public TO {role}" in says


def test_a_role_without_a_schema_is_refused(admin: Admin) -> None:
    name = admin.database()
    url = make_url(admin.address(name)).update_query_dict({"options": "-c search_path=nowhere"})
    assert "search_path is nowhere" in refusal(url.render_as_string(hide_password=False))


def test_tables_of_another_role_are_refused(admin: Admin) -> None:
    name, role = admin.database(), admin.role()
    engine = open_database(admin.address(name))
    migrations.upgrade(engine)
    engine.dispose()
    admin.do(f"GRANT CREATE ON SCHEMA public TO {role}", name)
    says = refusal(admin.address(name, role))
    assert f"the role {role} may not write the table eskernel_checkpoint" in says
    assert "belongs to postgres" in says


def test_a_database_that_takes_no_writes_is_refused(admin: Admin) -> None:
    name = admin.database()
    admin.do(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    assert "default_transaction_read_only is on; set it off" in refusal(admin.address(name))


def test_a_server_that_is_too_old_is_refused(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("projections.database_check.OLDEST_POSTGRESQL", 99)
    assert "too old: use PostgreSQL 99 or newer" in refusal(admin.address(admin.database()))


def test_a_standby_is_refused(admin: Admin) -> None:
    name = admin.database()
    # as if it were one: the function of that name is found first
    admin.do("CREATE SCHEMA mine", name)
    admin.do("CREATE FUNCTION mine.pg_is_in_recovery() RETURNS boolean LANGUAGE sql AS 'SELECT true'", name)
    url = make_url(admin.address(name)).update_query_dict({"options": "-c search_path=mine,pg_catalog"})
    says = refusal(url.render_as_string(hide_password=False))
    assert "is a standby" in says
    assert "target_session_attrs=read-write" in says


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.db").write_bytes(b"something else, and longer than the header of a database " * 100)
    assert "is not a database of SQLite" in refusal(f"sqlite:///{tmp_path / 'p.db'}")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.db").mkdir()
    assert "allow this user to write the file" in refusal(f"sqlite:///{tmp_path / 'p.db'}")


def test_a_file_that_is_opened_for_reading_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.db"
    made = open_database(f"sqlite:///{file}")
    migrations.upgrade(made)
    made.dispose()
    assert "is read-only" in refusal(f"sqlite:///file:{file}?uri=true&mode=ro")


def test_an_old_sqlite_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("projections.database_check.OLDEST_SQLITE", (99, 0, 0))
    assert "use a Python with SQLite 99.0.0 or newer" in refusal(f"sqlite:///{tmp_path / 'p.db'}")


async def test_a_service_and_the_check_before_it_refuse_in_the_same_sentence(
    admin: Admin, nats_url: str, app_name: str, tmp_path: Path
) -> None:
    name, role = admin.database(), admin.role()
    settings = settings_for(tmp_path, nats=nats_url, database=admin.address(name, role))
    with pytest.raises(SchemaError, match="may not create tables") as refused:
        await Service(bank(app_name), settings).start()
    (finding,) = check_database(bank(app_name), settings)
    assert (finding.level, finding.detail) == ("error", str(refused.value))


@pytest.mark.skipif(os.getuid() == 0, reason="the superuser may write everything")
def test_a_file_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    made = open_database(f"sqlite:///{tmp_path / 'p.db'}")
    migrations.upgrade(made)
    made.dispose()
    (tmp_path / "p.db").chmod(0o444)
    assert "is read-only" in refusal(f"sqlite:///{tmp_path / 'p.db'}")
