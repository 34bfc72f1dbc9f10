"""Live projection: one session after another, until the projector is stopped.

A session claims the worker's partitions and projects them. It ends when the partitions change, and whenever something
goes wrong. The projector then decides what to wait for, and begins the next one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine

from kernel.actors.residents import Residents
from kernel.app import App
from kernel.errors import LogError
from kernel.governance.pace import IDLE_S, Pace, unpaced
from kernel.log.base import EventLog
from kernel.log.repeats import Repeats
from kernel.projector.committer import AWAY, Committer, Threads, one_thread
from kernel.projector.context import ProjectorContext
from kernel.projector.parking import ParkingLog
from kernel.projector.pausing import Pauses, ProjectionPaused
from kernel.projector.progress import ReadProgress
from kernel.projector.session import Session
from kernel.projector.unknown import UnknownAggregates
from kernel.settings import Settings
from kernel.telemetry.metrics import FENCED, SESSIONS_FAILED
from kernel.telemetry.tracing import NO_TRACING, Tracer
from projections.database import is_infrastructure
from projections.errors import Fenced

logger = logging.getLogger("eskernel.projector")

Verify = Callable[[], Coroutine[Any, Any, None]]
FENCED_MOST = 3
"""After a fence it goes on at the latest after the pause that follows so many failures."""
UNSURE = 4
"""A worker whose leases are in doubt looks again after the pause that follows so many failures."""
STARTING, RUNNING, NO_PARTITIONS = "starting", "running", "waiting for partitions"


@dataclass(frozen=True, slots=True)
class _Work:
    """What a projector works on: the partitions that the worker holds, and those of some projections instead."""

    held: frozenset[int]
    shares: dict[str, frozenset[int]]

    @property
    def all(self) -> frozenset[int]:
        return self.held.union(*self.shares.values())


_NOTHING = _Work(frozenset(), {})


class Projector:
    """Keeps the live projections of an app up to date.

    It works on the partitions that it was given with `assign`, of the generations that its program follows. It reads
    the whole log for them: passing over what is another worker's costs less than a filter does on the server.

    Args:
        residents: the live aggregates, whose actors fold.
        holds: says whether a partition is still ours, as far as can be known without asking.
        unknown: counts what is passed over, since the app does not declare the aggregate.
        threads: where statements run.

    Attributes:
        state: what it does, or waits for; for people.
        trouble: why the last session ended, until something is written again; empty otherwise.
        progress: what is read, in hand, and written.
        committer: writes the batches.
        pauses: the projections at which too many aggregates fail.
    """

    def __init__(
        self,
        app: App,
        log: EventLog,
        engine: Engine,
        residents: Residents,
        holds: Callable[[int], bool],
        settings: Settings | None = None,
        pace: Pace | None = None,
        tracing: Tracer = NO_TRACING,
        unknown: UnknownAggregates | None = None,
        threads: Threads = one_thread,
    ) -> None:
        settings = settings or Settings()
        self._holds = holds
        self._residents = residents
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._wanted = _NOTHING
        self._owned = _NOTHING
        # set while the session at work is to end: for a stop, or for other partitions
        self._interrupted = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.state = STARTING
        self.trouble = ""
        self._repeats = Repeats()
        self.pauses = Pauses(app.projections, settings.dead_letters)
        self.progress = ReadProgress(log.subjects.partitions)
        self.committer = Committer(settings.consumer.backoff, self._interrupted, self._set_state, threads)
        self._context = ProjectorContext(
            app=app,
            log=log,
            engine=engine,
            residents=residents,
            plan=app.plan(engine.dialect),
            settings=settings,
            pace=pace or unpaced(),
            tracing=tracing,
            committer=self.committer,
            progress=self.progress,
            unknown=unknown or UnknownAggregates(app),
            parkings=ParkingLog("for", app.projections),
            pauses=self.pauses,
            readers=threads("eskernel-read"),
            interrupted=self._interrupted,
            running=lambda: self._set_state(RUNNING),
        )

    def _set_state(self, state: str) -> None:
        self.state = (self.pauses.describe() or RUNNING) if state == RUNNING else state
        if state == RUNNING:
            self.trouble = ""

    @property
    def position(self) -> int:
        """Stream sequence up to which everything is projected."""
        return self.progress.projected

    @property
    def partitions(self) -> frozenset[int]:
        """The partitions that it works on, for whatever projection."""
        return self._wanted.all

    def projects(self, name: str, partition: int) -> bool:
        """Return whether it keeps a partition of a projection up to date, as far as can be known without asking."""
        share = self._wanted.shares.get(name)
        if share is None:
            return partition in self._wanted.held and self._holds(partition)
        return partition in share

    def assign(self, partitions: frozenset[int], shares: Mapping[str, frozenset[int]] | None = None) -> None:
        """Work on these partitions from now on; what is under way for others is written or given up first.

        Args:
            partitions: those of each projection. This worker holds them.
            shares: those of some projections instead, by name, where not each worker declares the same version. This
                worker need not hold them.
        """
        wanted = _Work(partitions, dict(shares or {}))
        if wanted != self._wanted:
            if not self._wanted.all:
                self.state = STARTING
            self._wanted = wanted
            self._interrupted.set()

    def begin_again(self) -> None:
        """Look again which generations there are, and claim them."""
        self._interrupted.set()

    async def catch_up(self, timeout: float) -> bool:
        """Wait until everything is written that the log has now; return whether that took at most `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                last = (await self._context.log.info()).last
                while self._owned.all and not self.progress.has_written(last):  # noqa: ASYNC110 - it lasts moments
                    await asyncio.sleep(0.01)
        except (TimeoutError, LogError):
            return False
        return True

    async def released(self) -> None:
        """Wait until nothing is under way for partitions that were taken away with `assign`."""
        while self._owned.all - self._wanted.all:
            self._idle.clear()
            await self._idle.wait()

    async def run(self, verify: Verify) -> None:
        """Project until `stop`; come back from every failure that passes with time.

        Args:
            verify: called when the fence was met: makes sure of what is still ours, and calls `assign` where that has
                changed.
        """
        failures = 0
        while not self._stopping:
            self._interrupted.clear()
            # to claim what may be another's by now would stop that worker for a moment
            held = frozenset(filter(self._holds, self._wanted.held))
            lost = self._wanted.held - held
            self._owned = _Work(held, {name: share - lost for name, share in self._wanted.shares.items()})
            self._idle.set()
            if not self._owned.all:
                self.state = NO_PARTITIONS
                if self._wanted.all:
                    # a lease is in doubt, and no event follows when the doubt ends
                    await self.committer.rest(UNSURE)
                else:
                    await self._interrupted.wait()
                continue
            began_at, fenced = self.position, False
            try:
                await self._project()
            except ProjectionPaused:
                continue
            except Fenced as error:
                self._note("fenced", error, logging.INFO, "projection goes on (a rebuild, or another worker)")
                FENCED.inc()
                fenced = True
                await verify()
            except LogError as error:
                self._note("log", error, logging.WARNING, "projection waits for the log")
                self.state = f"waiting for the log: {error}"
            except Exception as error:
                if is_infrastructure(error):
                    self._note("database", error, logging.WARNING, "projection waits for the database")
                    self.state = AWAY
                else:
                    self._note("other", error, logging.ERROR, "projection failed; it will be tried again")
                    self.state = f"failing: {self.trouble}"
            if not self._interrupted.is_set():
                failures = failures + 1 if self.position == began_at else 1
                # a deployment moves partitions several times within seconds, and readers wait for each
                await self.committer.rest(min(failures, FENCED_MOST) if fenced else failures)
        self._owned = _NOTHING
        self._idle.set()

    def _note(self, cause: str, error: Exception, level: int, what: str) -> None:
        """Count a failure, and log it; one that comes back again and again only once in a while."""
        SESSIONS_FAILED.labels(cause=cause).inc()
        text = str(error).splitlines()[0] if str(error) else ""
        unexpected = cause == "other"
        self.trouble = f"{type(error).__name__}: {text}" if unexpected else text
        if (more := self._repeats.due(f"{cause}: {self.trouble}")) is not None:
            logger.log(level, "%s: %s%s", what, self.trouble, more, exc_info=error if unexpected else None)

    async def _project(self) -> None:
        """Claim the partitions and project them, until interrupted or until something fails."""
        session = await Session.claim(self._context, self._owned.held, self._owned.shares)
        try:
            if session.idle:
                await self._wait_for_tables(session)
            else:
                await session.run()
        finally:
            await session.end()

    async def _wait_for_tables(self, session: Session) -> None:
        """Wait until there is something to project: a build, or a person, ends the wait."""
        self._set_state(RUNNING)
        while not self._interrupted.is_set():
            try:
                async with asyncio.timeout(IDLE_S):
                    await self._interrupted.wait()
            except TimeoutError:
                await session.notice_resume_by_person()

    def start(self, verify: Verify) -> None:
        """Have `run` work in a task of its own."""
        self._tasks.append(asyncio.create_task(self.run(verify)))

    async def stop(self, timeout: float) -> bool:
        """Finish the batch under way and stop; return whether that took no longer than `timeout` seconds."""
        self._stopping = True
        self._interrupted.set()
        if not self._tasks:
            return True
        _, late = await asyncio.wait(self._tasks, timeout=timeout)
        return not late

    async def close(self) -> None:
        """Give up the batch under way, if there is one, and end the threads."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self.committer.close()
        self._context.readers.shutdown(wait=False, cancel_futures=True)
