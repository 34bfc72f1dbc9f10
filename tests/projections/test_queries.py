"""Queries that people type: whatever the text is, nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from projections import QueryRefused
from projections.database import open_database
from projections.queries import run_query

READS = {
    "select n from t": [{"n": 1}],
    "-- a comment\nselect n from t": [{"n": 1}],
    "/* a comment */ SELECT n FROM t;": [{"n": 1}],
    "with x as (select n from t) select * from x": [{"n": 1}],
    "values (1)": [{"column1": 1}],
    "select '%' as n where 'abc' like 'a%'": [{"n": "%"}],
    "select 'a;b' as n": [{"n": "a;b"}],
}
WRITES = [
    "delete from t",
    "insert into t values (2)",
    "update t set n = 2",
    "drop table t",
    "create table u (n integer)",
    "create temp table u (n integer)",
    "begin",
    "commit",
    "rollback",
    "select 1; delete from t",
    "select 1; commit; begin; delete from t; commit",
    "commit; begin; delete from t; commit",
    "explain select 1; delete from t",
    "/* select */ delete from t",
    "-- select\ndelete from t",
    "vacuum",
    "",
    "-- nothing",
]
ON_SQLITE = [
    "with x as (select 1) delete from t",
    "with x as (select 1) insert into t values (2) returning n",
    "replace into t values (2)",
    "explain delete from t",
    "pragma query_only=off",
    "pragma query_only=off; delete from t",
    "pragma writable_schema=1",
    "pragma user_version=9",
    "pragma journal_mode=delete",
    "pragma wal_checkpoint",
    "pragma temp_store_directory='/'",
    "attach 'other.db' as other",
    "vacuum into 'copy.db'",
    "select load_extension('x')",
    "reindex",
]
ON_POSTGRESQL = [
    "commit; begin read write; delete from t; commit",
    "set default_transaction_read_only = off",
    "set transaction read write",
    "set session characteristics as transaction read write",
    "reset all",
    "discard all",
    "start transaction read write",
    "select set_config('transaction_read_only', 'off', false)",
    "select pg_catalog.\"set_config\"/**/('transaction_read_only', 'off', false)",
    "with x as (delete from t returning n) select * from x",
    "select * into u from t",
    "select * into temp u from t",
    "select n from t for update",
    "explain analyze delete from t",
    "copy t from program 'echo 2'",
    "copy (select 1) to program 'true'",
    "/* /* */ select */ copy (select 1) to program 'true'",
    "do $$ begin delete from t; end $$",
    "do $$ begin commit; delete from t; commit; end $$",
    "call write()",
    "select written()",
    "select nextval('s')",
    "select setval('s', 9)",
    "select pg_terminate_backend(pg_backend_pid())",
    "select pg_notify('a', 'b')",
    "select pg_advisory_lock(1)",
    "select lo_create(1)",
    "select lo_export(1, '/nowhere')",
    'select U&"\\006co_create"(1)',
    "select query_to_xml('select nextval(''s'')', true, true, '')",
    "lock table t",
    "notify a",
    "listen a",
    "prepare p as delete from t",
    "alter system set work_mem = '1MB'",
    "truncate t",
]


@pytest.fixture
def reading(database_url: str) -> Iterator[Engine]:
    """An engine for queries on a database that has a table `t` with one row."""
    writing = open_database(database_url)
    with writing.begin() as connection:
        connection.execute(text("create table t (n integer)"))
        connection.execute(text("insert into t values (1)"))
        if writing.dialect.name == "postgresql":
            connection.execute(text("create sequence s"))
            body = "language plpgsql as $$ begin delete from t; commit; end $$"
            connection.execute(text(f"create procedure write() {body}"))
            body = "language plpgsql as $$ begin delete from t; return 1; end $$"
            connection.execute(text(f"create function written() returns integer {body}"))
    opened = open_database(database_url, read_only=True, pool_size=2)
    yield opened
    assert _rows(writing) == [1]
    if writing.dialect.name == "postgresql":
        with writing.connect() as connection:
            assert connection.execute(text("select last_value, is_called from s")).one() == (1, False)
            assert connection.scalar(text("select count(*) from pg_locks where locktype = 'advisory'")) == 0
    opened.dispose()
    writing.dispose()


def _rows(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.scalars(text("select n from t")))


@pytest.mark.parametrize("sql", READS)
def test_a_statement_that_reads_is_run(reading: Engine, sql: str) -> None:
    assert run_query(reading, sql) == READS[sql]


def test_values_are_given_by_name(reading: Engine) -> None:
    assert run_query(reading, "select n from t where n = :n and 'x%' like 'x%'", {"n": 1}) == [{"n": 1}]


def test_a_value_that_is_missing_is_named(reading: Engine) -> None:
    with pytest.raises(QueryRefused, match=r"'n': give its value, or write \\: for a colon"):
        run_query(reading, "select n from t where n = :n")


@pytest.mark.parametrize("sql", WRITES)
def test_a_text_that_could_write_is_refused_and_the_next_query_is_not(reading: Engine, sql: str) -> None:
    refuse(reading, sql)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize("sql", ON_POSTGRESQL)
def test_nothing_is_written_on_postgresql(reading: Engine, sql: str) -> None:
    refuse(reading, sql)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize("sql", ON_SQLITE)
def test_nothing_is_written_on_sqlite(reading: Engine, sql: str, tmp_path: Path) -> None:
    refuse(reading, sql)
    assert {path.name for path in tmp_path.iterdir()} <= {"projections.db", "projections.db-wal", "projections.db-shm"}
    assert not Path("other.db").exists()
    assert not Path("copy.db").exists()


def refuse(reading: Engine, sql: str) -> None:
    for values in (None, {"n": 1}):
        with pytest.raises(QueryRefused, match=r"read-only|one statement") as refused:
            run_query(reading, sql if values is None or not sql else f"{sql} /* :n */", values)
        assert "\n" not in str(refused.value)
    assert run_query(reading, "select n from t") == [{"n": 1}]


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
@pytest.mark.parametrize(
    "sql",
    [
        "(select n from t)",
        "table t",
        "show timezone",
        "explain select 1",
        "select now()",
        "/* /* */ */ select 1",
        "select 1::text",
    ],
)
def test_other_statements_that_read_are_run_on_postgresql(reading: Engine, sql: str) -> None:
    assert len(run_query(reading, sql)) == 1


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
@pytest.mark.parametrize(
    "sql",
    [
        "pragma table_info(t)",
        "select name from pragma_table_info('t')",
        "select value from json_each('[1]')",
        "explain query plan select * from t",
        "pragma journal_mode",
        "with recursive x(n) as (select 1 union all select n from x where 0) select * from x",
        "/* /* */ select 1",
    ],
)
def test_other_statements_that_read_are_run_on_sqlite(reading: Engine, sql: str) -> None:
    assert len(run_query(reading, sql)) == 1


def test_the_walls_behind_the_text_hold_by_themselves(reading: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("projections.queries.check_query", lambda *_: None)
    for sql in ("delete from t", "create temp table u (n integer)", "select 1; delete from t"):
        with pytest.raises(QueryRefused, match=r"read-only|one statement"):
            run_query(reading, sql)


def test_the_databases_own_errors_are_kept(reading: Engine) -> None:
    with pytest.raises(DBAPIError, match="nothing"):
        run_query(reading, "select nothing from t")
    with pytest.raises((DBAPIError, QueryRefused), match="selec"):
        run_query(reading, "with x as (selec 1) select 1")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_database_that_does_not_exist_is_not_created_by_a_query(database_url: str, tmp_path: Path) -> None:
    engine = open_database(database_url, read_only=True)
    with pytest.raises(DBAPIError, match="unable to open"):
        run_query(engine, "select 1")
    assert list(tmp_path.iterdir()) == []


def test_a_query_reads_the_file_that_is_there_now(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'p.db'}"
    reading = open_database(url, read_only=True)
    for number in (1, 2):
        made = open_database(url)
        with made.begin() as connection:
            connection.execute(text(f"create table t as select {number} as n"))
        assert run_query(reading, "select n from t") == [{"n": number}]
        for path in tmp_path.glob("p.db*"):
            path.rename(path.with_name(f"{number}{path.name}"))
        made.dispose()
    reading.dispose()
