"""How far behind the projections are, and how hard publishing is pressed; changes are logged and alerted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from typing import Any

from kernel.alerts import Alert
from kernel.log.appender import Appender
from kernel.monitoring.alerting import Alerts
from kernel.monitoring.backlog import BacklogMeter, Change, Level
from kernel.monitoring.pressure import Pressure, PressureGauge
from kernel.projector.progress import ReadProgress
from kernel.settings import Settings
from kernel.telemetry.metrics import (
    BACKLOG_AGE,
    BACKLOG_BEHIND,
    BACKLOG_DRAIN,
    BACKLOG_PARTITIONS,
    LAG,
    PRESSURE,
    SPEED,
)

logger = logging.getLogger("eskernel.monitoring")
SLICE = 1_000
"""Measurements between turns of the loop."""
_LOUD = {Level.OK: logging.INFO, Level.WARN: logging.WARNING, Level.CRITICAL: logging.ERROR}


class Detector:
    """A worker's view of its own backlog and pressure: two jobs, which ask nothing outside the process.

    Args:
        backlog: of the app's projections, in their order.
        progress: what the projector knows.
        held: returns the partitions that this worker holds.
        load: returns the commands under way, and the seconds of the slowest append lately.
    """

    def __init__(
        self,
        settings: Settings,
        backlog: BacklogMeter,
        progress: ReadProgress,
        held: Callable[[], Collection[int]],
        appender: Appender,
        load: Callable[[], tuple[int, float]],
        alerts: Alerts,
    ) -> None:
        self._progress, self._held, self._appender, self._load = progress, held, appender, load
        self._alerts = alerts
        self._names = list(backlog.projections)
        self.backlog = backlog
        self.pressure = PressureGauge(
            settings.jetstream.max_in_flight,
            settings.commands.pending,
            settings.jetstream.publish_timeout,
            settings.backlog.hysteresis,
            settings.backlog.min_duration,
        )

    @property
    def behind(self) -> int:
        """Commits that the projection furthest behind has not projected of what is ours."""
        return round(max((projection.behind for projection in self.backlog.projections.values()), default=0.0))

    async def detect_backlog(self) -> None:
        """Measure every projection in every partition that is held; report what changed."""
        held, now = frozenset(self._held()), time.monotonic()
        self._progress.note_end(self._appender.highest)
        found = self._progress.waiting(len(self._names), held)
        for number, (projection, partition, count, age) in enumerate(found, 1):
            self.backlog.feed(self._names[projection], partition, count, age, now)
            if not number % SLICE:
                await asyncio.sleep(0)
        for change in self.backlog.finish(held, self._progress.done, now):
            self._report(change)
        LAG.set(self.behind)
        SPEED.set(self.backlog.rate)
        for measured in self.backlog.projections.values():
            name = measured.projection
            BACKLOG_BEHIND.labels(projection=name).set(measured.behind)
            BACKLOG_AGE.labels(projection=name).set(measured.age)
            BACKLOG_DRAIN.labels(projection=name).set(measured.drain)
            for level in (Level.WARN, Level.CRITICAL):
                count = measured.levels[level]
                BACKLOG_PARTITIONS.labels(projection=name, level=level.name.lower()).set(count)

    def _report(self, change: Change) -> None:
        count = len(change.partitions)
        where = f"{count} partitions" if count > 1 else f"partition {change.partitions[0]}"
        detail = f"{change.behind} commits behind, the oldest {change.age:.1f} s old, in {where}"
        if change.after == Level.OK:
            detail = f"caught up in {where}"
        before, after = change.before.name.lower(), change.after.name.lower()
        logger.log(_LOUD[change.after], "backlog of %s: %s to %s: %s", change.projection, before, after, detail)
        self._alerts.send(
            Alert(
                "backlog",
                change.projection,
                before,
                after,
                detail,
                self._alerts.worker,
                change.projection,
                tuple(change.partitions),
                change.behind,
                change.age,
            )
        )

    def measure_pressure(self) -> None:
        """Measure the publishing side; report what changed."""
        queued, in_flight = self._appender.pressure
        pending, latency = self._load()
        latency = max(latency, self._appender.waiting_for)
        changed = self.pressure.update(queued, in_flight, pending, latency, self._appender.refusal, time.monotonic())
        PRESSURE.set(self.pressure.level)
        if changed is None:
            return
        before, after = (level.name.lower() for level in changed)
        detail = (
            f"{queued} appends waiting, {in_flight} in flight, {pending} commands under way, "
            f"appends take up to {latency * 1000:.0f} ms"
        )
        if self._appender.refusal:
            detail = f"{self._appender.refusal}; {detail}"
        level = logging.WARNING if changed[1] >= Pressure.HIGH else logging.INFO
        logger.log(level, "publishing: pressure %s to %s: %s", before, after, detail)
        self._alerts.send(Alert("pressure", "publishing", before, after, detail, self._alerts.worker))

    def report(self) -> dict[str, Any]:
        """Return both as JSON data."""
        return {"backlog": self.backlog.report(), "pressure": self.pressure.shown}
