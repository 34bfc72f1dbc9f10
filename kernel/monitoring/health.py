"""Whether the service is alive, and ready: the state of each of its components."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from prometheus_client import generate_latest

from kernel.alerts import Alert
from kernel.monitoring.alerting import Alerts
from kernel.telemetry.metrics import COMPONENT_OK

logger = logging.getLogger("eskernel.monitoring")
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
