"""Limits on HTTP connections, which hold before anything of a request is looked at.

A connection carries one request. Who sends it slowly, or not at all, holds a file of the process until a time-out; so
there are few connections, and a new one takes the place of the oldest that has sent no request.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from typing import Any, cast

from kernel.log.repeats import Repeats
from kernel.settings import Http

logger = logging.getLogger("eskernel.monitoring")
SHARE = 8
"""One of so many files that the process may open is for HTTP; the others are for the log, the database and the app."""
LEAST = 4
MAX_REQUEST = 16 * 1024
"""Bytes of a request with its headers. The pages need no more than a token."""
MAX_BEYOND = 64 * 1024
"""Bytes that a connection may send in all: what follows a request is read and dropped until it is closed."""
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"


def most_connections(settings: Http) -> int:
    """Return how many connections may be open: what the settings say, but never more than a share of the files."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return settings.connections
    return max(LEAST, min(settings.connections, files // SHARE))


class Door(asyncio.Protocol):
    """One connection: it passes to the server behind it what the limits let in.

    Attributes:
        begun: whether a request has come whole, so that the connection is not closed for another one.
    """

    def __init__(self, doors: Doors, server: asyncio.Protocol) -> None:
        self._doors, self._server = doors, server
        self.begun = self._closed = False
        self._received = 0
        self._timers: list[asyncio.TimerHandle] = []

    def begin(self) -> None:
        """Note that a request has come whole."""
        self.begun = True

    def abort(self) -> None:
        """Close the connection at once."""
        self._closed = True
        self._transport.abort()

    def refuse(self, answer: bytes) -> None:
        """Answer without a look at the request, and close the connection."""
        self._closed = True
        self._transport.write(answer)
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        loop, settings = asyncio.get_running_loop(), self._doors.settings
        self._timers = [
            loop.call_later(settings.header_timeout, self._expect_request),
            loop.call_later(settings.timeout, self.abort),
        ]
        # told in any case: it expects to be told of the end too
        self._server.connection_made(transport)
        self._doors.open(self)

    def _expect_request(self) -> None:
        if not self.begun:
            self.abort()

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        if self._closed:
            return
        if self._received > MAX_REQUEST and not self.begun:
            self.refuse(_TOO_LARGE)
        elif self._received > MAX_BEYOND:
            self.abort()
        else:
            self._server.data_received(data)

    def eof_received(self) -> bool | None:
        return self._server.eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        for timer in self._timers:
            timer.cancel()
        self._doors.connections.pop(self, None)
        self._server.connection_lost(error)

    def pause_writing(self) -> None:
        self._server.pause_writing()

    def resume_writing(self) -> None:
        self._server.resume_writing()


class Doors:
    """The open connections of a server, oldest first.

    Attributes:
        most: how many there may be.
        connections: the open connections.
    """

    def __init__(self, settings: Http) -> None:
        self.settings, self.most = settings, most_connections(settings)
        self.connections: dict[Door, None] = {}
        self._repeats = Repeats(60.0)

    def open(self, door: Door) -> None:
        """Let a connection in, in place of the oldest that has sent no request; refuse it where all have."""
        if len(self.connections) >= self.most:
            if (more := self._repeats.due("full")) is not None:
                logger.warning(
                    "HTTP: more than %d connections at once (http.connections); the oldest without a request is "
                    "closed for each new one%s", self.most, more,
                )  # fmt: skip
            waiting = next((other for other in self.connections if not other.begun), None)
            if waiting is None:
                door.refuse(_FULL)
                return
            del self.connections[waiting]
            waiting.abort()
        self.connections[door] = None

    def close(self) -> None:
        """Close all connections that have sent no request."""
        for door in list(self.connections):
            if not door.begun:
                door.abort()


def door_of(transport: Any) -> Door | None:
    """Return the door of a connection, given its transport; None once it is closed."""
    door = transport.get_protocol() if transport is not None else None
    return door if isinstance(door, Door) else None
