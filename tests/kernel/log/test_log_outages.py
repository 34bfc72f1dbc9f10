"""A log whose connection or server fails: what was acknowledged stays, and what was asked for settles."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from kernel.errors import Conflict, LogError, Unavailable
from kernel.log import JetStreamLog, Stored, find_log
from kernel.log.base import LogReader
from kernel.runtime.nats_server import EmbeddedServer
from kernel.transport.connection import NatsConnection
from kernel.transport.dial import connect
from tests.conftest import open_log
from tests.kernel.log.logs import PARTITIONS, fill, subject_of


class Proxy:
    """A fixed address in front of a server that may be replaced; it can lose bytes and cut connections."""

    def __init__(self) -> None:
        self.target = ""
        self.lose_answers = self.lose_requests = False
        self.latency = 0.0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._connected(reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._server = await asyncio.start_server(connected, "127.0.0.1", 0)
        return f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self.target.removeprefix("nats://").split(":")
        try:
            behind, before = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.close()
            return
        self._writers |= {writer, before}
        await asyncio.gather(
            self._pass(reader, before, lambda: self.lose_requests),
            self._pass(behind, writer, lambda: self.lose_answers),
        )

    async def _pass(self, source: asyncio.StreamReader, to: asyncio.StreamWriter, lost: Callable[[], bool]) -> None:
        try:
            while data := await source.read(65_536):
                await asyncio.sleep(self.latency)
                if not lost():
                    to.write(data)
                    await to.drain()
        except OSError:
            pass
        finally:
            to.close()

    def cut(self) -> None:
        """Cut every connection; new connections pass everything again."""
        self.lose_answers = self.lose_requests = False
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def stop(self) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    made = Proxy()
    yield made
    await made.stop()


@pytest.fixture(params=["auto", "always"])
async def proxied(
    request: pytest.FixtureRequest, proxy: Proxy, nats_url: str, app_name: str
) -> AsyncIterator[JetStreamLog]:
    """A log whose connection goes through the proxy."""
    proxy.target = nats_url
    connection = await connect(await proxy.start(), name="proxied")
    opened = await open_log(connection, app_name, partitions=PARTITIONS, group_commit=request.param)
    yield opened
    await opened.close()
    await connection.close()


async def test_appends_whose_answers_are_lost_settle_as_what_they_became(
    proxied: JetStreamLog, proxy: Proxy, connection: NatsConnection, wait_until: Callable[..., Any]
) -> None:
    beside = await find_log(connection, proxied.stream)
    await proxied.append(subject_of(proxied, "taken"), 0, b"taken")
    proxy.lose_answers = True
    futures = [proxied.append(subject_of(proxied, str(n)), 0, b"%d" % n) for n in range(10)]

    async def arrived() -> bool:
        return (await beside.info()).commits == 11

    await wait_until(arrived)
    assert not any(future.done() for future in futures)
    proxy.cut()
    sequences = await asyncio.gather(*futures)
    for number, sequence in enumerate(sequences):
        subject = subject_of(proxied, str(number))
        assert await beside.read_subject(subject) == [Stored(sequence, subject, b"%d" % number)]
    assert (await beside.info()).commits == 11
    await beside.close()


async def test_appends_that_got_lost_on_the_way_are_sent_again(
    proxied: JetStreamLog, proxy: Proxy, connection: NatsConnection, wait_until: Callable[..., Any]
) -> None:
    beside = await find_log(connection, proxied.stream)
    proxy.lose_requests = True
    futures = [proxied.append(subject_of(proxied, str(n)), 0, b"%d" % n) for n in range(10)]
    await wait_until(lambda: proxied.appender.pressure[1] > 0)
    overtaken = await beside.append(subject_of(proxied, "3"), 0, b"overtaken")
    proxy.cut()
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    assert [n for n, outcome in enumerate(outcomes) if not isinstance(outcome, int)] == [3]
    assert isinstance(outcomes[3], Conflict)
    assert outcomes[3].actual == overtaken
    for number in set(range(10)) - {3}:
        subject = subject_of(proxied, str(number))
        assert await beside.read_subject(subject) == [Stored(outcomes[number], subject, b"%d" % number)]
    assert (await beside.info()).commits == 10
    await beside.close()


@pytest.fixture(params=["nats_url", "old_nats_url"])
def server_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(request.param)
    return url


async def test_a_slow_connection_does_not_shorten_a_history(proxy: Proxy, app_name: str, server_url: str) -> None:
    proxy.target = server_url
    connection = await connect(await proxy.start(), name="slow")
    log = await open_log(connection, app_name, partitions=PARTITIONS)
    made = await fill(log, 5, ids=1)
    proxy.latency = 0.35
    assert await log.read_subject(subject_of(log, "0")) == made
    assert await log.read_subject(subject_of(log, "0"), made[-1].sequence) == []
    proxy.latency = 0
    await log.close()
    await connection.close()


async def test_a_reader_goes_on_after_a_lost_connection(
    proxied: JetStreamLog, proxy: Proxy, connection: NatsConnection
) -> None:
    beside = await find_log(connection, proxied.stream)
    made = await fill(beside, 100)
    reader = await proxied.read(0)
    found = (await reader.next(30, timeout=20)).commits
    for outage in range(2):
        proxy.cut()
        made.append(
            Stored(
                await beside.append(subject_of(beside, f"r{outage}"), 0, b"r"), subject_of(beside, f"r{outage}"), b"r"
            )
        )
        found += await drain_patiently(reader, 60 + 20 * outage - len(found), limit=20)
    found += await drain_patiently(reader, 102 - len(found))
    assert found == made
    await reader.close()
    await beside.close()


async def drain_patiently(reader: LogReader, count: int, limit: int = 1000) -> list[Stored]:
    """Read as the kernel does: where a read fails, try again."""
    found: list[Stored] = []
    async with asyncio.timeout(30):
        while len(found) < count:
            try:
                found += (await reader.next(min(limit, count - len(found)), timeout=1)).commits
            except Unavailable:
                await asyncio.sleep(0.05)
    return found


@pytest.mark.parametrize("group_commit", ["auto", "always"])
async def test_acknowledged_appends_survive_the_death_of_the_server(
    tmp_path: Path, proxy: Proxy, app_name: str, group_commit: Any
) -> None:
    server = EmbeddedServer(tmp_path / "nats")
    proxy.target = await server.start()
    connection = await connect(await proxy.start(), name="survivor")
    log = await open_log(connection, app_name, partitions=PARTITIONS, group_commit=group_commit)
    made = await fill(log, 200, ids=20)
    appends = [log.append(subject_of(log, f"flight-{n}"), 0, b"flight %d" % n) for n in range(50)]
    in_flight = [asyncio.ensure_future(append) for append in appends]
    await asyncio.wait(in_flight, timeout=0.001)
    os.kill(server.pid, signal.SIGKILL)
    outage = [log.append(subject_of(log, f"outage-{n}"), 0, b"outage %d" % n) for n in range(20)]
    stale = log.append(subject_of(log, "0"), 0, b"stale")
    restarted = EmbeddedServer(tmp_path / "nats")
    proxy.target = await restarted.start()
    try:
        outcomes = await asyncio.gather(*in_flight, *outage, return_exceptions=True)
        with pytest.raises(Conflict):
            await stale
        reader = await log.read(0)
        stored = await drain_patiently(reader, (await log.info()).commits)
        assert stored[:200] == made
        names = [f"flight-{n}" for n in range(50)] + [f"outage-{n}" for n in range(20)]
        for name, outcome in zip(names, outcomes, strict=True):
            own = [commit for commit in stored if commit.subject == subject_of(log, name)]
            assert len(own) <= 1
            if isinstance(outcome, int):
                assert [commit.sequence for commit in own] == [outcome]
            else:
                assert isinstance(outcome, LogError)
    finally:
        await log.close()
        await connection.close()
        await restarted.stop()
