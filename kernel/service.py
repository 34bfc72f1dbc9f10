"""The service: everything that one worker runs, put together, from start to drained stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from functools import partial
from typing import Any

import orjson
from sqlalchemy import Engine

from kernel.actors.residents import Residents
from kernel.actors.system import Actors
from kernel.app import App
from kernel.commands.gateway import CommandGateway
from kernel.governance.governor import Governor
from kernel.governance.limits import Overrides
from kernel.governance.remote_pace import following
from kernel.log import JetStreamLog, open_log
from kernel.monitoring.alerting import Alerts
from kernel.monitoring.detector import Lookout
from kernel.monitoring.health import Health
from kernel.monitoring.http import HttpServer
from kernel.monitoring.probes import PROBE_S, Watch
from kernel.monitoring.signals import Gatherer
from kernel.partitions.leases import Leases
from kernel.partitions.ownership import Ownership
from kernel.projector.live import Projector
from kernel.projector.rebuild import RebuildProgress, build_missing, clean_up
from kernel.runtime.directory import DataDirectory, running_as, worker_name
from kernel.runtime.nats_server import SYNCED, EmbeddedServer, embedded_commits
from kernel.runtime.scheduler import Scheduler
from kernel.settings import Settings
from kernel.telemetry.loop_lag import LoopLag
from kernel.telemetry.metrics import (
    APPENDS_IN_FLIGHT,
    APPENDS_QUEUED,
    CONNECTED,
    CONNECTION_EVENTS,
    READ_BACKS,
    RECONNECTS,
    SHELLS,
    count_connection_error,
)
from kernel.telemetry.tracing import open_tracing
from kernel.transport.connection import NatsConnection, publish_frame
from kernel.transport.dial import dial
from kernel.transport.jetstream_api import version_text
from kernel.transport.survey import open_survey
from projections.checkpoints import knows, register
from projections.database import open_database

logger = logging.getLogger("eskernel.service")


LEAVE_S = 3.0
"""For each thing that a stopping worker lets go of."""


class Service:
    """One worker of a running app: all there is, or one of several that share its partitions.

    Args:
        spec: how the app was named, for other commands to find it.
        number: which worker of a group this is; it then leaves the data directory to the group's parent. 0 is none.
    """

    def __init__(self, app: App, settings: Settings | None = None, spec: str = "", number: int = 0) -> None:
        self.app = app
        self.settings = settings or Settings()
        self.worker = worker_name()
        self.alerts = Alerts(app.on_alert, self.worker)
        self.scheduler = Scheduler()
        # a probe may take as long as it does, and come late
        patience = 3 * self.settings.connection.health_check_interval + 2 * PROBE_S
        self.health = Health(self.alerts, lambda: self.scheduler.idle_for, patience)
        self._loop_lag = LoopLag()
        self.directory = DataDirectory(self.settings.data, app.name)
        self.http = HttpServer(self.health, self.settings.http)
        self.stopped = asyncio.Event()
        self.failure = ""
        self.number = number
        self.nats_url = ""
        self.database_url = ""
        self.durability = ""
        self._spec = spec
        self._said = ("", 0.0)
        self._server: EmbeddedServer | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._connection: NatsConnection | None = None
        self._engine: Engine | None = None
        self._log: JetStreamLog | None = None
        self._projector: Projector | None = None
        self._gateway: CommandGateway | None = None
        self._actors: Actors | None = None
        self._projecting: asyncio.Task[None] | None = None
        self._frames: list[bytes] = []
        self._read_backs = 0
        self._listening: list[Any] = []
        self._leases: Leases | None = None
        self._ownership: Ownership | None = None
        self._governor: Governor | None = None
        self._gatherer: Gatherer | None = None
        self._watch: Watch | None = None

    async def start(self) -> None:
        """Start everything; when it returns, commands are taken.

        Raises:
            AlreadyRunning, ConnectionError, LogError, SchemaError, SettingsError, OSError: what stands in the way, and
                what to do.
        """
        try:
            await self._start()
        except BaseException:
            self.stopped.set()
            await self._close()
            raise

    async def _start(self) -> None:
        settings = self.settings
        self._governor = Governor(self.app, settings.rates)
        if not self.number:
            self.directory.hold()
        self.nats_url = await self._start_server() if settings.embedded else ",".join(settings.connection.servers)
        self.database_url = settings.database.url or f"sqlite:///{self.directory.path / 'projections.db'}"
        self._engine = engine = open_database(self.database_url, **settings.database.options())
        self._connection = connection = await dial(
            settings,
            name=f"eskernel {self.app.name}",
            url=self.nats_url if settings.embedded else "",
            on_event=self._note_connection_event,
        )
        CONNECTED.set(1)
        log = self._log = await open_log(
            connection,
            self.app.name,
            embedded_commits(settings),
            create=not await asyncio.to_thread(knows, engine, self.app.name),
            worker=self.worker,
        )
        info = await log.info()
        self.durability = info.durability
        if self._server is not None and settings.stream.sync:
            self.durability = SYNCED
        logger.info(
            "log: %d commits (%d to %d) in %d partitions on nats-server %s; %s",
            info.commits, info.first, info.last, info.partitions, version_text(connection), self.durability,
        )  # fmt: skip
        self._leases = leases = Leases(
            connection, log.stream, self.worker, info.partitions, ttl=settings.lease, replicas=settings.stream.replicas
        )
        await leases.start()
        if dead := self.directory.dead():
            # nobody else knows that they are: the others wait until the leases run out
            await leases.bury(dead)
            self.directory.forget(dead)
        self.directory.mark(self.worker)
        async with leases.alone("start"):
            # workers that start together build what is missing one after the other: the second finds it done
            await self._prepare(log, engine)
        self._start_worker(log, engine, leases)
        assert self._gateway is not None
        assert self._ownership is not None
        self._listening.append(await connection.listen(log.subjects.commands(), self._gateway.receive, queue="workers"))
        await self._ownership.start()
        self._listening.append(await connection.listen(log.subjects.service("status"), self._status))
        await self._share_limits(connection, log.subjects.service("limits"))
        assert self._projector is not None
        assert self._gatherer is not None
        self._watch = watch = Watch(
            self.app,
            settings,
            connection,
            log,
            info.created,
            engine,
            self._projector,
            leases,
            self._ownership,
            self.health,
            self._lookout,
            partial(self._loop_lag.worst, "health"),
            self._lost,
        )
        self._loop_lag.start()
        await watch.probe()
        log.appender.verify = watch.ask_log
        self._schedule(watch, self._ownership, leases)
        await self.http.start()
        if not self.number:
            running = running_as(self.app.name, self._spec, settings, self.nats_url, self.database_url, self.http.url)
            self.directory.describe(running)
        # what is here now stays: the collector need not look at it again and again
        gc.collect()
        gc.freeze()
        gc.set_threshold(200_000, 20, 100)

    async def _prepare(self, log: JetStreamLog, engine: Engine) -> None:
        """Make the database fit the program and the log."""

        def upgrade() -> None:
            from migrations import upgrade  # Alembic takes its time to load, and this is the one place for it

            upgrade(engine)

        # in a thread, and loaded there too: meanwhile the lease is renewed
        await asyncio.to_thread(upgrade)
        info = await log.info()
        register(engine, self.app.name, info.created, info.partitions, info.last)
        assert self._connection is not None
        # other workers may be at work, and live projection goes before
        async with following(self._connection, log.subjects, self.settings.rates.rebuild) as pace:
            await build_missing(self.app, log, engine, self._tell_building, pace)
        for declared in self.app.projections:
            clean_up(engine, declared)

    async def _start_server(self) -> str:
        self._server = EmbeddedServer(self.directory.path / "nats", sync=self.settings.stream.sync)
        url = await self._server.start()
        self._keeping = asyncio.create_task(self._server.keep())
        return url

    def _start_worker(self, log: JetStreamLog, engine: Engine, leases: Leases) -> None:
        settings = self.settings
        assert self._connection is not None
        assert self._governor is not None
        tracing = open_tracing(self.app, settings.tracing.enabled)
        self._gateway = gateway = CommandGateway(
            self.app,
            log,
            log.subjects,
            self._publish,
            settings.commands.pending,
            leases.holds,
            settings.commands.pending_per_aggregate,
            self._governor,
            tracing,
        )
        self._actors = gateway.actors = Actors(gateway)
        gateway.residents = self.residents = Residents(
            gateway.actors, settings.passivation.count, settings.passivation.idle, settings.passivation.memory
        )
        self._projector = projector = Projector(
            self.app,
            log,
            log.subjects,
            engine,
            gateway.actors,
            self.residents,
            leases.holds,
            self._verify,
            settings,
            self._governor.live,
            tracing,
        )
        self._gatherer = gatherer = Gatherer(
            gateway, log.appender, projector, self._loop_lag, lambda: self._lookout.backlog.worst
        )
        self._lookout = Lookout(
            settings,
            [declared.name for declared in self.app.projections],
            projector.progress,
            lambda: leases.held,
            log.appender,
            lambda: (gateway.pending, gatherer.slowest_append),
            self.alerts,
        )
        self._ownership = Ownership(
            self._connection, log.subjects, leases, gateway, projector if self.app.projections else None
        )
        if self.app.projections:
            self._projecting = asyncio.create_task(projector.run())

    async def _verify(self) -> None:
        assert self._ownership is not None
        await self._ownership.verify()

    def _schedule(self, watch: Watch, ownership: Ownership, leases: Leases) -> None:
        every = self.scheduler.every
        every(leases.ttl / 3, ownership.renew_leases)
        every(0.5, self._passivate)
        every(1.0, self._publish_metrics)
        every(1.0, self._govern)
        every(self.settings.backlog.interval, self._lookout.measure_pressure)
        every(self.settings.connection.health_check_interval, watch.probe)
        if self.app.projections:
            every(self.settings.backlog.interval, self._lookout.detect_backlog)
            every(min(1.0, self.settings.dead_letters.retry_after), watch.retry_dead_letters)
        self.scheduler.start()

    async def _passivate(self) -> None:
        self.residents.measure()
        await asyncio.sleep(0)
        while self.residents.sweep():  # noqa: ASYNC110 - gives way between slices
            await asyncio.sleep(0)

    def _publish_metrics(self) -> None:
        assert self._gateway is not None
        assert self._log is not None
        self._gateway.publish_metrics()
        READ_BACKS.inc(self._log.appender.read_backs - self._read_backs)
        self._read_backs = self._log.appender.read_backs
        assert self._actors is not None
        SHELLS.set(len(self._actors))
        queued, in_flight = self._log.appender.pressure
        APPENDS_QUEUED.set(queued)
        APPENDS_IN_FLIGHT.set(in_flight)

    def _govern(self) -> None:
        assert self._gatherer is not None
        assert self._governor is not None
        assert self._leases is not None
        self._governor.tick(self._gatherer.gather(), len(self._leases.held) / self._leases.partitions)

    async def _share_limits(self, connection: NatsConnection, subject: str) -> None:
        """Answer about limits, and have those that the other workers were given while they ran."""
        governor = self._governor
        assert governor is not None

        def answer(_subject: bytes, reply: bytes, payload: bytes, _headers: bytes | None) -> None:
            told = governor.answer(payload)
            if reply:
                self._publish(reply, orjson.dumps({**self._names(), **told}), b"")

        def told(one: dict[str, Any]) -> None:
            if (limits := one.get("limits")) is not None:
                governor.adopt(Overrides(**limits["overrides"]))

        self._listening.append(await connection.listen(subject, answer))
        ask = await open_survey(connection, subject, told)
        connection.reconnections.append(ask)
        ask()

    # answers

    def _publish(self, subject: bytes, payload: bytes, reply: bytes) -> None:
        if not self._frames:
            asyncio.get_running_loop().call_soon(self._send_frames)
        self._frames.append(publish_frame(subject, reply, payload))

    def _send_frames(self) -> None:
        frames, self._frames = self._frames, []
        if self._connection is not None:
            self._connection.send(b"".join(frames))

    def _status(self, _subject: bytes, reply: bytes, _payload: bytes, _headers: bytes | None) -> None:
        if reply:
            self._publish(reply, orjson.dumps(self.status()), b"")

    @property
    def partitions(self) -> list[int]:
        """The partitions that this worker holds."""
        return sorted(self._leases.held) if self._leases is not None else []

    def _names(self) -> dict[str, Any]:
        assert self._ownership is not None
        return {"worker": self.worker, "workers": list(self._ownership.members.workers)}

    def status(self) -> dict[str, Any]:
        """Return what `eskernel status` shows."""
        assert self._projector is not None
        assert self._gateway is not None
        assert self._leases is not None
        assert self._governor is not None
        return {
            "app": self.app.name,
            **self._names(),
            "number": self.number,
            "pid": os.getpid(),
            "partitions": self.partitions,
            "partition_count": self._leases.partitions,
            "durability": self.durability,
            "health": self.health.report(),
            "actors": len(self.residents),
            "memory": {"bytes": self.residents.memory, "limit": int(self.settings.passivation.memory)},
            "commands_pending": self._gateway.pending,
            "projection": {
                "state": self._projector.state,
                "position": self._projector.position,
                "behind": self._lookout.behind,
            },
            "limits": self._governor.show(),
            **self._lookout.report(),
            "alerts": self.alerts.sent,
            "jobs": self.scheduler.report(),
        }

    # events

    def _note_connection_event(self, event: str) -> None:
        CONNECTION_EVENTS.labels(event=event.split(":", maxsplit=1)[0]).inc()
        if event == "reconnected":
            RECONNECTS.inc()
        elif event.startswith("error"):
            count_connection_error(event)
        CONNECTED.set(event == "reconnected" or (event.startswith("error") and self._is_connected()))
        if self.stopped.is_set():
            return
        if event == "closed" and self._log is not None:
            # nats-py gives up after some errors of the server; nothing would ever work again
            self._lost("the connection to NATS was closed for good; the lines before say why")
        else:
            now = time.monotonic()
            # while a server is away the same is said several times a second
            if event != self._said[0] or now - self._said[1] > 10.0:
                self._said = (event, now)
                logger.warning("NATS: %s", event)

    def _is_connected(self) -> bool:
        return self._connection is not None and bool(self._connection.is_connected)

    def _lost(self, why: str) -> None:
        logger.error("stopping: %s", why)
        self.failure = why
        self.stopped.set()

    def _tell_building(self, progress: RebuildProgress) -> None:
        logger.info("building projections: %d of %d commits", progress.done, progress.total)

    # the end

    async def stop(self) -> None:
        """Drain and stop: commands under way are answered, the last batch is committed, leases are given back.

        All of it within the time that the settings give it, and a few seconds to let go.
        """
        deadline = time.monotonic() + self.settings.drain
        self.stopped.set()
        self.health.components["commands"].stop()
        if self._gateway is not None and not await self._gateway.drain(self.settings.drain):
            logger.warning("%d commands were not answered in time; their outcome is in the log", self._gateway.pending)
        for stop_listening in self._listening:
            await stop_listening()
        if self._ownership is not None:
            await self._ownership.leave()
        if self._projector is not None:
            await self._projector.stop()
        if self._projecting is not None:
            try:
                async with asyncio.timeout(max(LEAVE_S, deadline - time.monotonic())):
                    await asyncio.shield(self._projecting)
            except TimeoutError:
                logger.warning("the projection did not finish in time; the next start goes on from its checkpoint")
        if self._ownership is not None:
            try:
                async with asyncio.timeout(LEAVE_S):
                    await self._ownership.close()
            except TimeoutError:
                logger.warning("the leases were not given back; they run out by themselves")
        await self._close()

    async def _close(self) -> None:
        self.scheduler.stop()
        self._loop_lag.stop()
        if self._watch is not None:
            self._watch.close()
        await self.http.stop()
        if self._projecting is not None and not self._projecting.done():
            self._projecting.cancel()
            await asyncio.wait({self._projecting})
        if self._leases is not None:
            await self._leases.close()
        if self._log is not None:
            await self._log.close()
        if self._connection is not None and not self._connection.is_closed:
            await self._connection.close()
        if self._projector is not None:
            self._projector.close()
        if self._actors is not None:
            self._actors.close()
        if self._engine is not None:
            self._engine.dispose()
        self.alerts.close()
        if self._keeping is not None:
            self._keeping.cancel()
        if self._server is not None:
            await self._server.stop()
        self.directory.release()
