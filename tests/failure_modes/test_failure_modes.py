"""Connections that fail: passwords, cuts, dead and slow links, missing TLS. All of these failures are transient.

Each is produced for real, and each ends the same way: all acknowledged events are stored, no aggregate is parked, and
the service works again by itself.
"""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from kernel import Service
from kernel.transport.dial import connect
from kernel.transport.jetstream_api import ApiError, call_api
from tests.apps import notebooks
from tests.conftest import settings_for
from tests.failing import Running, Wait, free_port, metric, running, server, warned
from tests.faults.proxy import Proxy


@pytest.fixture
async def proxy(nats_url: str) -> AsyncIterator[Proxy]:
    """A proxy in front of the shared server that can fail."""
    made = Proxy(free_port(), int(nats_url.rsplit(":", 1)[1]))
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def proxied(proxy: Proxy, nats_url: str, app_name: str, tmp_path: Path) -> AsyncIterator[Running]:
    """A service behind the proxy, and a client that connects directly."""
    async with running(app_name, tmp_path, proxy.url, client=nats_url) as service:
        yield service
        await proxy.heal()


def stall(proxy: Proxy) -> None:
    """Stop reading existing connections, in both directions, without closing them; new connections work."""
    for writer in proxy._writers:
        writer.transport.pause_reading()  # type: ignore[attr-defined]


# passwords


