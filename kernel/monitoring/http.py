"""The HTTP pages of a service: /healthz, /readyz and /metrics."""

from __future__ import annotations

import hmac
from typing import Any, Protocol

import orjson
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from kernel.settings import Http


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
        self.url = ""

    async def start(self) -> None:
        """Start listening.

        Raises:
            OSError: the port is in use, or the address is not one of this machine.
        """
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._settings.host, self._settings.port)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def stop(self) -> None:
        """Stop listening."""
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
