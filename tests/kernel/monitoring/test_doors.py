"""The HTTP server under slow, large and many requests: real sockets, limits that hold before the token is read."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest

from kernel.monitoring.doors import LEAST, MAX_REQUEST, most_connections
from kernel.monitoring.http import HttpServer
from kernel.runtime.files import allow_files
from kernel.settings import Http

Wait = Callable[..., Any]


class Fine:
    """A service that works, whose metrics take as long as the test wants."""

    ready = alive = True

    def __init__(self) -> None:
        self.page = b"metric 1\n"
        self.asked = 0
        self.go = asyncio.Event()
        self.go.set()

    def report(self) -> dict[str, Any]:
        return {"ready": True}

    async def metrics(self) -> bytes:
        self.asked += 1
        await self.go.wait()
        return self.page


@asynccontextmanager
async def serving(reporter: Fine, **settings: Any) -> AsyncIterator[HttpServer]:
    server = HttpServer(reporter, Http(**settings))
    await server.start()
    try:
        yield server
    finally:
        reporter.go.set()
        await server.stop()


def dial(server: HttpServer, stack: ExitStack, data: bytes = b"") -> socket.socket:
    """Connect, and send the beginning of a request."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    connected = stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
    if data:
        connected.sendall(data)
    return connected


async def read(connected: socket.socket) -> bytes:
    """Return what comes until the server closes the connection."""
    connected.setblocking(False)
    loop, answer = asyncio.get_running_loop(), b""
    async with asyncio.timeout(5):
        while True:
            try:
                piece = await loop.sock_recv(connected, 65536)
            except ConnectionError:
                return answer
            if not piece:
                return answer
            answer += piece


def is_open(connected: socket.socket) -> bool:
    """Return whether the server has left the connection open, and sent nothing."""
    connected.setblocking(False)
    try:
        connected.recv(1)
    except BlockingIOError:
        return True
    except ConnectionError:
        return False
    return False


async def status_of(server: HttpServer, path: str = "/healthz") -> int:
    timeout = aiohttp.ClientTimeout(total=5)
    async with aiohttp.ClientSession(timeout=timeout) as http, http.get(f"{server.url}{path}") as answer:
        return answer.status


@pytest.mark.setting("http.connections", on="")
async def test_slow_connections_do_not_keep_the_pages_from_others(wait_until: Wait) -> None:
    """Each new connection takes the place of the oldest that has sent no request."""
    async with serving(Fine(), connections=8, header_timeout=60, timeout=60) as server:
        assert server._doors is not None
        with ExitStack() as stack:
            slow = []
            for number in range(200):
                slow.append(dial(server, stack, b"GET /metrics HTTP/1.1\r\nX-Slow: " if number % 2 else b""))
                if number % 50 == 0:
                    assert await status_of(server) == 200
            assert await status_of(server) == 200
            assert len(server._doors.connections) <= 8
            await wait_until(lambda: sum(map(is_open, slow)) <= 8)


@pytest.mark.setting("http.connections", on="")
async def test_requests_under_way_are_not_closed_for_new_ones(wait_until: Wait) -> None:
    reporter = Fine()
    async with serving(reporter, connections=4, timeout=60) as server:
        reporter.go.clear()
        asking = [asyncio.create_task(status_of(server, "/metrics")) for _ in range(4)]
        await wait_until(lambda: reporter.asked == 4)
        assert await status_of(server) == 503
        reporter.go.set()
        assert await asyncio.gather(*asking) == [200] * 4
        assert await status_of(server) == 200


@pytest.mark.setting("http.header_timeout", on="")
async def test_a_request_that_does_not_come_in_time_is_cut_off() -> None:
    async with serving(Fine(), header_timeout=0.2) as server:
        with ExitStack() as stack:
            begun = dial(server, stack, b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
            silent = dial(server, stack)
            assert await read(silent) == b""
            assert await read(begun) == b""


@pytest.mark.setting("http.timeout", on="")
async def test_an_answer_that_is_not_fetched_in_time_is_cut_off(wait_until: Wait) -> None:
    reporter = Fine()
    reporter.page = b"x" * 50_000_000  # more than the sockets' buffers hold
    async with serving(reporter, timeout=0.5) as server:
        assert server._doors is not None
        with ExitStack() as stack:
            dial(server, stack, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            await wait_until(lambda: reporter.asked == 1)
            await wait_until(lambda: server._doors is not None and not server._doors.connections)


async def test_headers_are_limited_before_the_token_is_looked_at() -> None:
    async with serving(Fine(), token="right") as server:
        with ExitStack() as stack:
            begun = b"GET /metrics HTTP/1.1\r\nHost: x\r\n"
            lines = b"".join(b"X-%d: %b\r\n" % (number, b"y" * 1000) for number in range(40))
            assert len(lines) > MAX_REQUEST
            assert (await read(dial(server, stack, begun + lines))).startswith(b"HTTP/1.1 431 ")
            refused = dial(server, stack, begun + b"Authorization: Bearer wrong\r\n\r\n")
            assert (await read(refused)).startswith(b"HTTP/1.1 401 ")


async def test_a_connection_carries_one_request() -> None:
    reporter = Fine()
    async with serving(reporter) as server:
        with ExitStack() as stack:
            request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
            answer = await read(dial(server, stack, request * 3))
            assert answer.count(b"HTTP/1.1 200 OK") == 1
            assert b"Connection: close" in answer
            missing = await read(dial(server, stack, request.replace(b"metrics", b"nothing")))
            assert missing.startswith(b"HTTP/1.1 404 ")
    assert reporter.asked == 1


@pytest.mark.parametrize(("files", "most"), [(256, 32), (16, LEAST), (65_536, 64), (resource.RLIM_INFINITY, 64)])
def test_most_files_are_left_for_the_log_and_the_database(
    files: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (files, files))
    assert most_connections(Http()) == most


@pytest.mark.parametrize(
    ("soft", "hard", "after"), [(1024, 4096, 4096), (4096, 4096, 4096), (1024, resource.RLIM_INFINITY, 1 << 20)]
)
def test_a_process_of_its_own_opens_as_many_files_as_it_may(
    soft: int, hard: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: now[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _kind, limits: now.append(limits))
    assert allow_files() == after
    assert now[-1] == (after, hard)


@pytest.mark.setting("http.public", "http.host", on="")
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "", "metrics.example.org"])
def test_a_token_is_needed_where_others_can_reach_the_pages(host: str) -> None:
    with pytest.raises(ValueError, match=r"is not a loopback address.*set http\.token .*http\.public"):
        Http(host=host)
    assert Http(host=host, token="right").token is not None
    assert Http(host=host, public=True).public
    for own in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert Http(host=own).host == own
