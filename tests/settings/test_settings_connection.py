"""The settings of the connection take effect: servers, attempts, pauses and time-outs."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Server as PoolServer

from kernel import Client
from kernel.errors import CommandTimeout
from kernel.settings import Connection
from kernel.transport.connection import NatsConnection
from kernel.transport.dial import connection_options, dial
from tests.apps import Note, Notebook
from tests.conftest import settings_for
from tests.failing import free_port, running
from tests.faults.proxy import Proxy
from tests.servers import Server, cluster, server

Wait = Callable[..., Any]


@asynccontextmanager
async def dialled(servers: str, **values: Any) -> AsyncIterator[tuple[NatsConnection, list[str]]]:
    """A connection, and the events of its life."""
    events: list[str] = []
    connection = await dial(settings_for(Path(), nats=servers, **values), name="test", on_event=events.append)
    try:
        yield connection, events
    finally:
        await connection.close()


@contextmanager
def mute() -> Any:
    """A port that accepts connections and sends nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield listening.getsockname()[1]


@pytest.mark.setting("connection.servers")
async def test_all_servers_are_tried_and_the_dead_ones_passed_over(tmp_path: Path, binary: str) -> None:
    dead = f"nats://127.0.0.1:{free_port()}"
    async with server(tmp_path, binary=binary) as nats:
        for servers in (f"{dead},{nats.url}", f"{nats.url},{dead}"):
            async with dialled(servers) as (connection, _):
                assert connection.connected_url is not None
                assert connection.connected_url.port == nats.port


@pytest.mark.setting("connection.servers")
async def test_when_a_server_dies_the_next_is_taken(tmp_path: Path, binary: str, wait_until: Wait) -> None:
    a, b = (Server(tmp_path / name, binary=binary) for name in "ab")
    try:
        await asyncio.gather(a.start(), b.start())
        async with dialled(f"{a.url},{b.url}") as (connection, events):
            assert connection.connected_url is not None
            first = connection.connected_url.port
            used, left = (a, b) if first == a.port else (b, a)
            await used.kill()
            await wait_until(lambda: "reconnected" in events)
            assert connection.connected_url.port == left.port
    finally:
        await a.kill()
        await b.kill()


@pytest.mark.setting("connection.servers", "stream.replicas")
async def test_a_service_goes_on_when_a_server_of_its_cluster_dies(
    tmp_path: Path, app_name: str, wait_until: Wait
) -> None:
    async with cluster(tmp_path / "cluster") as members:
        urls = ",".join(member.url for member in members)
        async with running(app_name, tmp_path, urls, client=urls, stream__replicas=3) as service:
            await service.note(20)
            connection = service.service.parts.connection
            assert connection.connected_url is not None
            await next(member for member in members if member.port == connection.connected_url.port).kill()
            await service.note(20, timeout=60)
            await service.check()


@pytest.mark.setting("connection.name")
async def test_the_servers_monitoring_shows_the_name(tmp_path: Path, binary: str, app_name: str) -> None:
    async with server(tmp_path / "nats", binary=binary) as nats:

        async def names() -> set[str]:
            return {connection["name"] for connection in (await nats.monitored("connz"))["connections"]}

        async with running(app_name, tmp_path, nats.url):
            assert f"eskernel {app_name}" in await names()
        async with running(app_name, tmp_path, nats.url, connection__name="billing 7"):
            assert "billing 7" in await names()
            assert f"eskernel {app_name}" not in await names()


@pytest.mark.setting("connection.max_reconnects")
@pytest.mark.parametrize("most", [0, 2])
async def test_a_service_with_limited_reconnects_stops_with_a_reason(tmp_path: Path, app_name: str, most: int) -> None:
    async with server(tmp_path / "nats") as nats:
        values: dict[str, Any] = {"connection__max_reconnects": most, "connection__reconnect_wait": 0.01}
        async with running(app_name, tmp_path, nats.url, **values) as service:
            await nats.kill()
            async with asyncio.timeout(20):
                await service.service.stopped.wait()
            assert "closed for good" in service.service.failure


