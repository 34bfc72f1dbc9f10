"""A stream that is full, deleted, recreated or restored from an older backup; and the checks at a start.

Where going on would corrupt data, the service stops, or does not start, and says why.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from pathlib import Path
from typing import Any

import pytest

from kernel import Client, Service
from kernel.errors import CommandError, LogError, StreamMismatch
from kernel.log import find_log
from kernel.transport.dial import connect
from projections.database import open_database
from tests.apps import Note, Notebook, notebooks
from tests.conftest import settings_for
from tests.failing import (
    Process,
    api,
    change_stream,
    fill,
    filled,
    free_port,
    metric,
    refused,
    running,
    server,
    small_disk,
    stopped,
    warned,
)

Caplog = pytest.LogCaptureFixture


# full


@pytest.mark.parametrize("limit", ["stream", "server"])
async def test_a_full_log_refuses_commands_with_a_reason_until_there_is_room(
    app_name: str, tmp_path: Path, limit: str
) -> None:
    async with server(tmp_path, jetstream="max_file_store: 1MB") as nats, running(app_name, tmp_path, nats.url) as here:
        await here.note(20)
        failed = metric("eskernel_appends_total", outcome="failed")
        if limit == "stream":
            await change_stream(nats.url, app_name, max_bytes=10_000)
        big = Note("b" * 50_000)
        with pytest.raises(CommandError) as refusal:
            for n in range(30):
                await here.client.execute(Notebook, f"big{n}", big, timeout=1.5)
                here.acknowledged[f"big{n}"] = 1
        assert refusal.value.type == "unavailable"
        assert "full" in refusal.value.message
        appends = await here.component("appends")
        assert not appends["ok"]
        assert "full" in appends["detail"]
        assert metric("eskernel_appends_total", outcome="failed") > failed
        if limit == "stream":
            await change_stream(nats.url, app_name, max_bytes=-1)
        else:
            nats.jetstream = "max_file_store: 100MB"
            await nats.restart()
        await here.check()
        assert (await here.component("appends"))["ok"]


async def test_a_log_server_whose_disk_is_full_is_shown(app_name: str, tmp_path: Path, caplog: Caplog) -> None:
    """The server answers everything except appends, and must be restarted when there is room again."""
    with small_disk(tmp_path / "nats" / "store", 8) as (inside, seen):
        async with (
            server(tmp_path, prefix=inside) as nats,
            running(app_name, tmp_path, nats.url) as here,
        ):
            await here.note(20)
            here.service.parts.log.appender._timeout = 1.0
            fill(seen / "filler")
            with pytest.raises((CommandError, TimeoutError)):
                await here.client.execute(Notebook, "big", Note("b" * 100_000), command_id="big", timeout=2.5)
            appends = await here.component("appends")
            (seen / "filler").unlink()
            await nats.restart()
            await here.note(20)
            # it was refused, or is still being appended: sent again, it takes effect once
            await here.client.execute(Notebook, "big", Note("b" * 100_000), command_id="big")
            here.acknowledged["big"] = 1
            await here.check()
            assert not appends["ok"]
            assert "no acknowledgement" in appends["detail"]


async def test_failures_and_recoveries_are_logged_and_counted(
    nats_url: str, app_name: str, tmp_path: Path, caplog: Caplog
) -> None:
    async with running(app_name, tmp_path, nats_url) as here:
        await here.note(20)
        await change_stream(nats_url, app_name, max_bytes=1_000)
        with pytest.raises(CommandError):
            await here.client.execute(Notebook, "n0", Note("a"), timeout=0.1)
        assert not (await here.component("appends"))["ok"]
        assert warned(caplog, "appends", "full")
        assert metric("eskernel_component_ok", component="appends") == 0
        await change_stream(nats_url, app_name, max_bytes=-1)
        await here.check()
        assert (await here.component("appends"))["ok"]
        assert metric("eskernel_component_ok", component="appends") == 1


# deleted, recreated, restored: while the service runs


async def test_a_stream_that_is_deleted_stops_the_service(
    nats_url: str, app_name: str, tmp_path: Path, caplog: Caplog
) -> None:
    # the readers notice it: no check of the log is due
    async with running(app_name, tmp_path, nats_url, connection__health_check_interval=60.0) as here:
        await here.note(20)
        async with api(nats_url) as call:
            await call(f"STREAM.DELETE.{app_name}")
        await stopped(here, app_name, "gone")
        assert warned(caplog, "stopping", "gone")


async def test_a_recreated_stream_stops_the_service(nats_url: str, app_name: str, tmp_path: Path) -> None:
    async with running(app_name, tmp_path, nats_url) as here:
        await here.note(20)
        async with api(nats_url) as call:
            config = (await call(f"STREAM.INFO.{app_name}"))["config"]
            await call(f"STREAM.DELETE.{app_name}")
            await call(f"STREAM.CREATE.{app_name}", config)
        await stopped(here, "created")


async def test_a_stream_restored_from_an_older_backup_stops_the_service_before_it_acknowledges_anything(
    app_name: str, tmp_path: Path
) -> None:
    async with server(tmp_path) as nats:
        async with running(app_name, tmp_path, nats.url) as here:
            await here.client.query("select 1", after=await here.note(20))
            stored = (await here.client.log.info()).last
        older = await nats.back_up()
        async with running(app_name, tmp_path, nats.url) as here:
            await here.client.query("select 1", after=await here.note(50))
            await nats.stop()
            nats.put_back(older)
            # this command waits for the server, and would begin an aggregate's history on the older log
            sending = asyncio.create_task(here.client.execute(Notebook, "new", Note("a"), timeout=1.5))
            await nats.start()
            await stopped(here, "older backup")
            with pytest.raises((CommandError, TimeoutError)):
                await sending
            connection = await connect(nats.url, name="checker")
            log = await find_log(connection, app_name)
            assert (await log.info()).last == stored
            await log.close()
            await connection.close()


async def test_the_process_ends_with_the_reason_and_an_exit_code(nats_url: str, app_name: str, tmp_path: Path) -> None:
    process = Process(app_name, tmp_path, nats_url, f"sqlite:///{tmp_path / 'p.db'}")
    await process.start()
    try:
        async with api(nats_url) as call:
            await call(f"STREAM.DELETE.{app_name}")
        assert await process.wait() == 1
        assert "gone" in process.output().splitlines()[-1]
    finally:
        process.close()


# the same, at start


async def test_a_deleted_stream_is_not_recreated_while_a_database_knows_it(
    nats_url: str, app_name: str, tmp_path: Path
) -> None:
    """An empty stream of the same name would prevent restoring the backup."""
    await filled(app_name, tmp_path, nats_url)
    async with api(nats_url) as call:
        await call(f"STREAM.DELETE.{app_name}")
        assert "restore" in await refused(app_name, tmp_path, nats_url)
        with pytest.raises(LogError, match="not found"):
            await call(f"STREAM.INFO.{app_name}")


async def test_a_recreated_stream_is_refused_at_start(nats_url: str, app_name: str, tmp_path: Path) -> None:
    await filled(app_name, tmp_path, nats_url)
    async with api(nats_url) as call:
        config = (await call(f"STREAM.INFO.{app_name}"))["config"]
        await call(f"STREAM.DELETE.{app_name}")
        await call(f"STREAM.CREATE.{app_name}", config)
    assert "created" in await refused(app_name, tmp_path, nats_url)


async def test_a_stream_restored_from_an_older_backup_is_refused_until_the_newer_one_is_back(
    app_name: str, tmp_path: Path
) -> None:
    async with server(tmp_path) as nats:
        await filled(app_name, tmp_path, nats.url)
        older = await nats.back_up()
        acknowledged = await filled(app_name, tmp_path, nats.url, 50)
        newer = await nats.back_up()
        await nats.restore(older)
        assert "restored from an older backup" in await refused(app_name, tmp_path, nats.url)
        await nats.restore(newer)
        async with running(app_name, tmp_path, nats.url) as here:
            here.acknowledged = {name: count + 2 for name, count in acknowledged.items()}
            await here.check()


async def test_a_truncated_store_is_refused(app_name: str, tmp_path: Path) -> None:
    async with server(tmp_path) as nats:
        await filled(app_name, tmp_path, nats.url, 100)
        await nats.stop(signal.SIGKILL)
        (block,) = nats.store.glob(f"**/{app_name}/msgs/1.blk")
        block.write_bytes(block.read_bytes()[: block.stat().st_size // 2])
        (block.parent / "index.db").unlink(missing_ok=True)
        await nats.start()
        assert "truncated" in await refused(app_name, tmp_path, nats.url)


async def test_a_stream_with_another_partition_count_than_the_databases_is_refused(
    nats_url: str, app_name: str, tmp_path: Path
) -> None:
    await filled(app_name, tmp_path, nats_url)
    await change_stream(nats_url, app_name, description="eskernel format=1 partitions=32")
    assert "64 partitions, but the stream has 32" in await refused(app_name, tmp_path, nats_url)


@pytest.mark.parametrize(
    "harm", [{"max_age": 3_600_000_000_000}, {"max_msgs_per_subject": 5}, {"discard": "old", "max_msgs": 100}]
)
async def test_a_stream_that_forgets_events_is_refused(
    nats_url: str, app_name: str, tmp_path: Path, harm: dict[str, Any]
) -> None:
    await filled(app_name, tmp_path, nats_url)
    await change_stream(nats_url, app_name, **harm)
    assert next(iter(harm)) in await refused(app_name, tmp_path, nats_url)


async def test_a_stream_that_begins_to_forget_events_is_shown(
    nats_url: str, app_name: str, tmp_path: Path, caplog: Caplog
) -> None:
    async with running(app_name, tmp_path, nats_url) as here:
        await here.note(20)
        await change_stream(nats_url, app_name, max_age=3_600_000_000_000)
        log = await here.component("log")
        assert not log["ok"]
        assert "max_age" in log["detail"]
        assert warned(caplog, "max_age")
        await change_stream(nats_url, app_name, max_age=0)
        assert (await here.component("log"))["ok"]
        await here.check()


async def test_missing_commits_are_reported_and_hold_up_nothing(app_name: str, tmp_path: Path, caplog: Caplog) -> None:
    """A stream that was repaired by hand has neither its first commits nor its last ones."""
    async with server(tmp_path) as nats:
        await filled(app_name, tmp_path, nats.url)
        async with api(nats.url) as call:
            config = (await call(f"STREAM.INFO.{app_name}"))["config"]
            await call(f"STREAM.DELETE.{app_name}")
            await call(f"STREAM.CREATE.{app_name}", {**config, "first_seq": 501})
        (tmp_path / "projections.db").unlink()
        async with asyncio.timeout(6), running(app_name, tmp_path, nats.url) as here:
            assert warned(caplog, "500", "missing")
            await here.check()


async def test_a_database_of_a_newer_program_is_refused(nats_url: str, app_name: str, tmp_path: Path) -> None:
    await filled(app_name, tmp_path, nats_url)
    engine = open_database(f"sqlite:///{tmp_path / 'projections.db'}")
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE eskernel_schema SET version_num = '9999'")
    engine.dispose()
    message = await refused(app_name, tmp_path, nats_url)
    assert "9999" in message
    assert "newer" in message


async def test_a_server_that_is_too_old_is_refused(app_name: str, tmp_path: Path) -> None:
    """The test needs only the version that the server reports when a client connects."""

    async def old(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = {"server_id": "x", "version": "2.8.4", "max_payload": 1_048_576, "headers": True, "proto": 1}
        writer.write(b"INFO %b\r\n" % json.dumps(info).encode())
        while line := await reader.readline():
            if line.startswith(b"PING"):
                writer.write(b"PONG\r\n")
        writer.close()

    port = free_port()
    listening = await asyncio.start_server(old, "127.0.0.1", port)
    try:
        with pytest.raises(StreamMismatch, match=r"2\.8.*too old.*2\.10"):
            await Service(notebooks(app_name), settings_for(tmp_path / "data", nats=f"nats://127.0.0.1:{port}")).start()
    finally:
        listening.close()


async def test_a_start_logs_the_server_version_and_the_state_of_the_log(
    nats_url: str, app_name: str, tmp_path: Path, caplog: Caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(app_name, tmp_path, nats_url, 20)
    with caplog.at_level(logging.INFO, "eskernel"):
        async with running(app_name, tmp_path, nats_url):
            pass
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("log: ")]
    assert "commits" in line
    assert "64 partitions" in line
    assert "power cut" in line
    connection = await connect(nats_url, name="version")
    assert f"nats-server {connection._server_info['version']}" in line
    await connection.close()


async def test_a_client_of_a_missing_stream_gets_an_error(nats_url: str, app_name: str) -> None:
    with pytest.raises(LogError, match="there is no stream"):
        await Client.connect(notebooks(app_name), nats=nats_url)
