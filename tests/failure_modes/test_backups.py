"""Logs and databases that are restored from backups, in every combination; docs/backup.md says the same in words."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from kernel import assembly
from kernel.errors import Replaced
from kernel.log import JetStreamLog, find_log
from kernel.log.base import StreamInfo
from kernel.transport.dial import connect
from projections.database import open_database
from projections.origin import Origin, read_origin
from projections.tables import stream
from tests.failing import api, filled, refused, running, server, stopped
from tests.snapshots import restore_snapshot, take_snapshot

Caplog = pytest.LogCaptureFixture


def advises(message: str) -> None:
    """Check that a refusal advises what loses nothing."""
    assert "restore the newer log from a backup" in message
    assert "keep" in message
    assert "empty" not in message


@contextmanager
def opened(database: Path) -> Iterator[Engine]:
    engine = open_database(f"sqlite:///{database}")
    yield engine
    engine.dispose()


def known(database: Path, app: str) -> Origin:
    """Return what a database knows of its log."""
    with opened(database) as engine:
        origin = read_origin(engine, app)
    assert origin is not None
    return origin


def change(database: Path, **values: Any) -> None:
    """Change what a database knows of its log."""
    with opened(database) as engine, engine.begin() as connection:
        connection.execute(stream.update().values(**values))


@asynccontextmanager
async def log_and_database(url: str, app: str, directory: Path) -> AsyncIterator[tuple[JetStreamLog, Engine]]:
    """The log of a stopped service, and its database."""
    connection = await connect(url, name="test")
    log = await find_log(connection, app)
    with opened(directory / "projections.db") as engine:
        yield log, engine
    await log.close()
    await connection.close()


# the same log


async def test_a_stream_restored_from_a_snapshot_is_the_same_log(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path, caplog: Caplog
) -> None:
    """It was taken while the service was at work, and is restored on another server: the move to a new cluster."""
    async with running(app_name, tmp_path, nats_url, database_url) as here:
        await here.client.query("select 1", after=await here.note(40))
        snapshot = await take_snapshot(nats_url, app_name)
        acknowledged = here.acknowledged
    async with server(tmp_path) as other:
        await restore_snapshot(other.url, snapshot)
        with caplog.at_level(logging.INFO, "eskernel"):
            async with running(app_name, tmp_path, other.url, database_url) as here:
                pass
        assert "is the same log" in caplog.text
        caplog.clear()
        with caplog.at_level(logging.INFO, "eskernel"):
            async with running(app_name, tmp_path, other.url, database_url) as here:
                here.acknowledged = acknowledged
                await here.check()
        assert "is the same log" not in caplog.text


async def test_a_leader_with_another_creation_time_is_no_other_log(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each server of a cluster has its own time for a stream that was restored there, seen with nats-server 2.15."""
    async with running(app_name, tmp_path, nats_url) as here:
        log = here.service.parts.log
        await here.note(20)
        await log.verify()
        honest = JetStreamLog.info

        async def info(log: JetStreamLog) -> StreamInfo:
            return (await honest(log))._replace(created="2013-01-01T00:00:00Z")

        monkeypatch.setattr(JetStreamLog, "info", info)
        await log.verify()
        monkeypatch.undo()
        await log.verify()
        await here.check()


