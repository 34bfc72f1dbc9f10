"""What a worker looks after while it runs: its log, its database, its dead letters, its own health."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sqlalchemy import Engine, insert

from kernel.app import App
from kernel.errors import LogError, Replaced, Unavailable
from kernel.log import JetStreamLog, StreamInfo
from kernel.monitoring.backlog import Level
from kernel.monitoring.detector import Lookout
from kernel.monitoring.health import Health
from kernel.partitions.leases import Leases
from kernel.partitions.ownership import Ownership
from kernel.projector.live import NO_PARTITIONS, Projector
from kernel.settings import Settings
from kernel.telemetry.logging import about
from kernel.telemetry.metrics import PARKED, QUARANTINED, RETRIES
from kernel.transport.connection import NatsConnection
from projections import NoSuchLetter, dead_letters
from projections.tables import stream

logger = logging.getLogger("eskernel.monitoring")

PROBE_S = 5.0
"""For each probe."""
WRITE_S = 10.0
"""A batch that takes so long to write is said to be stuck."""
LATE_S = 2.0
"""An event loop that is late by more is not responsive."""
Probe = Callable[[], Coroutine[Any, Any, str]]
"""Returns what is known of a component that works; raises if it doesn't."""


class NotWorking(Exception):
    """A component does not work; the message says why."""


