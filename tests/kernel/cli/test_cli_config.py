"""`eskernel config`: the settings and their origins, and whether the servers match the settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

import migrations
from kernel import Service
from kernel.errors import LogError
from kernel.settings.sources import leaves
from projections.database import open_database
from tests.apps import notebooks
from tests.commands import eskernel
from tests.conftest import OLD_SERVER, settings_for
from tests.failing import api, change_stream, free_port
from tests.servers import NO_JETSTREAM, account_config, password_config, server, token_config

Run = Callable[..., str]


@pytest.fixture
def config(tmp_path: Path, app_name: str) -> Run:
    """Runs `eskernel config` in an empty folder; returns its output, and fails on an unexpected exit code."""

    def run(*arguments: str, code: int = 0, **variables: str) -> str:
        given = {"COLUMNS": "200", "FAILING_APP": app_name, **variables}
        done = eskernel("config", *arguments, folder=tmp_path, **given)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if done.stdout else done.stderr

    return run


def check(config: Run, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(config("check", "tests.failing:app", "--json", *arguments, code=code))
    assert any(finding["level"] == "error" for finding in found) == (code == 1)
    return found


def reports(found: list[dict[str, Any]], level: str, *words: str) -> bool:
    return any(finding["level"] == level and all(word in str(finding) for word in words) for finding in found)


def test_show_lists_every_setting_with_its_origin_and_no_secrets(config: Run, tmp_path: Path) -> None:
    (tmp_path / "eskernel.toml").write_text(
        "[database]\nurl = 'postgresql://me:hush@h/d'\n[security]\ntoken = 'hush'\n"
    )
    given = ["--nats", "nats://u:hush@a,nats://b", "--set", "stream.replicas=3"]
    output = config("show", *given, ESKERNEL_HTTP__TOKEN="hush", ESKERNEL_WORKERS="2")
    assert "hush" not in output
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in output.splitlines()}
    assert list(lines) == [name for name, _ in leaves()]
    assert lines["connection.servers"] == "nats://u:***@a, nats://b (command line)"
    assert lines["database.url"] == "postgresql://me:***@h/d (eskernel.toml)"
    assert lines["security.token"] == "********** (eskernel.toml)"
    assert lines["http.token"] == "********** (ESKERNEL_HTTP__TOKEN)"
    assert lines["workers"] == "2 (ESKERNEL_WORKERS)"
    assert lines["lease"] == "3.0 (default)"
    changed = json.loads(config("show", *given, "--changed", "--json"))
    assert [setting["name"] for setting in changed] == [
        "connection.servers", "security.token", "stream.replicas", "database.url",
    ]  # fmt: skip
    assert changed[2] == {"name": "stream.replicas", "value": 3, "origin": "command line"}


def test_show_and_check_report_every_problem_of_the_settings(config: Run) -> None:
    for command in (["show"], ["check", "tests.failing:app"]):
        output = config(*command, "--set", "stream.replica=3", "--set", "workers=0", code=2)
        assert "stream.replica: no such setting" in output
        assert "workers:" in output


def test_schema_prints_a_json_schema(config: Run) -> None:
    schema = json.loads(config("schema"))
    assert set(schema["properties"]) >= {"connection", "stream", "workers"}
    assert schema["additionalProperties"] is False


def test_check_without_servers_makes_nothing(config: Run, tmp_path: Path) -> None:
    found = check(config)
    assert [finding["level"] for finding in found] == ["ok", "ok", "ok"]
    assert list(tmp_path.iterdir()) == []
    assert reports(check(config, "--set", "security.token=t", code=1), "error", "security.token is for servers")


def test_check_tries_each_server(config: Run, nats_url: str, old_nats_url: str) -> None:
    gone = f"nats://127.0.0.1:{free_port()}"
    found = check(config, "--nats", f"{nats_url},{gone},{old_nats_url}", code=1)
    assert reports(found, "ok", nats_url, "nats-server 2.15.")
    assert reports(found, "ok", old_nats_url, "nats-server 2.10.")
    assert reports(found, "error", gone, "Connect call failed")
    assert reports(found, "ok", "stream", "it does not exist; the service creates it")
    always = check(config, "--nats", old_nats_url, "--group-commit", "always", code=1)
    assert reports(always, "error", "needs nats-server 2.12")


async def test_check_makes_no_stream_and_no_table(
    config: Run, nats_url: str, app_name: str, fresh_postgres: str
) -> None:
    found = check(config, "--nats", nats_url, "--database", fresh_postgres)
    assert reports(found, "ok", "database", "creates its tables at start")
    assert reports(found, "ok", "database", "writable")
    async with api(nats_url) as call:
        assert app_name not in ((await call("STREAM.NAMES"))["streams"] or [])
    engine = open_database(fresh_postgres)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM pg_tables WHERE tablename LIKE 'eskernel%'")) == 0
    engine.dispose()


async def test_check_says_what_a_start_would_do_about_each_difference(
    config: Run, nats_url: str, app_name: str, tmp_path: Path
) -> None:
    from kernel.transport.dial import connect
    from tests.conftest import open_log

    connection = await connect(nats_url, name="test")
    log = await open_log(connection, app_name)
    for n in range(3):
        await log.append(log.subjects.address("Notebook", f"n{n}").subject, 0, b"%d" % n)
    await log.close()
    await connection.close()
    given = ["--nats", nats_url, "--set", "stream.compression=s2", "--set", "stream.max_messages=1000"]
    async with api(nats_url) as call:
        before = (await call(f"STREAM.INFO.{app_name}"))["config"]
        found = check(config, *given)
        assert reports(found, "warning", "compression (stream.compression) is 'none', wanted 's2'", "stays as it is")
        assert reports(found, "warning", "max_msgs", "stays as it is")
        assert reports(check(config, *given, "--set", "stream.existing=update"), "warning", "compression", "changes it")
        found = check(config, *given, "--set", "stream.existing=validate", code=1)
        assert reports(found, "error", "compression", "does not start")
        assert reports(check(config, *given, "--set", "stream.existing=skip"), "warning", "max_msgs", "'skip'")
        small = ["--nats", nats_url, "--set", "stream.max_messages=2", "--set", "stream.existing=update"]
        assert reports(check(config, *small, code=1), "error", "max_msgs", "holds more already")
        memory = ["--nats", nats_url, "--set", "stream.storage=memory"]
        assert reports(check(config, *memory, code=1), "error", "storage", "can't be changed")
        assert reports(check(config, "--nats", nats_url, "--partitions", "8"), "warning", "64 partitions, not 8")
        assert (await call(f"STREAM.INFO.{app_name}"))["config"] == before
    await change_stream(nats_url, app_name, max_age=3600 * 10**9)
    assert reports(check(config, "--nats", nats_url, code=1), "error", "would lose events", "max_age")


async def test_check_reports_credentials_permissions_and_limits(config: Run, tmp_path: Path) -> None:
    async with server(tmp_path / "a", token_config("right")) as nats:
        found = check(config, "--nats", nats.url, "--set", "security.token=hush", code=1)
        assert reports(found, "error", "refused security.token")
        assert "hush" not in str(found)
        check(config, "--nats", nats.url, "--set", "security.token=right")
    async with server(tmp_path / "b", password_config("me", "right", NO_JETSTREAM)) as nats:
        user = ["--set", "security.user=me", "--set", "security.password=right"]
        found = check(config, "--nats", nats.url, *user, "--set", "jetstream.request_timeout=0.5", code=1)
        assert reports(found, "error", "JetStream", "permissions violation")
    async with server(tmp_path / "c", account_config("me", "right", "max_file: 1000000"), binary=OLD_SERVER) as nats:
        found = check(config, "--nats", nats.url, *user, "--set", "stream.max_bytes=2000000", code=1)
        assert reports(found, "error", "of 1,000,000 in files", "less than stream.max_bytes")
        assert reports(check(config, "--nats", nats.url, *user), "ok", "of 1,000,000 in files")


@pytest.mark.parametrize(
    ("limits", "remedy"),
    [("max_mem: 0, max_file: 1GB", "max_mem"), ("max_streams: 1", "max_streams"), ("max_file: 0", "max_file")],
)
async def test_an_account_that_is_too_small_is_named_with_a_remedy(
    config: Run, app_name: str, tmp_path: Path, limits: str, remedy: str
) -> None:
    async with server(tmp_path / "nats", account_config("me", "right", limits)) as nats:
        settings = settings_for(tmp_path, nats=nats.url, security__user="me", security__password="right")
        with pytest.raises(LogError, match=f"; raise {remedy} of the NATS account"):
            await Service(notebooks(app_name), settings).start()
        user = ["--set", "security.user=me", "--set", "security.password=right"]
        assert reports(check(config, "--nats", nats.url, *user, code=1), "error", "JetStream of", remedy)


def test_permissions_are_printed_for_the_kinds_that_are_named(config: Run) -> None:
    given = ["--set", "connection.inbox_prefix=bank.inbox.alice"]
    printed = config("permissions", "examples.bank:app", "client", "read-only", *given)
    assert "bank.inbox.alice.client.>" in printed
    assert "exports: [" in printed
    assert "bank.evt" not in printed
    found = json.loads(config("permissions", "examples.bank:app", "--json"))
    assert set(found) == {"service", "client", "operator", "monitoring", "read-only"}
    assert found["client"]["publish"] == ["bank.cmd", "bank.cmd.>"]


def test_check_tries_the_database_and_the_directory(
    config: Run, tmp_path: Path, fresh_postgres: str, postgres_url: str
) -> None:
    found = check(config, "--database", "postgresql://u:hush@127.0.0.1:1/x", code=1)
    assert reports(found, "error", "database", "refused")
    assert "hush" not in str(found)
    assert reports(check(config, "--database", "mysql://h/d", code=1), "error", "is not supported")
    engine = open_database(fresh_postgres)
    migrations.upgrade(engine)
    assert reports(check(config, "--database", fresh_postgres), "ok", "the newest")
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {migrations.VERSION_TABLE} SET version_num = 'later'"))
    assert reports(check(config, "--database", fresh_postgres, code=1), "error", "revision later")
    with engine.begin() as connection:
        connection.execute(text(f"UPDATE {migrations.VERSION_TABLE} SET version_num = '{migrations.head()}'"))
    engine.dispose()
    admin = create_engine(make_url(postgres_url).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        name = make_url(fresh_postgres).database
        connection.execute(text(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
    admin.dispose()
    assert reports(check(config, "--database", fresh_postgres, code=1), "error", "not writable")
    (tmp_path / "file").write_text("")
    assert reports(check(config, "--data", "file/data", code=1), "error", "data directory", "Not a directory")


def test_check_prints_lines_for_people(config: Run) -> None:
    output = config("check", "tests.failing:app", "--nats", f"nats://127.0.0.1:{free_port()}", code=1)
    assert output.startswith("error   server nats://127.0.0.1")
    assert "see connection and security" in output
    assert "ok      data directory" in output
