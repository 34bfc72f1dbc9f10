"""The HTTP pages of a service: /healthz, /readyz and /metrics. `doors` holds the limits on connections."""

from __future__ import annotations

import asyncio
import hmac
import socket
from typing import Any, Protocol

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler
from prometheus_client import CONTENT_TYPE_LATEST

from kernel.monitoring.doors import Door, Doors, door_of
from kernel.settings import Http

BACKLOG = 128
"""Connections that the system keeps until they are accepted."""
STOP_S = 2.0
"""For the requests under way when the server stops."""


@web.middleware
async def _one_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer the only request of a connection."""
    if (door := door_of(request.transport)) is not None:
        door.begin()
    try:
        response = await handler(request)
    except web.HTTPException as refusal:
        refusal.force_close()
        raise
    response.force_close()
    return response


class Reporter(Protocol):
    """The source of the HTTP pages."""

    @property
    def ready(self) -> bool: ...

    @property
    def alive(self) -> bool: ...

    def report(self) -> dict[str, Any]:
        """Return the details of `/readyz` as JSON data."""

    async def metrics(self) -> bytes:
        """Return a page in Prometheus's text format."""


class HttpServer:
    """Serves health and metrics.

    Attributes:
        url: URL of the server, empty before `start`.
    """

    def __init__(self, health: Reporter, settings: Http) -> None:
        self._health, self._settings = health, settings
        self._token = settings.token.get_secret_value() if settings.token is not None else ""
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None
        self._doors: Doors | None = None
        self.url = ""

    async def start(self) -> None:
        """Start listening.

        Raises:
            OSError: the port is in use, or the address is not one of this machine.
        """
        app = web.Application(middlewares=[_one_request])
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        self._runner = runner = web.AppRunner(app, access_log=None, shutdown_timeout=STOP_S, lingering_time=0.0)
        await runner.setup()
        self._doors = doors = Doors(self._settings)

        def accept() -> Door:
            assert runner.server is not None, "it was set up"
            return Door(doors, runner.server())

        loop = asyncio.get_running_loop()
        # asyncio accepts as many at once as the backlog has, before it closes one of them: a burst must not take more
        # files than the doors may have
        at_once = max(1, doors.most // 2)
        host, port = self._settings.host, self._settings.port
        try:
            self._server = await loop.create_server(accept, host, port, backlog=at_once)
        except OSError as error:
            reason = error.strerror or str(error)
            raise OSError(f"can't serve HTTP on {host}:{port} (http.host, http.port): {reason}") from error
        for listening in self._server.sockets:
            with socket.fromfd(listening.fileno(), listening.family, listening.type) as same:
                same.listen(BACKLOG)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
        if self._doors is not None:
            self._doors.close()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _healthz(self, _request: web.Request) -> web.Response:
        alive = self._health.alive
        return web.json_response({"alive": alive}, status=200 if alive else 503)

    def _admitted(self, request: web.Request) -> bool:
        given = request.headers.get("Authorization", "")
        return not self._token or hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode())

    async def _readyz(self, request: web.Request) -> web.Response:
        details = self._health.report() if self._admitted(request) else {"ready": self._health.ready}
        report = orjson.dumps(details)
        return web.Response(body=report, status=200 if self._health.ready else 503, content_type="application/json")

    async def _metrics(self, request: web.Request) -> web.Response:
        if not self._admitted(request):
            return web.Response(status=401, text="a bearer token is needed", headers={"WWW-Authenticate": "Bearer"})
        return web.Response(body=await self._health.metrics(), headers={"Content-Type": CONTENT_TYPE_LATEST})
