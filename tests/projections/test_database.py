"""Opening the projection database: drivers, the settings of a session, poolers, and a file that is gone."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.engine import make_url

from projections import SchemaError
from projections.database import is_infrastructure, open_database, reads
from projections.queries import run_query
from projections.sqlite import FileReplaced
from tests.poolers import pooler

SETTINGS = ("TimeZone", "DateStyle", "IntervalStyle", "extra_float_digits", "lock_timeout", "synchronous_commit")
Unknown = Literal["refuse", "ignore"]


def test_postgresql_without_its_driver_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(SchemaError, match=r"psycopg is not installed; run `pip install 'eskernel\[postgres\]'`"):
        open_database("postgresql://user@nowhere/bank")


def settings_of(engine: Engine, *names: str) -> dict[str, str]:
    with reads(engine).begin() as connection:
        return {name: connection.scalar(text("select current_setting(:name)"), {"name": name}) for name in names}


def with_query(url: str, **query: str) -> str:
    return make_url(url).update_query_dict(query).render_as_string(hide_password=False)


@pytest.fixture
def strange(fresh_postgres: str) -> str:
    """The URL of a database whose settings change what is read back."""
    engine = open_database(fresh_postgres)
    name = make_url(fresh_postgres).database
    with engine.begin() as connection:
        for setting in (
            "TimeZone = 'Asia/Kolkata'",
            "DateStyle = 'German'",
            "IntervalStyle = 'iso_8601'",
            "extra_float_digits = -5",
        ):
            connection.execute(text(f"alter database {name} set {setting}"))
    engine.dispose()
    return fresh_postgres


OURS = {
    "TimeZone": "UTC",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "extra_float_digits": "1",
    "lock_timeout": "5s",
    "synchronous_commit": "off",
}


def test_what_is_read_back_does_not_depend_on_the_server(strange: str) -> None:
    for read_only in (False, True):
        engine = open_database(strange, read_only=read_only)
        assert settings_of(engine, *SETTINGS) == OURS
        with engine.connect() as connection:
            row = connection.execute(
                text("select timestamptz '2013-01-01 12:00:00Z' as moment, 0.1::float8 + 0.2 as number")
            ).one()
        assert row.moment.utcoffset().total_seconds() == 0
        assert row.number == 0.1 + 0.2
        engine.dispose()


def test_the_options_of_the_url_are_joined_with_ours_and_go_before_them(strange: str) -> None:
    for options in (
        "-c search_path=mine,public -c lock_timeout=7s",
        "-csearch_path=mine,public --lock-timeout=7s",
        r"-c search_path=mine,\ public -c LOCK_TIMEOUT=7000 -c timezone=Europe/Vienna",
    ):
        engine = open_database(with_query(strange, options=options, application_name="me", connect_timeout="3"))
        found = settings_of(engine, *SETTINGS, "search_path", "application_name")
        assert found.pop("search_path").replace(" ", "") == "mine,public"
        assert found.pop("application_name") == "me"
        assert found == OURS | {"lock_timeout": "7s"}
        engine.dispose()


@pytest.mark.parametrize(("given", "threshold"), [("0", None), ("None", None), ("off", None), ("3", 3), (None, 5)])
def test_statements_are_prepared_as_the_url_says(fresh_postgres: str, given: str | None, threshold: int | None) -> None:
    engine = open_database(fresh_postgres if given is None else with_query(fresh_postgres, prepare_threshold=given))
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        assert driver.prepare_threshold == threshold
    engine.dispose()


@pytest.mark.parametrize("unknown", ["refuse", "ignore"])
def test_behind_a_pooler_each_transaction_has_our_settings_and_prepares_nothing(strange: str, unknown: Unknown) -> None:
    with pooler(strange, unknown) as (between, url):
        options = "-c search_path=mine"
        engine = open_database(with_query(url, options=options))
        for number in range(12):
            assert settings_of(engine, *SETTINGS, "search_path") == OURS | {"search_path": "mine"}
            with engine.begin() as connection:
                assert connection.scalar(text("select :n"), {"n": number}) == number
        queries = open_database(url, read_only=True)
        assert run_query(queries, "select current_setting('transaction_read_only') as r") == [{"r": "on"}]
        # nothing stays at the server's session, which the next transaction shares with other clients
        with engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            assert driver.execute("show lock_timeout").fetchone() == ("0",)
        assert between.prepared == []
        engine.dispose()
        queries.dispose()


def test_statements_are_prepared_behind_a_pooler_if_the_url_says_so(fresh_postgres: str) -> None:
    with pooler(fresh_postgres, "refuse") as (between, url):
        engine = open_database(with_query(url, prepare_threshold="1"))
        for number in range(4):
            with engine.begin() as connection:
                connection.scalar(text("select :n"), {"n": number})
        assert between.prepared != []
        engine.dispose()


def test_an_option_that_no_pooler_takes_is_refused_with_the_remedy(fresh_postgres: str) -> None:
    with pooler(fresh_postgres, "refuse") as (_, url):
        engine = open_database(with_query(url, options="-e"))
        with pytest.raises(SchemaError, match="does not take the option '-e': only settings work there"):
            engine.connect()


@pytest.fixture(params=["", "ignore_startup_parameters = options"])
def bouncer(request: pytest.FixtureRequest, postgres_url: str, tmp_path: Path) -> Iterator[str]:
    """The address of a PgBouncer in transaction mode, before the test's PostgreSQL."""
    program = shutil.which("pgbouncer")
    if program is None:
        pytest.skip("pgbouncer is not installed")
    folder = make_url(postgres_url).query["host"]
    owner = Path(str(folder)).stat().st_uid
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = tmp_path / "pgbouncer.ini"
    config.write_text(
        f"[databases]\n* = host={folder} user=postgres\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n"
        "unix_socket_dir =\nauth_type = any\npool_mode = transaction\ndefault_pool_size = 2\n" + request.param
    )
    for path in (config, *list(config.parents)[:3]):
        path.chmod(0o755)
    as_owner = {"user": owner} if os.getuid() == 0 else {}
    process = subprocess.Popen([program, str(config)], stderr=subprocess.DEVNULL, **as_owner)
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            assert time.monotonic() < deadline
            assert process.poll() is None
    yield f"127.0.0.1:{port}"
    process.terminate()
    process.wait()


def test_pgbouncer_in_transaction_mode_works(bouncer: str, strange: str) -> None:
    url = f"postgresql://postgres@{bouncer}/{make_url(strange).database}"
    engine = open_database(url)
    with engine.connect() as first, engine.connect() as second:
        for number in range(20):
            for connection in (first, second):
                with connection.begin():
                    assert connection.scalar(text("select :n"), {"n": number}) == number
                    assert connection.scalar(text("select current_setting('TimeZone')")) == "UTC"
    engine.dispose()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_gone_is_noticed_before_anything_is_written_to_it(tmp_path: Path, replaced: bool) -> None:
    file = tmp_path / "p.db"
    engine = open_database(f"sqlite:///{file}")
    with engine.begin() as connection:
        connection.execute(text("create table t (n integer)"))
    file.rename(tmp_path / "old.db")
    if replaced:
        shutil.copyfile(tmp_path / "old.db", file)
    says = "replaced by another file" if replaced else "deleted"
    for opened in (engine, reads(engine)):
        with pytest.raises(FileReplaced, match=f"was {says}.* restart the service") as noticed, opened.begin():
            pass
        assert is_infrastructure(noticed.value), "no aggregate is parked for it"
    engine.dispose()
    with pytest.raises(FileReplaced):
        engine.connect()
    assert file.exists() == replaced, "it must not be created again, empty"
