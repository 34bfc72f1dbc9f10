"""The checks of a worker's components, one for each, run side by side at an interval."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sqlalchemy import Engine, insert

from kernel.errors import LogError, Replaced, Unavailable
from kernel.log import JetStreamLog
from kernel.monitoring.health import Health, NotWorking
from kernel.monitoring.progress import overdue
from kernel.monitoring.watchdog import Watchdog
from kernel.partitions.ownership import Ownership
from kernel.projector.live import RUNNING, Projector
from kernel.projector.progress import ReadProgress
from kernel.reactions.reactor import Reactors
from kernel.telemetry.loop_lag import LoopLag
from kernel.transport.connection import NatsConnection
from projections.tables import stream

PROBE_S = 5.0
"""Longest time for one check."""
QUICK = ("appends", "leases", "projection")
"""Components whose checks ask no other process, or hardly: they are checked more often while they do not work."""
RECHECK_S = 0.5
LATE_S = 2.0
"""An event loop that is late by more is not responsive."""
Check = Callable[[], Coroutine[Any, Any, str]]
"""Returns what is known of a component that works; raises if it does not."""


class Probes:
    """Runs the checks and reports what they find to `Health`.

    Args:
        checks: by the name of the component.
        observed: functions that return for how many seconds work has been standing still, by component.
    """

    def __init__(
        self, health: Health, checks: dict[str, Check], observed: dict[str, Callable[[], float]] | None = None
    ) -> None:
        self._health, self.checks, self._observed = health, checks, observed or {}
        self._under_way: dict[str, tuple[float, asyncio.Future[str]]] = {}

    async def probe(self) -> None:
        """Check every component, all at the same time; one whose check does not answer in time does not work."""
        await asyncio.gather(*(self._probe(name, check) for name, check in self.checks.items()))

    async def recheck(self) -> None:
        """Check again what is quick to check and does not work, or stands still: a change shows within a second."""
        changing = [name for name in QUICK if name in self.checks and not self._health.components[name].ok]
        changing += [name for name, observe in self._observed.items() if overdue(observe()) and name not in changing]
        await asyncio.gather(*(self._probe(name, self.checks[name]) for name in changing))

    async def _probe(self, name: str, check: Check) -> None:
        began, probing = self._under_way.get(name, (0.0, None))
        if probing is None or probing.done():
            began, probing = time.perf_counter(), asyncio.ensure_future(check())
            # its result is perhaps read only when it is done, or never
            probing.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._under_way[name] = began, probing
        # a check that hangs goes on: another would only wait for the same
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

    def close(self) -> None:
        """Give up the checks under way."""
        for _, probing in self._under_way.values():
            probing.cancel()


# the checks, one for each component


async def check_log(connection: NatsConnection, log: JetStreamLog, progress: ReadProgress) -> str:
    """Make sure that the log answers, and is the one that was opened; reconnect where the connection is dead."""
    if not connection.is_connected:
        connection.revive()
        raise NotWorking(f"not connected: {connection.trouble or 'the connection was lost'}")
    try:
        info = await log.verify()
    except Replaced:
        raise
    except LogError as error:
        connection.revive()
        if isinstance(error, Unavailable) and connection.is_connected:
            # the connection can be dead while the client believes itself connected
            await connection.force_reconnect()
        raise NotWorking(f"{error}: {connection.trouble}" if connection.trouble else str(error)) from None
    progress.note_end(info.last)
    return f"{info.commits} commits, the last is {info.last}"


async def check_leases(ownership: Ownership) -> str:
    """Say whether this worker holds partitions, where it should."""
    held, total, share = ownership.holdings
    detail = f"holding {held} of {total} partitions"
    if not held and share:
        raise NotWorking(detail)
    return detail


async def check_commands() -> str:
    """Say that commands are taken: they are, from the start of the service to its stop."""
    return "taken"


async def check_reactions(reactors: Reactors) -> str:
    """Say that policies and effects are at work, or which of them can't be."""
    if trouble := reactors.trouble:
        raise NotWorking(trouble)
    return f"{len(reactors.report())} at work"


async def check_loop(loop_lag: LoopLag, watchdog: Watchdog) -> str:
    """Say how late the event loop was since the last check, and because of what."""
    lag, blocked = loop_lag.worst("health"), watchdog.worst()
    cause = f": {blocked}" if blocked is not None else ""
    if lag > LATE_S:
        raise NotWorking(f"the event loop was late by {lag:.1f} s{cause}")
    return f"late by {lag * 1000:.0f} ms at most{cause}"


class DatabaseCheck:
    """The check of the projection database: it takes what is written.

    Args:
        worker: marks the row that is written and taken back.
    """

    def __init__(self, engine: Engine, projector: Projector, worker: str) -> None:
        self._engine, self._projector = engine, projector
        self._mark = f"?{worker}"
        self._pool = ThreadPoolExecutor(1, "eskernel-probe")
        self._written = 0

    async def check(self) -> str:
        """Write, unless a batch was just written, or is being written."""
        written, writing = self._projector.progress.done, self._projector.committer.lasting
        if self._projector.state != RUNNING or (written == self._written and not 0 < writing < PROBE_S):
            await asyncio.get_running_loop().run_in_executor(self._pool, self._write_nothing)
        self._written = self._projector.progress.done
        return self._engine.dialect.name

    def _write_nothing(self) -> None:
        """Write a row of our own and take it back: no other connection sees it, or waits for it."""
        with self._engine.connect() as connection, connection.begin() as transaction:
            connection.execute(insert(stream).values(app=self._mark, created="", partitions=0, epoch=0))
            transaction.rollback()

    def close(self) -> None:
        """End the thread, unless it hangs."""
        self._pool.shutdown(wait=False, cancel_futures=True)