async def test_a_log_that_is_another_one_by_now_stops_the_service(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is as long as the one before, and has its creation time."""
    async with running(app_name, tmp_path, nats_url) as here:
        log = here.service.parts.log
        await here.note(20)
        await log.verify()

        async def digest(_log: JetStreamLog, _sequence: int) -> str:
            return "another"

        monkeypatch.setattr(JetStreamLog, "digest", digest)
        with pytest.raises(Replaced):
            await log.verify()
        await stopped(here, "is another one")
        advises(here.service.failure)
        monkeypatch.undo()


async def test_a_database_of_an_older_version_is_tied_to_its_log_by_the_creation_time(
    nats_url: str, app_name: str, tmp_path: Path
) -> None:
    acknowledged = await filled(app_name, tmp_path, nats_url)
    database = tmp_path / "projections.db"
    before = known(database, app_name)
    assert before.anchor == before.furthest
    change(database, anchor=None, digest=None)
    async with running(app_name, tmp_path, nats_url) as here:
        here.acknowledged = acknowledged
        await here.check()
    assert known(database, app_name).anchor > before.anchor
    # nothing but the creation time is known, and it is another
    change(database, created="long ago", anchor=None, digest=None)
    assert "nothing else is known" in await refused(app_name, tmp_path, nats_url)


async def test_an_older_database_catches_up_with_a_newer_log(nats_url: str, app_name: str, tmp_path: Path) -> None:
    acknowledged = await filled(app_name, tmp_path, nats_url)
    shutil.copy(tmp_path / "projections.db", tmp_path / "older.db")
    later = await filled(app_name, tmp_path, nats_url, 30)
    shutil.copy(tmp_path / "older.db", tmp_path / "projections.db")
    async with running(app_name, tmp_path, nats_url) as here:
        here.acknowledged = {name: acknowledged[name] + later[name] for name in acknowledged}
        await here.check()


async def test_the_commit_that_the_log_is_known_by_moves_on(nats_url: str, app_name: str, tmp_path: Path) -> None:
    async with running(app_name, tmp_path, nats_url) as here:
        parts = here.service.parts
        for _ in range(2):
            await here.client.query("select 1", after=await here.note(20))
            await parts.anchor.move()
            found, last = known(tmp_path / "projections.db", app_name), (await parts.log.info()).last
            assert found.anchor == last
            assert found.digest == await parts.log.digest(last)


@pytest.mark.parametrize("first", ["database", "log"])
async def test_a_hot_backup_is_made_of_the_database_first_and_then_of_the_log(
    nats_url: str, app_name: str, tmp_path: Path, first: str
) -> None:
    copy, live = tmp_path / "restored" / "projections.db", tmp_path / "projections.db"
    copy.parent.mkdir()
    async with running(app_name, tmp_path, nats_url) as here:

        async def work() -> None:
            await here.client.query("select 1", after=await here.note(30))
            await here.service.parts.anchor.move()

        await work()
        if first == "log":
            snapshot = await take_snapshot(nats_url, app_name)
            await work()
        with closing(sqlite3.connect(live)) as database:
            database.execute("VACUUM INTO ?", (str(copy),))
        if first == "database":
            await work()
            snapshot = await take_snapshot(nats_url, app_name)
        acknowledged = dict(here.acknowledged)
    async with server(tmp_path) as other:
        await restore_snapshot(other.url, snapshot)
        if first == "log":
            advises(await refused(app_name, copy.parent, other.url))
            return
        async with running(app_name, copy.parent, other.url) as here:
            here.acknowledged = acknowledged
            await here.check()


# another log


async def test_another_log_of_the_same_name_is_refused(app_name: str, tmp_path: Path) -> None:
    """It has more commits, the same partitions, and in the end the same creation time."""
    async with server(tmp_path) as nats:
        await filled(app_name, tmp_path, nats.url)
        async with api(nats.url) as call:
            await call(f"STREAM.DELETE.{app_name}")
        (tmp_path / "other").mkdir()
        await filled(app_name, tmp_path / "other", nats.url, 30)
        message = await refused(app_name, tmp_path, nats.url)
        assert "is another one" in message
        advises(message)
        change(tmp_path / "projections.db", created=known(tmp_path / "other" / "projections.db", app_name).created)
        assert "is another one" in await refused(app_name, tmp_path, nats.url)


async def test_a_log_restored_from_an_older_backup_that_went_on_is_refused(app_name: str, tmp_path: Path) -> None:
    """Its last commits have the sequences of commits that were projected and are lost."""
    async with server(tmp_path) as nats:
        await filled(app_name, tmp_path, nats.url)
        older = await nats.back_up()
        await filled(app_name, tmp_path, nats.url, 30)
        await nats.restore(older)
        (tmp_path / "other").mkdir()
        await filled(app_name, tmp_path / "other", nats.url, 50)
        message = await refused(app_name, tmp_path, nats.url)
        assert "has gone on" in message
        advises(message)


# false alarms: the log is asked again before it is called truncated


def lie(monkeypatch: pytest.MonkeyPatch, *answers: int) -> list[int]:
    """Let the log say once, in its answers of these numbers, that it ends at 1, as a new leader may at first.

    Returns a list of all answers, which grows.
    """
    honest = JetStreamLog.info
    given: list[int] = []

    async def info(log: JetStreamLog) -> StreamInfo:
        found = await honest(log)
        given.append(1 if len(given) in answers else found.last)
        return found._replace(last=given[-1])

    monkeypatch.setattr(JetStreamLog, "info", info)
    return given


async def test_a_log_that_seems_truncated_for_a_moment_stops_nothing(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(app_name, tmp_path, nats_url) as here:
        await here.note(20)
        given = lie(monkeypatch, 0)
        await here.service.parts.log.verify()
        assert given[0] == 1 < given[1]
        await here.check()


async def test_a_log_that_seems_truncated_for_a_moment_at_a_start_is_asked_again(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(app_name, tmp_path, nats_url)
    async with log_and_database(nats_url, app_name, tmp_path) as (log, engine):
        given = lie(monkeypatch, 0)
        await assembly.recognise(log, engine, app_name)
        assert given[0] == 1 < given[1]


async def test_what_other_workers_fold_during_a_start_is_no_truncation(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log and checkpoints grow together, so the checkpoints are read before the log's end."""
    await filled(app_name, tmp_path, nats_url)
    honest, asked = JetStreamLog.info, 0
    async with log_and_database(nats_url, app_name, tmp_path) as (log, engine):

        async def info(log: JetStreamLog) -> StreamInfo:
            nonlocal asked
            found = await honest(log)
            asked += 1
            with engine.begin() as writing:
                writing.exec_driver_sql("UPDATE eskernel_checkpoint SET sequence = sequence + 5")
            return found

        monkeypatch.setattr(JetStreamLog, "info", info)
        await assembly.recognise(log, engine, app_name)
    assert asked == 1


async def test_a_log_that_stays_truncated_stops_the_service_with_advice_that_loses_nothing(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(app_name, tmp_path, nats_url) as here:
        await here.note(20)
        lie(monkeypatch, *range(1_000))
        with pytest.raises(Replaced):
            await here.service.parts.log.verify()
        await stopped(here, "truncated")
        advises(here.service.failure)
        monkeypatch.undo()
