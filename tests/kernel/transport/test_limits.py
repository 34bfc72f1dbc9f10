"""What is larger than the server takes is refused to its sender; the connection and its neighbours go on."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nats
import pytest

from kernel import Client, Service
from kernel.errors import CommandError, PayloadTooLarge, StreamMismatch
from kernel.log.repeats import Repeats
from kernel.transport.connection import NatsConnection, publish_frame
from kernel.transport.dial import connect
from kernel.transport.jetstream_api import call_api
from kernel.transport.survey import survey
from tests.apps import Note, Notebook, NoteTwice, notebooks
from tests.conftest import open_log, settings_for
from tests.servers import Server, password_config, server

Wait = Callable[..., Coroutine[Any, Any, Any]]
SMALL = "max_payload: 16384\n"
ACCOUNT = (
    "accounts { LIMITED { jetstream: enabled, limits { max_payload: 6000 }, users: [{ user: me, password: right }] } }"
)


@asynccontextmanager
async def serving(app_name: str, tmp_path: Path, url: str) -> AsyncIterator[tuple[Service, Client]]:
    service = Service(notebooks(app_name), settings_for(tmp_path / "data", nats=url))
    await service.start()
    async with await Client.connect(service.app, nats=url, database=service.database_url) as client:
        yield service, client
    await service.stop()


def reload(nats_server: Server, old: str, new: str) -> None:
    """Change the configuration of a running server."""
    file = nats_server.directory / "nats.conf"
    file.write_text(file.read_text().replace(old, new))
    nats_server.config = nats_server.config.replace(old, new)
    assert nats_server.process is not None
    nats_server.process.send_signal(signal.SIGHUP)


@asynccontextmanager
async def neighbours(client: Client, wait_until: Wait) -> AsyncIterator[None]:
    """Small commands, one after the other, beside what the block does, and a few more behind it; none may fail."""
    sent = 0

    async def send() -> None:
        nonlocal sent
        while True:
            await client.execute(Notebook, f"n{sent % 7}", Note("y"), timeout=5)
            sent += 1

    sending = asyncio.create_task(send())
    await wait_until(lambda: sent > 3 or sending.done())
    yield
    before = sent
    await wait_until(lambda: sent > before + 3 or sending.done())
    assert not sending.done(), sending.exception()
    sending.cancel()


async def test_a_command_too_large_for_the_server_is_refused_before_it_is_sent(
    app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    async with server(tmp_path / "nats", SMALL) as small, serving(app_name, tmp_path, small.url) as (service, client):
        async with neighbours(client, wait_until):
            with pytest.raises(
                CommandError, match=r"too-large: the request Note has \d+ bytes; the server takes 16384"
            ):
                await client.execute(Notebook, "big", Note("x" * 20_000))
        assert client.connection.stats["reconnects"] == 0
        assert service.parts.connection.stats["reconnects"] == 0


async def test_a_limit_that_was_lowered_while_connected_costs_one_reconnect_and_is_kept_from_then_on(
    app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    async with server(tmp_path / "nats", SMALL) as small, serving(app_name, tmp_path, small.url) as (service, client):
        async with neighbours(client, wait_until):
            await client.execute(Notebook, "big", Note("x" * 12_000))
            reload(small, "16384", "4096")
            for _ in range(3):
                with pytest.raises(CommandError, match=r"too-large: .* 12\d+ bytes; the server takes"):
                    while True:  # until the server has read its configuration
                        await client.execute(Notebook, "big", Note("x" * 12_000))
        assert client.connection.stats["reconnects"] <= 1
        # what the service itself appends and answers
        with pytest.raises(CommandError, match="too-large"):
            await client.execute(Notebook, "twice", NoteTwice("x" * 3_000))
        await client.execute(Notebook, "twice", NoteTwice("x"))
        assert service.parts.connection.stats["reconnects"] <= 1
        assert not service.failure


async def test_a_limit_of_the_account_that_no_server_announces_is_found_out(
    app_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with server(tmp_path / "nats", ACCOUNT) as limited:
        url = limited.url.replace("//", "//me:right@")
        async with serving(app_name, tmp_path, url) as (service, client):
            with pytest.raises(
                CommandError, match=r"too-large: the request Note has \d+ bytes; the server takes 5\d\d\d"
            ):
                await client.execute(Notebook, "big", Note("x" * 500_000))
            assert client.connection.stats["reconnects"] == 1
            with pytest.raises(CommandError, match="too-large"):
                await client.execute(Notebook, "twice", NoteTwice("x" * 4_000))
            # in flight when the connection was lost: not stored, and not sent again
            await client.execute(Notebook, "twice", NoteTwice("x"))
            assert service.parts.connection.stats["reconnects"] <= 1
            assert service.health.components["appends"].ok
        assert any("the limit of an account or a user" in record.getMessage() for record in caplog.records)


async def test_a_subject_too_long_for_the_server_is_refused_to_its_sender_and_not_sent_again(
    app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    async with server(tmp_path / "nats", "max_control_line: 256\n") as short:
        async with serving(app_name, tmp_path, short.url) as (service, client):
            async with neighbours(client, wait_until):
                for _ in range(3):
                    with pytest.raises(CommandError, match=r"too-large: .* a subject of \d+ bytes"):
                        await client.execute(Notebook, "x" * 200, Note("y"))
            # a second command may be under way before the limit is measured
            assert service.parts.connection.stats["reconnects"] in (1, 2)
            assert not service.failure


async def test_raw_requests_of_any_size_leave_the_service_connected_and_are_answered(
    app_name: str, tmp_path: Path
) -> None:
    async with (
        server(tmp_path / "nats", "max_payload: 1024\n") as tiny,
        serving(app_name, tmp_path, tiny.url) as (
            service,
            client,
        ),
    ):
        raw = await nats.connect(tiny.url)

        async def ask(**body: Any) -> dict[str, Any]:
            found: dict[str, Any] = json.loads((await raw.request(f"{app_name}.cmd", json.dumps(body).encode())).data)
            return found

        # an error that repeats what was sent, with every character escaped
        answer = await ask(aggregate="Notebook", id="a", command="\x7f\x01" * 60, data={})
        assert answer["error"]["type"] == "unknown-command"
        rejected = await ask(aggregate="Notebook", id="\x01" * 130, command="Note", data={"text": "a"})
        assert rejected["error"]["type"] == "invalid-id"
        answer = await ask(aggregate="Notebook", id="a", command="Note", data={"text": "a"}, command_id='"' * 90)
        assert answer["ok"]["version"] == 1
        # the events do not fit beside their headers
        answer = await ask(aggregate="Notebook", id="a", command="Note", data={"text": "x" * 800})
        assert answer["error"]["type"] == "too-large"
        assert "bytes; the server takes 512" in answer["error"]["message"]
        assert (await client.execute(Notebook, "a", Note("y"))).version == 2
        assert service.parts.connection.stats["reconnects"] == 0
        await raw.close()


async def test_a_reply_subject_as_long_as_the_server_takes_does_not_cost_the_connection(
    app_name: str, tmp_path: Path, nats_url: str
) -> None:
    async with serving(app_name, tmp_path, nats_url) as (service, client):
        raw = await nats.connect(nats_url)
        body = json.dumps({"aggregate": "Notebook", "id": "a", "command": "Note", "data": {"text": "z"}}).encode()
        subject = f"{app_name}.cmd"
        # passed on to its partition, whose subject is longer
        for length in range(4096 - len(subject) - 12, 4096 - len(subject) - 6):
            await raw._send_command(publish_frame(subject.encode(), body, reply=b"r" * length))
            await raw.flush()
        await client.execute(Notebook, "a", Note("y"))
        assert service.parts.connection.stats["reconnects"] == 0
        await raw.close()


async def test_a_status_that_is_larger_than_the_server_takes_is_shortened(app_name: str, tmp_path: Path) -> None:
    async with server(tmp_path / "nats", "max_payload: 4000\n") as small:
        async with serving(app_name, tmp_path, small.url) as (service, client):
            assert len(json.dumps(service.status())) > 4_000
            answers, silent = await survey(client.connection, f"{app_name}.svc.status")
            assert [answer["worker"] for answer in answers] == [service.worker]
            assert not silent
            assert service.parts.connection.stats["reconnects"] == 0


async def test_requests_to_workers_and_to_the_api_are_refused_with_both_sizes(tmp_path: Path) -> None:
    async with server(tmp_path, SMALL) as small:
        connection = await connect(small.url, name="test")
        with pytest.raises(PayloadTooLarge, match="20000 bytes; the server takes 16384"):
            await survey(connection, "app.svc.limits", b"x" * 20_000)
        with pytest.raises(PayloadTooLarge, match="bytes; the server takes 16384"):
            await call_api(connection, "STREAM.CREATE.x", {"description": "x" * 20_000})
        await connection.close()


async def test_a_server_that_takes_only_the_smallest_messages_is_refused_at_start(
    app_name: str, tmp_path: Path
) -> None:
    async with server(tmp_path, "max_payload: 512\n") as tiny:
        connection = await connect(tiny.url, name="test")
        with pytest.raises(StreamMismatch, match="set its max_payload to 1024 or more"):
            await open_log(connection, app_name)
        await connection.close()


@pytest.mark.parametrize("grouping", ["never", "always"])
async def test_commits_in_flight_when_the_limit_sinks_fail_alone(app_name: str, tmp_path: Path, grouping: str) -> None:
    async with server(tmp_path, SMALL) as small:
        connection = await connect(small.url, name="test")
        log = await open_log(connection, app_name, partitions=8, group_commit=grouping, jetstream__publish_timeout=1)
        subjects = [log.subjects.address("Notebook", f"n{number}").subject for number in range(20)]
        reload(small, "16384", "2048")
        first = log.append(subjects[0], 0, b"x" * 9_000)
        with pytest.raises(PayloadTooLarge):
            sequence = await first  # the server has not read its configuration yet
            while True:
                sequence = await log.append(subjects[0], sequence, b"%d" % sequence + b"x" * 9_000)
        payloads = [b"%d" % number + b"x" * (9_000 if number == 7 else 100) for number in range(1, 20)]
        ends = await asyncio.gather(
            *(log.append(subject, 0, payload) for subject, payload in zip(subjects[1:], payloads, strict=True)),
            return_exceptions=True,
        )
        assert [number for number, end in enumerate(ends, 1) if isinstance(end, Exception)] == [7]
        assert isinstance(ends[6], PayloadTooLarge)
        assert connection.stats["reconnects"] == 1
        await log.close()
        await connection.close()


async def test_what_waits_to_be_sent_is_compared_with_the_limits_of_the_next_server(tmp_path: Path) -> None:
    connection = NatsConnection()
    connection._max_payload = 100
    small, large = publish_frame(b"a", b"PUB b 5\r\n"), publish_frame(b"b", b"x" * 200, reply=b"c")
    headed = publish_frame(b"h", b"x" * 95, headers=b"NATS/1.0\r\n\r\n")
    connection._pending = [b"PING\r\n", small + large + small, b"SUB d  1\r\n", large, headed]
    connection._drop_oversized()
    assert connection._pending == [b"PING\r\n", small + small, b"SUB d  1\r\n"]
    assert connection._pending_data_size == sum(map(len, connection._pending))


async def test_commands_queued_while_disconnected_are_not_replayed_to_a_server_that_takes_less(
    app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    async with server(tmp_path / "nats", SMALL) as small, serving(app_name, tmp_path, small.url) as (_, client):
        await client.execute(Notebook, "a", Note("x"))
        await small.kill()
        await wait_until(lambda: not client.connection.is_connected)
        large = asyncio.create_task(client.execute(Notebook, "big", Note("x" * 12_000), timeout=30))
        little = asyncio.create_task(client.execute(Notebook, "a", Note("y"), timeout=30))
        await wait_until(lambda: client.connection._pending_data_size > 12_000)
        small.config = "max_payload: 4096\n"
        await small.start()
        with pytest.raises(CommandError, match="too-large"):
            await large
        assert (await little).version == 2
        assert client.connection.stats["reconnects"] == 1


DENIED = '{ publish: { deny: ["*.evt.*.Notebook.Denied", "*.cmd.7"] } }'


async def test_a_subject_that_the_user_may_not_publish_to_is_refused_at_once_and_the_others_go_on(
    app_name: str, tmp_path: Path
) -> None:
    async with server(tmp_path / "nats", password_config("me", "right", DENIED)) as guarded:
        url = guarded.url.replace("//", "//me:right@")
        async with serving(app_name, tmp_path, url) as (service, client):
            with pytest.raises(
                CommandError, match=r"unavailable: .* may not publish to .*\.evt\.\d+\.Notebook\.Denied"
            ):
                await client.execute(Notebook, "Denied", Note("x"), timeout=1)
            assert (await client.execute(Notebook, "denied", Note("x"))).version == 1
            subjects = client.log.subjects
            ids = (f"n{number}" for number in range(1_000))
            seventh = next(name for name in ids if subjects.partition("Notebook", name) == 7)
            async with asyncio.timeout(2):
                with pytest.raises(CommandError, match=r"may not publish to .*\.cmd\.7"):
                    await client.execute(Notebook, seventh, Note("x"), timeout=15)
            assert service.parts.connection.stats["reconnects"] == 0
            assert service.parts.log.appender.read_backs == 0


# the same line again and again


def test_a_line_that_comes_back_is_written_once_in_a_while_with_a_count() -> None:
    now = 0.0
    repeats = Repeats(10, lambda: now)
    assert repeats.due("full") == ""
    assert repeats.due("other") == ""
    for _ in range(5):
        now += 1
        assert repeats.due("full") is None
    now += 10
    assert repeats.due("full") == " (5 times more in the last 15 s)"
