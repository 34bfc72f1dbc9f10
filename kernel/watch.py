"""What a worker looks after while it runs: its log and database, its backlog, its dead letters, its own health."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from sqlalchemy import Engine, text

from kernel.app import App
from kernel.health import Health
from kernel.leases import Leases
from kernel.log import JetStreamLog, LogError, Replaced, StreamInfo, Unavailable
from kernel.log.wire import Wire
from kernel.logs import about
from kernel.metrics import LAG, PARKED, QUARANTINED, RETRIES
from kernel.ownership import Ownership
from kernel.projector import NO_PARTITIONS, Projector
from kernel.settings import Settings
from projections import dead_letters
from projections.database import reads

logger = logging.getLogger("eskernel")

DATABASE_S = 5.0
WRITE_S = 10.0
"""A batch that takes so long to write is said to be stuck."""
BACKLOG_WARN = 10_000
"""Commits behind which the projections are said to be behind; they have caught up below a tenth of it."""


class Watch:
    """The regular jobs of one worker, called by its scheduler.

    Args:
        created: when the stream was made, as it was at start.
        lost: stops the service, with a reason.
    """

    def __init__(
        self,
        app: App,
        settings: Settings,
        wire: Wire,
        log: JetStreamLog,
        created: str,
        engine: Engine,
        projector: Projector,
        leases: Leases,
        ownership: Ownership,
        health: Health,
        lost: Callable[[str], None],
    ) -> None:
        self._app, self._settings, self._wire, self._log, self._created = app, settings, wire, log, created
        self._engine, self._projector, self._leases, self._ownership = engine, projector, leases, ownership
        self._health, self._lost = health, lost
        self._names = {declared.name for declared in app.projections}
        self._behind = False
        self._asking: asyncio.Future[None] | None = None
        self._asked = 0.0

    async def detect_backlog(self) -> None:
        """Compare the log's end with the projections' position; say so when they fall behind or have caught up."""
        info = await self.ask_log()
        behind = max(0, info.last - self._projector.position)
        LAG.set(behind)
        if behind > BACKLOG_WARN and not self._behind:
            logger.warning("the projections are %d commits behind", behind)
        elif behind < BACKLOG_WARN // 10 and self._behind:
            logger.info("the projections have caught up")
        self._behind = behind > (BACKLOG_WARN // 10 if self._behind else BACKLOG_WARN)

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
            except dead_letters.NoSuchLetter:
                pass  # somebody was faster
        return done

    async def probe(self) -> None:
        """Find out whether the log and the database answer, by asking them something."""
        await self._probe_log()
        await self._probe_database()
        components = self._health.components
        refusal = self._log.appender.refusal
        components["appends"].set(not refusal, refusal or "taken")
        state = self._projector.state if self._names else "none"
        if (writing := self._projector.writing.lasting) > WRITE_S:
            state = f"writing a batch for {writing:.0f} s"
        components["projection"].set(state in ("running", "starting", "none", NO_PARTITIONS), state)
        held, share = len(self._leases.held), self._leases.share(self._ownership.members)
        components["leases"].set(held > 0 or not share, f"holding {held} of {self._leases.partitions} partitions")
        components["commands"].set(True, "taken")

    async def _probe_log(self) -> None:
        started = time.perf_counter()
        component = self._health.components["log"]
        if not self._wire.is_connected:
            self._wire.revive()
            component.set(False, f"not connected: {self._wire.trouble or 'the connection was lost'}")
            return
        try:
            info = await self.ask_log()
            component.set(True, f"{info.commits} commits, the last is {info.last}", time.perf_counter() - started)
        except Replaced as error:
            component.set(False, str(error), time.perf_counter() - started)
        except LogError as error:
            why = f"{error}: {self._wire.trouble}" if self._wire.trouble else str(error)
            component.set(False, why, time.perf_counter() - started)
            self._wire.revive()
            if isinstance(error, Unavailable) and self._wire.is_connected:
                # the connection can be dead while the client believes itself connected
                await self._wire.force_reconnect()

    async def _probe_database(self) -> None:
        component = self._health.components["database"]
        if self._asking is None or self._asking.done():
            self._asked = time.perf_counter()
            self._asking = asyncio.ensure_future(asyncio.to_thread(self._ask_database))
        started = self._asked
        try:
            async with asyncio.timeout(DATABASE_S):
                await asyncio.shield(self._asking)
        except TimeoutError:
            component.set(False, f"no answer for {time.perf_counter() - started:.0f} s", time.perf_counter() - started)
        except Exception as error:
            component.set(False, str(error).splitlines()[0], time.perf_counter() - started)
        else:
            component.set(True, self._engine.dialect.name, time.perf_counter() - started)

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
        return info

    def _ask_database(self) -> None:
        with reads(self._engine).connect() as connection:
            connection.execute(text("SELECT 1"))
