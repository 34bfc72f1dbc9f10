"""The service: one worker of an app, from its start to its drained stop."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

import orjson

from kernel.app import App
from kernel.assembly import Foundation, Parts, build
from kernel.errors import Unavailable
from kernel.governance.sharing import share_limits
from kernel.monitoring.alerting import Alerts
from kernel.monitoring.anchor import EVERY_S as ANCHOR_S
from kernel.monitoring.health import Health
from kernel.monitoring.http import HttpServer
from kernel.monitoring.probes import PROBE_S, RECHECK_S
from kernel.reactions.reactor import GRACE_S
from kernel.runtime.directory import DataDirectory, running_as, worker_name
from kernel.runtime.scheduler import Scheduler
from kernel.settings import Settings
from kernel.telemetry.loop_lag import LoopLag
from kernel.telemetry.metrics import APPENDS_IN_FLIGHT, APPENDS_QUEUED, CONSUMERS, READ_BACKS, SHELLS
from projections.database import is_infrastructure

logger = logging.getLogger("eskernel.service")

COUNT_S = 5.0
"""Between two counts of timers."""
LEAVE_S = 3.0
"""For each thing that a stopping worker gives back."""


class Service:
    """One worker of a running app: the only one, or one of several that share its partitions.

    It is an async context manager: `async with Service(app) as service: ...` starts it, and stops it in good order.

    Args:
        settings: the defaults unless given; `kernel.settings.load` reads them from a file and the environment.
        spec: how the app was named on the command line, for other commands to find it.
        number: which worker of a group this is; the group's supervisor then holds the data directory. 0 is none.

    Attributes:
        worker: this worker's name, unlike any other's.
        stopped: set when the service begins to stop, by itself too.
        failure: why it stopped by itself, or nothing.
        health: the state of each component.
        http: the server of `/healthz`, `/readyz` and `/metrics`; its `url` is known once the service runs.
    """

    def __init__(self, app: App, settings: Settings | None = None, spec: str = "", number: int = 0) -> None:
        self.app = app
        self.settings = settings or Settings()
        self.worker = worker_name()
        self.alerts = Alerts(app.on_alert, self.worker)
        self.scheduler = Scheduler(self._waits)
        # a probe may take as long as it does, and come late
        patience = 3 * self.settings.connection.health_check_interval + 2 * PROBE_S
        self.health = Health(self.alerts, lambda: self.scheduler.idle_for, patience, app.name)
        self.directory = DataDirectory(self.settings.data, app.name)
        self.http = HttpServer(self.health, self.settings.http)
        self.stopped = asyncio.Event()
        self.failure = ""
        self.number = number
        self._spec = spec
        self._loop_lag = LoopLag()
        self._parts: Parts | None = None
        self._read_backs = self._consumers = 0
        self._closed = False
        self._closing = AsyncExitStack()
        self._subscriptions = AsyncExitStack()

    @property
    def parts(self) -> Parts:
        """The parts of the worker. Raises `RuntimeError` before they are built."""
        if self._parts is None:
            raise RuntimeError(f"the service of {self.app.name!r} has not been started; await start() first")
        return self._parts

    # start

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start everything; when it returns, commands are taken.

        Raises:
            AlreadyRunning, ConnectionFailed, DatabaseMismatch, DeclarationError, LogError, SchemaError, SettingsError,
            TooManyFailures, OSError: what stands in the way, and what to do. Nothing is left running.
        """
        try:
            await self._start()
        except BaseException:
            self.stopped.set()
            await self._close()
            raise

    async def _start(self) -> None:
        self._closing.callback(self.directory.release)
        if not self.number:
            self.directory.hold()
        foundation = Foundation(
            self.app, self.settings, self.worker, self.directory, self.alerts, self.health, self._loop_lag,
            self.stopped, self._lose,
        )  # fmt: skip
        self._parts = parts = await build(foundation, self._closing)
        if self.app.projections:
            parts.projector.start(parts.ownership.verify)
            parts.deployment.start()
        await self._listen(parts)
        parts.reactors.start(parts.ownership.verify)
        self._closing.callback(self._loop_lag.stop)
        self._loop_lag.start()
        await parts.probes.probe()
        await parts.anchor.move()
        self._check_heard(parts)
        self._closing.callback(self.scheduler.stop)
        self._schedule(parts)
        self._closing.push_async_callback(self.http.stop)
        await self.http.start()
        if not self.number:
            self.directory.describe(
                running_as(self.app.name, self._spec, self.settings, self.nats_url, self.database_url, self.http.url)
            )

    async def _listen(self, parts: Parts) -> None:
        """Take commands, and answer the requests that other processes of the app send."""
        connection, subjects, guarded = parts.connection, parts.log.subjects, parts.guard.guarded
        listening = self._subscriptions
        listening.push_async_callback(
            await connection.listen(subjects.commands(), parts.admission.receive, queue="workers")
        )
        listening.push_async_callback(await parts.sender.listen())
        await parts.ownership.start()
        listening.push_async_callback(await connection.listen(subjects.service("status"), guarded(self._answer_status)))
        await share_limits(
            connection, parts.outbox, subjects.service("limits"), parts.governor, self._names, listening, guarded
        )

    def _check_heard(self, parts: Parts) -> None:
        """Refuse to start where a subscription was refused: the server says so apart, and then nothing comes."""
        if unheard := sorted(parts.connection.unheard):
            raise Unavailable(
                f"the user of this connection may not subscribe to {', '.join(unheard)}: allow the service's subjects "
                "(`eskernel config permissions APP` lists them)"
            )

    def _schedule(self, parts: Parts) -> None:
        settings, every = self.settings, self.scheduler.every
        every(parts.leases.ttl / 3, parts.ownership.renew_leases)
        every(0.5, parts.gateway.residents.passivate)
        every(1.0, self._publish_metrics)
        every(1.0, self._govern)
        every(settings.backlog.interval, parts.detector.measure_pressure)
        every(settings.connection.health_check_interval, parts.probes.probe)
        if self.app.reactions:
            every(COUNT_S, parts.reactors.count, "count_timers")
        every(ANCHOR_S, parts.anchor.move, "keep_anchor")
        every(RECHECK_S, parts.probes.recheck)
        if self.app.projections:
            every(settings.backlog.interval, parts.detector.detect_backlog)
            every(min(1.0, settings.dead_letters.retry_after), parts.retries.retry_dead_letters)
            if settings.verification.interval:
                every(settings.verification.interval, parts.patrol.compare_rows)
            every(min(3600.0, settings.deployment.retention), self._drop_expired)
        self.scheduler.start()

    def _publish_metrics(self) -> None:
        parts = self.parts
        parts.gateway.publish_metrics()
        parts.reactors.publish_metrics()
        appender = parts.log.appender
        READ_BACKS.inc(appender.read_backs - self._read_backs)
        self._read_backs = appender.read_backs
        CONSUMERS.inc(parts.log.consumers - self._consumers)
        self._consumers = parts.log.consumers
        SHELLS.set(len(parts.gateway.actors))
        queued, in_flight = appender.pressure
        APPENDS_QUEUED.set(queued)
        APPENDS_IN_FLIGHT.set(in_flight)

    async def _drop_expired(self) -> None:
        others = self.parts.ownership.members.others
        versions = [each.program.versions or {} for each in others]
        await self.parts.deployment.drop_expired([pair for known in versions for pair in known.items()])

    def _govern(self) -> None:
        leases = self.parts.leases
        self.parts.governor.tick(self.parts.signals.collect(), len(leases.held) / leases.partitions)

    # what is known of it

    @property
    def nats_url(self) -> str:
        """The servers' URLs, with commas between; empty before the start."""
        return self._parts.places.nats_url if self._parts is not None else ""

    @property
    def database_url(self) -> str:
        """The projection database's URL; empty before the start."""
        return self._parts.places.database_url if self._parts is not None else ""

    @property
    def durability(self) -> str:
        """A sentence for people: what survives which failure; empty before the start."""
        return self._parts.places.durability if self._parts is not None else ""

    @property
    def partitions(self) -> list[int]:
        """The partitions that this worker holds."""
        return sorted(self._parts.leases.held) if self._parts is not None else []

    def _names(self) -> dict[str, Any]:
        return {"worker": self.worker, "workers": list(self.parts.ownership.members.workers)}

    def _answer_status(self, _subject: bytes, reply: bytes, _payload: bytes, _headers: bytes | None) -> None:
        if not reply:
            return
        status = self.status()
        if not self.parts.outbox.publish(reply, orjson.dumps(status)):
            # what is long, and not needed to see whether the service works
            status["jobs"] = []
            for projection in status["backlog"]["projections"]:
                projection["partitions"] = []
            if not self.parts.outbox.publish(reply, orjson.dumps(status)):
                logger.warning("the status of this worker is larger than the server takes (max_payload)")

    def status(self) -> dict[str, Any]:
        """Return what `eskernel status` shows, as JSON data."""
        parts = self.parts
        residents = parts.gateway.residents
        return {
            "app": self.app.name,
            **self._names(),
            "number": self.number,
            "pid": os.getpid(),
            "partitions": self.partitions,
            "partition_count": parts.leases.partitions,
            "durability": self.durability,
            "health": self.health.report(),
            "end": parts.projector.progress.end,
            "actors": len(residents),
            "memory": {"bytes": residents.memory, "limit": int(self.settings.passivation.memory)},
            "commands_pending": parts.gateway.pending.total,
            "projection": {
                "state": parts.projector.state,
                "position": parts.projector.position,
                "behind": parts.detector.behind,
            },
            "deployment": parts.deployment.report() | {"mixed": parts.ownership.mixed},
            "reactions": parts.reactors.report(),
            "unknown_aggregates": parts.unknown.report(),
            "waiting_aggregates": [waiting._asdict() for waiting in parts.retries.postponed],
            "limits": parts.governor.show(),
            **parts.detector.report(),
            "alerts": self.alerts.sent,
            "jobs": self.scheduler.report(),
        }

    def _waits(self, error: Exception) -> bool:
        """Return whether a job failed only because the database is unreachable, which its own check shows."""
        return is_infrastructure(error) or (
            isinstance(error, TimeoutError) and not self.health.components["database"].ok
        )

    # the end

    def _lose(self, why: str) -> None:
        """Stop by itself: the service cannot go on."""
        logger.error("stopping: %s", why)
        self.failure = why
        self.stopped.set()

    async def stop(self) -> None:
        """Drain and stop: commands under way are answered, the last batch is committed, leases are given back.

        All of it within the time that the settings give it, and a few seconds to let go.
        """
        deadline = time.monotonic() + self.settings.drain
        self.stopped.set()
        self.health.components["commands"].stop()
        try:
            if self._parts is not None and not self._closed:
                await self._drain(self._parts, deadline)
        finally:
            await self._close()

    async def _drain(self, parts: Parts, deadline: float) -> None:
        pending = parts.gateway.pending
        # its commands are still taken here
        if not await parts.reactors.stop(LEAVE_S + GRACE_S):
            logger.warning("policies and effects did not finish in time; the next owner goes on from their checkpoints")
        if not await parts.admission.stop(self.settings.drain):
            logger.warning("%d commands were not answered in time; their outcome is in the log", pending.total)
        await self._subscriptions.aclose()
        if parts.ownership.mixed:
            # perhaps only this program can read what it has decided
            await parts.projector.catch_up(LEAVE_S)
        await parts.ownership.leave()
        if not await parts.projector.stop(max(LEAVE_S, deadline - time.monotonic())):
            logger.warning("the projection did not finish in time; the next start goes on from its checkpoint")
        await parts.anchor.leave(LEAVE_S)
        try:
            async with asyncio.timeout(LEAVE_S):
                await parts.ownership.close()
        except TimeoutError:
            logger.warning("the leases were not given back; they run out by themselves")

    async def _close(self) -> None:
        self._closed = True
        await self._subscriptions.aclose()
        await self._closing.aclose()