class Watch:
    """The regular jobs of one worker, called by its scheduler.

    Args:
        created: when the stream was made, as it was at start.
        loop_lag: returns the most seconds that the event loop was late since the last call.
        lost: stops the service, with a reason.
    """

    def __init__(
        self,
        app: App,
        settings: Settings,
        connection: NatsConnection,
        log: JetStreamLog,
        created: str,
        engine: Engine,
        projector: Projector,
        leases: Leases,
        ownership: Ownership,
        health: Health,
        lookout: Lookout,
        loop_lag: Callable[[], float],
        lost: Callable[[str], None],
    ) -> None:
        self._app, self._settings, self._connection, self._log, self._created = app, settings, connection, log, created
        self._engine, self._projector, self._leases, self._ownership = engine, projector, leases, ownership
        self._health, self._lookout, self._loop_lag, self._lost = health, lookout, loop_lag, lost
        self._names = {declared.name for declared in app.projections}
        self._database = ThreadPoolExecutor(1, "eskernel-probe")
        self._mark = f"?{leases.worker}"
        self._written = 0
        self._under_way: dict[str, tuple[float, asyncio.Future[str]]] = {}
        self._probes: dict[str, Probe] = {
            "log": self._ask_log,
            "appends": self._ask_appends,
            "database": self._ask_database,
            "leases": self._ask_leases,
            "projection": self._ask_projection,
            "commands": self._ask_commands,
            "loop": self._ask_loop,
        }

    async def retry_dead_letters(self) -> None:
        """Fold again what failed with something transient, where the partition is ours."""
        for one in await asyncio.to_thread(self._retry_due):
            RETRIES.labels(outcome="failed" if one.left else "ok").inc()
            logger.log(
                logging.WARNING if one.left else logging.INFO,
                "retried %s %s for %s: %d folded, %d left%s",
                one.aggregate, one.aggregate_id, one.projection, one.folded, one.left,
                f": {one.error}" if one.left else "",
                extra=about(one.aggregate, one.aggregate_id, projection=one.projection),
            )  # fmt: skip

    def _retry_due(self) -> list[dead_letters.Retried]:
        parked, quarantined = dead_letters.counts(self._engine)
        PARKED.set(parked)
        QUARANTINED.set(quarantined)
        done = []
        for one in dead_letters.due(self._engine, time.time()) if parked else ():
            partition = self._log.subjects.partition(one.aggregate, one.aggregate_id)
            if not self._leases.holds(partition) or one.projection not in self._names:
                continue
            pause = None
            if one.attempts < self._settings.dead_letters.retries:
                pause = min(self._settings.dead_letters.retry_after * 2**one.attempts, dead_letters.MAX_PAUSE_S)
            plan = dead_letters.plan_of(self._app.plan(), one.projection)
            try:
                done.append(
                    dead_letters.retry(self._engine, plan, one.projection, one.aggregate, one.aggregate_id, pause)
                )
            except NoSuchLetter:
                pass  # somebody was faster
        return done

    async def probe(self) -> None:
        """Find out whether each component works, all at the same time; one that does not answer in time does not."""
        await asyncio.gather(*(self._probe(name, look) for name, look in self._probes.items()))

    async def _probe(self, name: str, look: Probe) -> None:
        began, probing = self._under_way.get(name, (0.0, None))
        if probing is None or probing.done():
            began, probing = time.perf_counter(), asyncio.ensure_future(look())
            # what it comes to is perhaps looked at only when it is done, or never
            probing.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._under_way[name] = began, probing
        # one that hangs goes on: whatever it waits for would only be asked once more
        await asyncio.wait({probing}, timeout=PROBE_S)
        took = time.perf_counter() - began
        if not probing.done():
            self._health.set(name, False, f"no answer for {took:.0f} s", took)
            return
        if probing.cancelled():
            return
        try:
            self._health.set(name, True, probing.result(), took)
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._health.set(name, False, text, took)

    async def _ask_loop(self) -> str:
        lag = self._loop_lag()
        if lag > LATE_S:
            raise NotWorking(f"the event loop was late by {lag:.1f} s")
        return f"late by {lag * 1000:.0f} ms at most"

    async def _ask_appends(self) -> str:
        if refusal := self._log.appender.refusal:
            raise NotWorking(refusal)
        return f"taken; pressure {self._lookout.pressure.level.name.lower()}"

    async def _ask_commands(self) -> str:
        return "taken"

    async def _ask_leases(self) -> str:
        held, share = len(self._leases.held), self._leases.share(self._ownership.members)
        detail = f"holding {held} of {self._leases.partitions} partitions"
        if not held and share:
            raise NotWorking(detail)
        return detail

    async def _ask_projection(self) -> str:
        state = self._projector.state if self._names else "none"
        if (writing := self._projector.committer.lasting) > WRITE_S:
            raise NotWorking(f"writing a batch for {writing:.0f} s")
        if state not in ("running", "starting", "none", NO_PARTITIONS):
            raise NotWorking(state)
        critical = [
            f"{one.projection} is {round(one.behind)} commits and {one.age:.0f} s behind"
            for one in self._lookout.backlog.projections.values()
            if one.level == Level.CRITICAL
        ]
        if critical:
            raise NotWorking(f"{state}; {', '.join(critical)}")
        return state

    async def _ask_log(self) -> str:
        if not self._connection.is_connected:
            self._connection.revive()
            raise NotWorking(f"not connected: {self._connection.trouble or 'the connection was lost'}")
        try:
            info = await self.ask_log()
        except Replaced:
            raise
        except LogError as error:
            self._connection.revive()
            if isinstance(error, Unavailable) and self._connection.is_connected:
                # the connection can be dead while the client believes itself connected
                await self._connection.force_reconnect()
            raise NotWorking(
                f"{error}: {self._connection.trouble}" if self._connection.trouble else str(error)
            ) from None
        return f"{info.commits} commits, the last is {info.last}"

    async def _ask_database(self) -> str:
        written, writing = self._projector.progress.done, self._projector.committer.lasting
        if self._projector.state != "running" or (written == self._written and not 0 < writing < PROBE_S):
            # a batch that was just written says the same, and one that is being written is about to
            await asyncio.get_running_loop().run_in_executor(self._database, self._write_nothing)
        self._written = self._projector.progress.done
        return self._engine.dialect.name

    def _write_nothing(self) -> None:
        """Write a row of our own and take it back: nobody else sees it, or waits for it."""
        with self._engine.connect() as connection, connection.begin() as transaction:
            connection.execute(insert(stream).values(app=self._mark, created="", partitions=0, epoch=0))
            transaction.rollback()

    def close(self) -> None:
        """Let go of what hangs."""
        for _, probing in self._under_way.values():
            probing.cancel()
        self._database.shutdown(wait=False, cancel_futures=True)

    async def ask_log(self) -> StreamInfo:
        """Ask the log, and make sure that it is the one that this service started with, and has not lost its end.

        Raises:
            Replaced: it is not; the service stops.
        """
        # as they were before asking: they move on meanwhile
        position, acknowledged = self._projector.position, self._log.appender.highest
        try:
            info = await self._log.info()
            if info.created != self._created:
                raise Replaced(f"the stream was created at {info.created}, the one at start at {self._created}")
            if info.last < max(position, acknowledged):
                raise Replaced(
                    f"the log ends at {info.last}, and had {max(position, acknowledged)} commits before: it was "
                    "truncated, or restored from an older backup"
                )
        except Replaced as error:
            self._lost(f"{error}; restore it, or start with an empty database and data directory")
            raise
        self._projector.progress.heard(info.last)
        return info