@pytest.mark.setting("connection.max_reconnects")
async def test_the_set_number_of_attempts_is_made_and_one_more(tmp_path: Path, wait_until: Wait) -> None:
    async with server(tmp_path) as nats:
        values: dict[str, Any] = {"connection__max_reconnects": 3, "connection__reconnect_wait": 0.001}
        async with dialled(nats.url, **values) as (connection, events):
            attempts: list[Any] = []
            connect = connection._connect_to_server

            async def counted(candidate: Any) -> None:
                attempts.append(candidate)
                await connect(candidate)

            connection._connect_to_server = counted  # type: ignore[method-assign]
            await nats.kill()
            await wait_until(lambda: "closed" in events)
            assert len(attempts) == 4


@pytest.mark.setting("connection.max_reconnects")
async def test_without_a_limit_reconnecting_never_ends(tmp_path: Path, wait_until: Wait) -> None:
    async with server(tmp_path) as nats:
        values: dict[str, Any] = {"connection__reconnect_wait": 0.001, "connection__reconnect_max_wait": 0.001}
        async with dialled(nats.url, **values) as (connection, events):
            await nats.kill()
            await wait_until(lambda: len(events) > 200)
            await nats.start()
            await wait_until(lambda: connection.is_connected)
            assert "closed" not in events


@pytest.mark.setting("connection.reconnect_wait", "connection.reconnect_max_wait", "connection.reconnect_jitter", on="")
def test_pauses_are_doubled_up_to_the_longest_and_lengthened_at_random() -> None:
    def pauses(jitter: float, attempts: int) -> list[float]:
        connection = Connection(reconnect_wait=0.5, reconnect_max_wait=3.0, reconnect_jitter=jitter)
        choose = connection_options(connection)["reconnect_to_server_handler"]
        return [choose([PoolServer(uri=None, reconnects=attempts)], {})[1] for _ in range(50)]

    assert [pauses(0.0, n)[0] for n in range(6)] == [0.0, 0.5, 1.0, 2.0, 3.0, 3.0]
    assert pauses(0.0, 10_000)[0] == 3.0
    assert all(1.0 <= pause <= 1.5 for pause in pauses(0.5, 2))
    assert all(0.0 <= pause <= 0.25 for pause in pauses(0.5, 0))
    assert len(set(pauses(0.5, 2))) > 1


@pytest.mark.setting("connection.reconnect_wait", on="")
def test_the_server_that_was_tried_least_is_next() -> None:
    choose = connection_options(Connection())["reconnect_to_server_handler"]
    pool = [PoolServer(uri=None, reconnects=count) for count in (3, 1, 2)]
    assert choose(pool, {})[0] is pool[1]


@pytest.mark.setting("connection.reconnect_wait")
async def test_the_pauses_are_those_between_attempts(tmp_path: Path, wait_until: Wait, monkeypatch: Any) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float, result: Any = None) -> Any:
        slept.append(seconds)
        return await sleep(0 if seconds in (0.7, 1.4, 2.8) else seconds, result)

    async with server(tmp_path) as nats:
        values: dict[str, Any] = {"connection__reconnect_wait": 0.7, "connection__reconnect_jitter": 0.0}
        values["connection__max_reconnects"] = 3
        async with dialled(nats.url, **values) as (_, events):
            monkeypatch.setattr(asyncio, "sleep", noted)
            await nats.kill()
            await wait_until(lambda: "closed" in events)
            assert [seconds for seconds in slept if seconds in (0.7, 1.4, 2.8)] == [0.7, 1.4, 2.8]


@pytest.mark.setting("connection.connect_timeout")
async def test_a_server_that_says_nothing_is_given_up(nats_url: str) -> None:
    with mute() as port:
        async with asyncio.timeout(20):  # the default is this long for each server
            with pytest.raises(ConnectionError, match="can't connect"):
                async with dialled(f"nats://127.0.0.1:{port}", connection__connect_timeout=0.2):
                    pass
            for servers in (f"nats://127.0.0.1:{port},{nats_url}", f"{nats_url},nats://127.0.0.1:{port}"):
                async with dialled(servers, connection__connect_timeout=0.5):
                    pass


