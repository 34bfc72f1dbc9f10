"""The health of a service: whether it is alive and ready, and the state of each component."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from kernel.alerts import Alert
from kernel.monitoring.alerting import Alerts
from kernel.telemetry.metrics import COMPONENT_OK, render_page

logger = logging.getLogger("eskernel.monitoring")
DEAD_S = 30.0
"""The process is dead if no job has begun for this long, because some jobs begin every second."""
STOPPING = "stopping"
PUBLISHING = ("log", "appends", "leases", "commands", "loop")
PROJECTING = ("log", "database", "leases", "projection", "builds", "reactions", "loop")


class NotWorking(Exception):
    """A component does not work; the message says why."""


@dataclass(slots=True)
class Component:
    """One part of the service.

    Attributes:
        name: name of the component.
        ok: True if the component works.
        detail: explanation for people.
        latency: duration of the last probe in seconds.
        since: Unix time of the last change of `ok`.
    """

    name: str
    ok: bool = False
    detail: str = "starting"
    latency: float = 0.0
    since: float = 0.0

    def set(self, ok: bool, detail: str, latency: float = 0.0) -> bool:
        """Record the result of a probe, and log a change. Return whether the change is worth an alert."""
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
        """Mark the component as stopping with the service, without a warning."""
        self.ok, self.detail, self.since = False, STOPPING, time.time()
        COMPONENT_OK.labels(component=self.name).set(0)


class Health:
    """The states of the components: log, appends, database, leases, projection, and so on.

    Args:
        alerts: gets an alert when a component's state changes.
        idle: returns the seconds since a scheduled job last began.
        patience: seconds after which the results of the probes are too old to count.
        app: name of the app, a label of all metrics.
    """

    def __init__(self, alerts: Alerts, idle: Callable[[], float], patience: float, app: str = "") -> None:
        self._app = app
        self._alerts, self._idle, self._patience = alerts, idle, patience
        self._probed = time.monotonic()
        self.components = {name: Component(name) for name in dict.fromkeys(PUBLISHING + PROJECTING)}

    def set(self, name: str, ok: bool, detail: str, latency: float = 0.0) -> None:
        """Record the result of a component's probe, and send an alert about a change."""
        self._probed = time.monotonic()
        if self.components[name].set(ok, detail, latency):
            before, after = ("failing", "ok") if ok else ("ok", "failing")
            self._alerts.send(Alert("health", name, before, after, detail, self._alerts.worker))

    @property
    def alive(self) -> bool:
        """True while the scheduler runs jobs; otherwise the process has to be restarted."""
        return self._idle() < DEAD_S

    @property
    def ready(self) -> bool:
        """True if every component works, according to recent probes."""
        return self.works(*self.components)

    def works(self, *names: str) -> bool:
        """Return whether these components work, according to recent probes."""
        return time.monotonic() - self._probed < self._patience and all(self.components[name].ok for name in names)

    def report(self) -> dict[str, Any]:
        """Return the health and all components as JSON data."""
        return {
            "ready": self.ready,
            "alive": self.alive,
            "publishing": self.works(*PUBLISHING),
            "projecting": self.works(*PROJECTING),
            "components": {name: asdict(component) for name, component in self.components.items()},
        }

    async def metrics(self) -> bytes:
        """Return this process's metrics."""
        return render_page(self._app)