async def test_a_wrong_password_at_start_is_named_and_no_password_is_shown(
    app_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with server(tmp_path, password="right-secret") as nats:
        wrong = nats.url.replace("right-secret", "wrong-secret")
        with pytest.raises(
            ConnectionError, match=r"Authorization Violation.*refused the credentials in the URL"
        ) as refused:
            await Service(notebooks(app_name), settings_for(tmp_path / "data", nats=wrong)).start()
        assert "secret" not in str(refused.value)
        async with running(app_name, tmp_path, nats.url) as service:
            assert "secret" not in (await service.component("log"))["detail"]
    assert "secret" not in caplog.text


@pytest.mark.parametrize("how", ["restart", "reload"])
async def test_a_password_that_is_wrong_for_a_while_is_waited_for(
    app_name: str, tmp_path: Path, wait_until: Wait, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    async with server(tmp_path, password="right") as nats, running(app_name, tmp_path, nats.url) as service:
        await service.note(20)
        for password in ("another", "right"):
            nats.password = password
            if how == "restart":
                await nats.restart()
            else:
                nats.reload()
            if password == "another":
                await wait_until(lambda: warned(caplog, "NATS", "Authorization Violation"))
                assert metric("eskernel_nats_connected") == 0
                assert service.service.failure == ""
        await wait_until(lambda: metric("eskernel_nats_connected") == 1)
        await service.check()


async def test_health_names_the_wrong_password(app_name: str, tmp_path: Path, wait_until: Wait) -> None:
    async with server(tmp_path, password="right") as nats, running(app_name, tmp_path, nats.url) as service:
        nats.password = "another"
        await nats.restart()

        async def shown() -> bool:
            log = await service.component("log")
            return not log["ok"] and "authorization violation" in log["detail"].lower()

        await wait_until(shown)
        nats.password = "right"
        await nats.restart()
        await wait_until(lambda: metric("eskernel_nats_connected") == 1)


async def test_a_permission_that_is_missing_is_named_in_the_log(
    app_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call_api, "__defaults__", (1.0,))  # the server sends no answer
    denied = (
        'authorization { users: [{ user: user, password: "right", '
        'permissions: { publish: { deny: ["$JS.API.STREAM.CREATE.>"] } } }] }'
    )
    async with server(tmp_path, more=denied) as nats:
        url = nats.url.replace("//", "//user:right@")
        with pytest.raises(Exception, match=r"JetStream API STREAM"):
            await Service(notebooks(app_name), settings_for(tmp_path / "data", nats=url)).start()
        assert warned(caplog, "permissions violation", "$js.api.stream.create")


# networks


async def test_cuts_in_the_middle_of_commands_lose_and_double_nothing(
    proxied: Running, proxy: Proxy, wait_until: Wait
) -> None:
    proxy.delay = 0.05
    for _ in range(4):
        sending = asyncio.create_task(proxied.note(100))
        await wait_until(lambda: proxied.service.parts.log.appender.pressure[1])
        proxy.cut()
        await sending
    await proxied.check()


async def test_a_network_outage_is_reported_and_waited_for(
    proxied: Running, proxy: Proxy, wait_until: Wait, caplog: pytest.LogCaptureFixture
) -> None:
    before = metric("eskernel_nats_events_total", event="reconnected")
    await proxy.refuse()
    await wait_until(lambda: metric("eskernel_nats_connected") == 0)
    assert warned(caplog, "NATS: disconnected")
    sending = asyncio.create_task(proxied.note(50))
    log = await proxied.component("log")
    assert not log["ok"]
    assert log["detail"]
    await proxy.start()
    await sending
    assert metric("eskernel_nats_events_total", event="reconnected") > before
    await proxied.check()
    assert (await proxied.component("log"))["ok"]


@pytest.mark.parametrize("unsent", [0, 20])
async def test_a_half_open_connection_is_noticed_and_replaced(
    proxied: Running, proxy: Proxy, wait_until: Wait, caplog: pytest.LogCaptureFixture, unsent: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """An orderly close would wait until the peer takes the unsent bytes, which never happens."""
    await proxied.note(20)
    monkeypatch.setattr(call_api, "__defaults__", (1.0,))  # the request that a dead connection does not answer
    stall(proxy)
    proxied.service.parts.connection.send(b"PUB nowhere 1000000\r\n%b\r\n" % bytes(1_000_000) * unsent)
    assert not (await proxied.component("log"))["ok"]
    await wait_until(lambda: warned(caplog, "NATS: reconnected"))
    await wait_until(lambda: len(proxied.service.status()["partitions"]) == 64)
    proxy.cut()
    await proxied.check()


async def test_commands_do_not_go_to_a_dead_connection_that_the_server_still_believes_in(
    proxied: Running, proxy: Proxy, wait_until: Wait
) -> None:
    await proxied.note(20)
    stall(proxy)
    connection, back = proxied.service.parts.connection, asyncio.Event()
    connection.reconnections.append(back.set)
    await connection.force_reconnect()
    await back.wait()
    await wait_until(lambda: len(proxied.service.status()["partitions"]) == 64)
    # less time than passes before a client sends a command again
    await proxied.note(100, timeout=1.5)
    proxy.cut()
    await proxied.check()


async def test_a_slow_link_slows_and_breaks_nothing(proxied: Running, proxy: Proxy) -> None:
    lost = metric("eskernel_leases_lost_total")
    proxy.delay = 0.25
    await proxied.note(200)
    await proxied.check()
    assert (await proxied.component("log"))["latency"] >= 0.25
    assert metric("eskernel_leases_lost_total") == lost


async def test_another_program_on_the_servers_port_is_waited_out(
    app_name: str, tmp_path: Path, wait_until: Wait, caplog: pytest.LogCaptureFixture
) -> None:
    """The program accepts connections and sends something that no nats-server sends."""
    heard = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        heard += 1
        writer.write([b"HTTP/1.1 400 Bad Request\r\n\r\n", b"INFO\r\n", b"x" * 100_000, b"INFO {}\r\n"][heard % 4])
        writer.close()

    async with server(tmp_path) as nats, running(app_name, tmp_path, nats.url) as service:
        await service.note(20)
        await nats.stop()
        stranger = await asyncio.start_server(answer, "127.0.0.1", nats.port)
        try:
            await wait_until(lambda: heard > 4)
        finally:
            stranger.close()
        await nats.start()
        await service.check()


# nats-py's traps


@pytest.mark.parametrize("how", ["cancelled", "failed"])
async def test_a_dead_read_loop_is_noticed_and_replaced(proxied: Running, wait_until: Wait, how: str) -> None:
    await proxied.note(20)
    connection = proxied.service.parts.connection
    reading = connection._reading_task
    if how == "cancelled":
        reading.cancel()
    else:
        parse = connection._ps.parse

        async def fail(data: bytes = b"") -> None:
            connection._ps.parse = parse  # type: ignore[method-assign]
            raise ValueError("an unreadable frame")

        connection._ps.parse = fail  # type: ignore[method-assign]
    await wait_until(reading.done)
    await proxied.note(20)
    await proxied.check()


async def test_lost_pulls_are_sent_again(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pull requests are lost on the way: the reader misses the heartbeat and sends a new request."""
    async with running(app_name, tmp_path, nats_url, consumer__heartbeat=0.5) as here:
        await _lose_pulls(here, wait_until, monkeypatch)


async def _lose_pulls(here: Running, wait_until: Wait, monkeypatch: pytest.MonkeyPatch) -> None:
    connection = here.service.parts.connection
    send, lost = connection.send, 0

    def lossy(frames: bytes) -> None:
        nonlocal lost
        if b"CONSUMER.MSG.NEXT" in frames and lost < 2:
            lost += 1
        else:
            send(frames)

    monkeypatch.setattr(connection, "send", lossy)
    await connection.force_reconnect()
    await wait_until(lambda: lost == 2)
    await here.check()


async def test_a_request_that_fails_after_a_reconnect_is_repeated(
    proxied: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a cluster without a leader: the server is reachable before JetStream is."""
    appender, failed = proxied.service.parts.log.appender, 0
    verify = appender._verify

    async def later() -> None:
        nonlocal failed
        failed += 1
        if failed <= 3:
            error = {"code": 503, "err_code": 10008, "description": "JetStream system temporarily unavailable"}
            raise ApiError("STREAM.INFO", error)
        await verify()

    monkeypatch.setattr(appender, "_verify", later)
    await proxied.note(20)
    await proxied.service.parts.connection.force_reconnect()
    await proxied.note(10, timeout=5)
    await proxied.check()
    assert failed > 3


async def test_every_command_sent_into_an_outage_is_answered(proxied: Running, proxy: Proxy, wait_until: Wait) -> None:
    """No future stays unresolved: neither a client's nor an append's."""
    await proxied.note(20)
    proxy.lose_requests = True
    sending = asyncio.create_task(proxied.note(100))
    await wait_until(lambda: proxied.service.parts.log.appender.pressure[1])
    proxy.cut()
    await sending
    await proxied.check()
    assert proxied.service.parts.gateway.pending.total == 0
    assert proxied.service.parts.log.appender.pressure == (0, 0)


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A certificate for 127.0.0.1; its key is in the same folder."""
    directory = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout key.pem -out cert.pem "
        "-days 2 -subj /CN=127.0.0.1 -addext subjectAltName=IP:127.0.0.1"
    )
    made = subprocess.run(command.split(), cwd=directory, capture_output=True, check=False)
    if made.returncode:
        pytest.skip("openssl can't make a certificate here")
    yield directory / "cert.pem"


def with_tls(certificate: Path, more: str = "") -> str:
    return f'tls {{ cert_file: "{certificate}", key_file: "{certificate.with_name("key.pem")}" }}\n{more}'


async def is_encrypted(connection: Any) -> bool:
    return connection._transport._io_writer.get_extra_info("ssl_object") is not None


async def test_a_tls_url_never_connects_in_clear_text(nats_url: str) -> None:
    with pytest.raises(ConnectionError, match="TLS"):
        await connect(nats_url.replace("nats://", "tls://"), name="private", connect_timeout=2)


async def test_a_tls_url_is_encrypted_where_the_server_leaves_the_choice(tmp_path: Path, certificate: Path) -> None:
    async with server(tmp_path, more=with_tls(certificate, "allow_non_tls: true")) as nats:
        connection = await connect(
            nats.url.replace("nats://", "tls://"), name="private", tls=ssl.create_default_context(cafile=certificate)
        )
        assert await is_encrypted(connection)
        await connection.close()


async def test_a_server_that_comes_back_without_tls_is_not_connected_to(
    app_name: str, tmp_path: Path, certificate: Path, wait_until: Wait, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    async with server(tmp_path, more=with_tls(certificate)) as nats:
        url = nats.url.replace("nats://", "tls://")
        async with running(app_name, tmp_path, url) as service:
            assert await is_encrypted(service.service.parts.connection)
            await service.note(20)
            nats.more = ""
            await nats.restart()
            await wait_until(lambda: warned(caplog, "TLS") or metric("eskernel_nats_connected") == 1)
            assert warned(caplog, "TLS")
            assert metric("eskernel_nats_connected") == 0
            nats.more = with_tls(certificate)
            await nats.restart()
            await service.check()
            assert await is_encrypted(service.service.parts.connection)