async def test_attempts_at_a_server_that_says_nothing_leave_no_sockets_open(tmp_path: Path, wait_until: Wait) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    async with server(tmp_path) as nats:
        values: dict[str, Any] = {"connection__reconnect_wait": 0.001, "connection__reconnect_max_wait": 0.001}
        values["connection__connect_timeout"] = 0.05
        async with dialled(nats.url, **values) as (connection, events):
            assert nats.process is not None
            before = open_files()
            nats.process.send_signal(signal.SIGSTOP)
            await connection.force_reconnect()
            await wait_until(lambda: len(events) > 20)
            assert open_files() <= before + 4
            nats.process.send_signal(signal.SIGCONT)


@pytest.mark.setting("connection.ping_interval", "connection.max_missed_pings")
async def test_a_connection_that_has_gone_dead_is_noticed_by_its_pings(nats_url: str, wait_until: Wait) -> None:
    proxy = Proxy(free_port(), int(nats_url.rsplit(":", 1)[1]))
    await proxy.start()
    try:
        values: dict[str, Any] = {"connection__ping_interval": 0.05, "connection__max_missed_pings": 4}
        async with dialled(proxy.url, **values) as (connection, events):
            seen: list[int] = []
            for writer in proxy._writers:
                writer.transport.pause_reading()  # type: ignore[attr-defined]

            def noticed() -> bool:
                seen.append(connection._pings_outstanding)
                return "reconnected" in events

            await wait_until(noticed)
            assert max(seen) in (4, 5)
    finally:
        await proxy.stop()


@pytest.mark.setting("connection.ping_interval")
async def test_pings_of_a_live_connection_are_answered(nats_url: str, wait_until: Wait, monkeypatch: Any) -> None:
    pongs: list[int] = []
    async with dialled(nats_url, connection__ping_interval=0.01, connection__max_missed_pings=5) as (
        connection,
        events,
    ):
        original = connection._process_pong

        async def counted() -> None:
            pongs.append(1)
            await original()

        monkeypatch.setattr(connection, "_process_pong", counted)
        await wait_until(lambda: len(pongs) > 10)
        assert events == []


@pytest.mark.setting("connection.health_check_interval")
async def test_health_is_checked_at_the_set_interval(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    async with running(app_name, tmp_path, nats_url, connection__health_check_interval=0.05) as service:
        jobs = service.service.scheduler.jobs
        job = next(job for name, job in jobs.items() if "probe" in name)
        assert job.interval == 0.05
        log = service.service.health.components["log"]
        log.detail = "not looked at"
        await wait_until(lambda: log.detail != "not looked at")


@pytest.mark.setting("connection.inbox_prefix", "connection.reply_prefixes")
async def test_inboxes_are_where_the_settings_put_them_and_answers_go_nowhere_else(
    nats_url: str, app_name: str, tmp_path: Path
) -> None:
    async with running(app_name, tmp_path, nats_url, connection__reply_prefixes=(f"{app_name}.answers",)) as service:
        assert service.service.parts.connection.new_inbox().startswith(f"{app_name}.inbox.service.")
        assert service.service.parts.connection.new_answer_inbox().startswith(f"{app_name}.inbox.workers.")
        settings = settings_for(tmp_path, nats=nats_url, connection__inbox_prefix=f"{app_name}.answers.alice")
        async with await Client.connect(service.service.app, settings) as client:
            assert client.connection.new_inbox().startswith(f"{app_name}.answers.alice.client.")
            assert (await client.execute(Notebook, "n", Note("a"))).version == 1
        usual = settings_for(tmp_path, nats=nats_url, connection__inbox_prefix="_INBOX")
        async with await Client.connect(service.service.app, usual) as client:
            with pytest.raises(CommandTimeout):
                await client.execute(Notebook, "n", Note("b"), timeout=0.3)
