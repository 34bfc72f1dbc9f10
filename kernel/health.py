"""Is the service alive, is it ready, and its HTTP face: /healthz, /readyz, /metrics."""

from __future__ import annotations

import hmac
import logging
import time
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import orjson
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from kernel.metrics import COMPONENT_OK
from kernel.settings import Http

logger = logging.getLogger("eskernel")


@dataclass(slots=True)
class Component:
    """One part of the service.

    Attributes:
        name: what it is.
        ok: whether it works.
        detail: what is known, for people.
        latency: seconds that its last probe took.
        since: when `ok` last changed, in Unix time.
    """

    name: str
    ok: bool = False
    detail: str = "starting"
    latency: float = 0.0
    since: float = 0.0

    def set(self, ok: bool, detail: str, latency: float = 0.0) -> None:
        """Note the outcome of a probe; a change is logged."""
        if ok != self.ok or not self.since:
            if self.ok:
                logger.warning("%s: %s", self.name, detail)
            elif ok and self.since:
                logger.info("%s: works again", self.name)
            self.since = time.time()
        COMPONENT_OK.labels(component=self.name).set(ok)
        self.ok, self.detail, self.latency = ok, detail, latency

    def stop(self) -> None:
        """Say that it ends because the service does, which is nothing to warn of."""
        self.ok, self.detail, self.since = False, "stopping", time.time()
        COMPONENT_OK.labels(component=self.name).set(0)


class Health:
    """The components' states: the log, the database, the projection."""

    def __init__(self) -> None:
        self.components = {
            name: Component(name) for name in ("log", "appends", "database", "leases", "projection", "commands")
        }

    @property
    def ready(self) -> bool:
        """Whether every component works."""
        return all(component.ok for component in self.components.values())

    def report(self) -> dict[str, Any]:
        """Return everything as JSON data."""
        return {"ready": self.ready, "components": {name: asdict(one) for name, one in self.components.items()}}

    async def metrics(self) -> bytes:
        """Return this process's metrics."""
        return generate_latest()


class Reporter(Protocol):
    """What HTTP shows."""

    @property
    def ready(self) -> bool: ...

    def report(self) -> dict[str, Any]:
        """Return the state of everything as JSON data."""

    async def metrics(self) -> bytes:
        """Return a page in Prometheus's text format."""


class HttpServer:
    """Serves health and metrics on a loopback address unless told otherwise."""

    def __init__(self, health: Reporter, settings: Http) -> None:
        self._health, self._settings = health, settings
        self._token = settings.token.get_secret_value() if settings.token is not None else ""
        self._runner: web.AppRunner | None = None
        self.url = ""

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: the address is taken or not ours.
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
        return web.json_response({"alive": True})

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
