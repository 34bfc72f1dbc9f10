"""Is the service alive, is it ready, and its HTTP face: /healthz, /readyz, /metrics."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import orjson
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from kernel.alerts import Alert, Alerts
from kernel.settings import Http
from kernel.telemetry.metrics import COMPONENT_OK

logger = logging.getLogger("eskernel")
DEAD_S = 30.0
"""No job has begun for so long, though some do each second: the process is of no use any more."""
STOPPING = "stopping"
PUBLISHING = ("log", "appends", "leases", "commands", "loop")
PROJECTING = ("log", "database", "leases", "projection", "loop")


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

    def set(self, ok: bool, detail: str, latency: float = 0.0) -> bool:
        """Note the outcome of a probe; a change is logged. Return whether it is one that somebody may want to know."""
        if self.detail == STOPPING:
            return False
        changed = ok != self.ok if self.since else not ok
        if ok != self.ok or not self.since:
            if self.ok:
                logger.warning("%s: %s", self.name, detail)
            elif ok and self.since:
                logger.info("%s: works again", self.name)
            self.since = time.time()
        COMPONENT_OK.labels(component=self.name).set(ok)
        self.ok, self.detail, self.latency = ok, detail, latency
        return changed

    def stop(self) -> None:
        """Say that it ends because the service does, which is nothing to warn of."""
        self.ok, self.detail, self.since = False, STOPPING, time.time()
        COMPONENT_OK.labels(component=self.name).set(0)


class Health:
    """The components' states: log, appends, database, leases, projection, commands, event loop.

    Args:
        alerts: told when a component's state changes.
        idle: seconds since any regular job began.
        patience: seconds after which what the probes have found is too old to be believed.
    """

    def __init__(self, alerts: Alerts, idle: Callable[[], float], patience: float) -> None:
        self._alerts, self._idle, self._patience = alerts, idle, patience
        self._probed = time.monotonic()
        self.components = {name: Component(name) for name in dict.fromkeys(PUBLISHING + PROJECTING)}

    def set(self, name: str, ok: bool, detail: str, latency: float = 0.0) -> None:
        """Note the outcome of a component's probe, and tell of a change."""
        self._probed = time.monotonic()
        if self.components[name].set(ok, detail, latency):
            before, after = ("failing", "ok") if ok else ("ok", "failing")
            self._alerts.tell(Alert("health", name, before, after, detail, self._alerts.worker))

    @property
    def alive(self) -> bool:
        """Whether the process does anything at all; if not, only starting it again helps."""
        return self._idle() < DEAD_S

    @property
    def ready(self) -> bool:
        """Whether every component works, as far as was found out lately."""
        return self.works(*self.components)

    def works(self, *names: str) -> bool:
        """Say whether these components work, as far as was found out lately."""
        return time.monotonic() - self._probed < self._patience and all(self.components[name].ok for name in names)

    def report(self) -> dict[str, Any]:
        """Return everything as JSON data."""
        return {
            "ready": self.ready,
            "alive": self.alive,
            "publishing": self.works(*PUBLISHING),
            "projecting": self.works(*PROJECTING),
            "components": {name: asdict(one) for name, one in self.components.items()},
        }

    async def metrics(self) -> bytes:
        """Return this process's metrics."""
        return generate_latest()


class Reporter(Protocol):
    """What HTTP shows."""

    @property
    def ready(self) -> bool: ...

    @property
    def alive(self) -> bool: ...

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
