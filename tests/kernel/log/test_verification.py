"""After a reconnect the log is compared with what it was, before anything is appended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from kernel.errors import StreamMismatch
from kernel.log import find_log, open_log
from kernel.log.reader import JetStreamReader
from kernel.partitions.leases import Leases
from kernel.settings import Settings
from kernel.settings.sources import settings_of
from kernel.transport.connection import NatsConnection
from kernel.transport.dial import connect
from kernel.transport.jetstream_api import call_api

Wait = Callable[..., Coroutine[Any, Any, Any]]


@pytest.fixture
async def connection(nats_url: str) -> AsyncIterator[NatsConnection]:
    connection = await connect(nats_url, name="test")
    yield connection
    await connection.close()


async def reconnect(connection: NatsConnection) -> None:
    back = asyncio.Event()
    connection.reconnections.append(back.set)
    await connection.force_reconnect()
    async with asyncio.timeout(10):
        await back.wait()
    connection.reconnections.remove(back.set)


async def test_appends_go_on_when_the_verification_has_failed_in_ways_that_nobody_expects(
    connection: NatsConnection, app_name: str, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
) -> None:
    log = await open_log(connection, app_name, on_replaced=lambda _why: None)
    address = log.subjects.address("Account", "a")
    first = await log.append(address.subject, 0, b"[1]")
    info, failures = log.info, [KeyError("state"), StreamMismatch("not now"), ValueError("no JSON")]

    async def fail() -> Any:
        if failures:
            raise failures.pop()
        return await info()

    monkeypatch.setattr(log, "info", fail)
    await reconnect(connection)
    assert not log.appender.is_open
    async with asyncio.timeout(10):
        assert await log.append(address.subject, first, b"[2]") == first + 1
    assert not failures
    # and a later reconnect is verified again
    failures.append(KeyError("state"))
    await reconnect(connection)
    async with asyncio.timeout(10):
        assert await log.append(address.subject, first + 1, b"[3]") == first + 2
    assert not failures
    await log.close()


async def test_a_stream_that_was_replaced_takes_no_append_and_its_owner_is_called_with_the_reason(
    connection: NatsConnection, app_name: str, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
) -> None:
    reasons: list[str] = []
    log = await open_log(connection, app_name, on_replaced=reasons.append)
    address = log.subjects.address("Account", "a")
    await log.append(address.subject, 0, b"[1]")
    monkeypatch.setattr(log, "created", "2001-01-01T00:00:00Z")
    await reconnect(connection)
    await wait_until(lambda: reasons)
    assert "the one at start at 2001-01-01" in reasons[0]
    assert not log.appender.is_open
    await log.close()


async def test_a_log_that_was_only_found_is_not_verified(
    connection: NatsConnection, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client reads and never appends: after a reconnect it has nothing to ask."""
    made = await open_log(connection, app_name, Settings())
    found = await find_log(connection, app_name)
    calls: list[str] = []
    request = connection.request

    async def counted(subject: str, *given: Any, **options: Any) -> Any:
        calls.append(subject)
        return await request(subject, *given, **options)

    monkeypatch.setattr(connection, "request", counted)
    await reconnect(connection)
    assert await found.append(found.subjects.address("Account", "a").subject, 0, b"[1]") == 1
    assert calls == []
    await found.close()
    await made.close()


async def test_leases_whose_give_back_fails_leave_nothing_running(
    connection: NatsConnection, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await call_api(connection, "INFO", None)  # the first request makes the connection's own subscription
    tasks = asyncio.all_tasks()
    leases = Leases(connection, app_name, "worker-1", 4, ttl=2.0)
    await leases.start()
    await leases.join()

    async def hang(*_given: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(leases, "release", hang)
    callbacks = len(connection.reconnections)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await leases.close()
    await leases.close()
    assert len(connection.reconnections) == callbacks - 2
    async with asyncio.timeout(10):
        while left := asyncio.all_tasks() - tasks:
            await asyncio.wait(left, timeout=0.1)


async def test_a_request_of_a_task_that_is_being_cancelled_is_answered(connection: NatsConnection) -> None:
    """A stop that Ctrl-C has begun still gives the leases back: the cancellation came long before the request."""
    waiting = asyncio.Event()

    async def stop_late() -> Any:
        try:
            waiting.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return await call_api(connection, "INFO", None)

    stopping = asyncio.create_task(stop_late())
    await waiting.wait()
    stopping.cancel()
    assert "limits" in await stopping


async def test_a_consumer_that_the_server_ends_at_once_is_replaced_less_and_less_often(
    connection: NatsConnection, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await open_log(connection, app_name)
    address = log.subjects.address("Account", "a")
    await log.append(address.subject, 0, b"[1]")
    pull = JetStreamReader._pull

    def end(self: JetStreamReader) -> None:
        status = b"NATS/1.0 409 Consumer Deleted\r\n\r\n"
        asyncio.get_running_loop().call_later(0.001, self._receive, b"", b"", b"", status)

    monkeypatch.setattr(JetStreamReader, "_pull", end)
    reader = await log.read(0)
    assert (await reader.next(10, timeout=1.0)).commits == []
    assert 3 < log.consumers < 12
    assert await log.explain_silence() == "the server ends the consumer: 409 Consumer Deleted"
    monkeypatch.setattr(JetStreamReader, "_pull", pull)
    assert [commit.payload for commit in (await reader.next(10, timeout=10)).commits] == [b"[1]"]
    assert await log.explain_silence() == ""
    await reader.close()
    await log.close()


async def test_a_reader_asks_for_no_more_bytes_than_it_can_hold(
    connection: NatsConnection, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that end at their bytes are followed by others: the consumer stays, and nothing is read twice."""
    monkeypatch.setattr("kernel.log.reader.PULL_BYTES", 100_000)
    log = await open_log(connection, app_name, settings_of({"consumer.window": 7}))
    for number in range(50):
        address = log.subjects.address("Account", f"a{number}")
        # at first a request ends with its messages, and then with its bytes
        await log.append(address.subject, 0, b'["' + b"x" * (100 if number < 25 else 30_000) + b'"]')
    reader = await log.read(0)
    found: list[int] = []
    largest = 0
    async with asyncio.timeout(30):
        while len(found) < 50:
            batch = await reader.next(1_000)
            found += [commit.sequence for commit in batch.commits]
            largest = max(largest, sum(len(commit.payload) for commit in batch.commits))
    await reader.close()
    assert found == list(range(1, 51))
    assert largest < 300_000
    assert log.consumers == 1
