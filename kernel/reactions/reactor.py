"""The policies and effects of a worker: each works on the worker's partitions until it is stopped."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from aggregates.reacting import DeclaredReaction
from kernel.errors import LogError
from kernel.log.repeats import Repeats
from kernel.reactions import letters, store, timers
from kernel.reactions.context import ReactorContext
from kernel.reactions.session import Session
from kernel.reactions.timers import MICROS
from kernel.telemetry.metrics import (
    REACTION_AGE,
    REACTION_LAG,
    REACTION_PARKED,
    TIMERS_LATE,
    TIMERS_PENDING,
)
from projections.database import is_infrastructure
from projections.errors import Fenced

logger = logging.getLogger("eskernel.reactions")
Verify = Callable[[], Coroutine[Any, Any, None]]
PAUSES_S = (0.05, 0.2, 0.5, 1.0, 2.0)
"""Before it begins again, after so many failures in a row."""
LOOK_S = 1.0
"""Between two looks whether a person has ended a pause."""
TROUBLE_S = 5.0
"""One that has failed for so long, whenever it began again, is reported."""
COUNT_SHARE = 50
"""Counting takes at most one part of so many of the time."""
GRACE_S = 3.0
"""What is under way may take so long when partitions are given back, or the service stops."""
RUNNING, NO_PARTITIONS, PAUSED = "running", "waiting for partitions", "paused"


class Reactor:
    """One policy or effect of a worker.

    Args:
        holds: says whether a partition is still ours, as far as can be known without asking.

    Attributes:
        state: what it does, or waits for; for people.
    """

    def __init__(self, context: ReactorContext, declared: DeclaredReaction, holds: Callable[[int], bool]) -> None:
        self._context, self.declared, self._holds = context, declared, holds
        self._wanted: frozenset[int] = frozenset()
        self._owned: frozenset[int] = frozenset()
        self._interrupted = asyncio.Event()
        self._released = asyncio.Event()
        self._stopping = False
        self._sessions: list[Session] = []
        self._repeats = Repeats()
        self._failed = self._began = 0.0
        self.state = NO_PARTITIONS

    @property
    def behind(self) -> int:
        """Commits that it has not read."""
        return sum(session.behind for session in self._sessions)

    @property
    def age(self) -> float:
        """Seconds since the oldest commit was appended that it is not done with; 0 if there is none."""
        oldest = min((session.oldest for session in self._sessions if session.oldest), default=0.0)
        return max(0.0, self._context.now() - oldest) if oldest else 0.0

    def is_settled(self, last: int) -> bool:
        """Return whether it is done with everything up to a stream sequence, and no timer is due."""
        if not self._wanted or self.state == PAUSED:
            return True
        return bool(self._sessions) and all(session.idle and session.read_to >= last for session in self._sessions)

    def wake(self) -> None:
        """Look at the clock now: it was set."""
        for session in self._sessions:
            session.wake()

    def assign(self, partitions: frozenset[int]) -> None:
        """Work on these partitions from now on."""
        if partitions != self._wanted:
            self._wanted = partitions
            self._interrupted.set()

    async def released(self) -> None:
        """Wait until nothing is under way for partitions that were taken away."""
        while self._owned - self._wanted:
            self._released.clear()
            await self._released.wait()

    def stop(self) -> None:
        """Have `run` return, after what is under way."""
        self._stopping = True
        self._interrupted.set()

    async def run(self, verify: Verify) -> None:
        """React until `stop`; come back from every failure that passes with time.

        Args:
            verify: called when the fence was met: makes sure of what is still ours.
        """
        failures = 0
        while not self._stopping:
            self._interrupted.clear()
            self._owned = frozenset(filter(self._holds, self._wanted))
            self._released.set()
            if not self._owned:
                self.state = NO_PARTITIONS
                await self._rest(LOOK_S if self._wanted else None)
                continue
            self._began = time.monotonic()
            try:
                await self._react()
                failures, self._failed = 0, 0.0
                continue
            except Fenced as error:
                self._note(logging.INFO, f"goes on: {error}")
                await verify()
            except LogError as error:
                self.state = f"waiting for the log: {error}"
                self._note(logging.WARNING, self.state)
            except Exception as error:
                infrastructure = is_infrastructure(error)
                what = "waiting for the database" if infrastructure else "failing"
                self.state = f"{what}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
                self._note(logging.WARNING if infrastructure else logging.ERROR, self.state, error)
            worked = time.monotonic() - self._began > PAUSES_S[-1]
            self._failed = 0.0 if worked else self._failed or time.monotonic()
            failures = 1 if worked else failures + 1
            await self._rest(PAUSES_S[min(failures, len(PAUSES_S)) - 1])
        self._owned = frozenset()
        self._released.set()

    async def _react(self) -> None:
        context, name = self._context, self.declared.name
        claimed = await context.run(partial(store.claim, context.engine, context.app.name, name, self._owned))
        if claimed is None:
            self.state = PAUSED
            while await context.run(partial(store.is_paused, context.engine, name)):
                if self._interrupted.is_set():
                    return
                await self._rest(LOOK_S)
            return
        session = Session(context, self.declared, claimed)
        self._sessions.append(session)
        self.state = RUNNING
        try:
            await session.run(self._interrupted, GRACE_S)
        finally:
            self._sessions.remove(session)

    async def _rest(self, seconds: float | None) -> None:
        """Wait so long, or for good, but not past an interruption."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._interrupted.wait()

    def _note(self, level: int, what: str, error: Exception | None = None) -> None:
        if (more := self._repeats.due(what)) is not None:
            bug = error if level == logging.ERROR else None
            logger.log(level, "%s %s%s", self.declared.name, what, more, exc_info=bug)

    @property
    def trouble_lasts(self) -> float:
        """Seconds since it has failed, and not worked since; 0 if it works."""
        works = self.state == RUNNING and time.monotonic() - self._began > PAUSES_S[-1]
        return time.monotonic() - self._failed if self._failed and not works else 0.0

    def report(self) -> dict[str, Any]:
        """Return how it is doing, as JSON data."""
        return {
            "name": self.declared.name,
            "kind": self.declared.kind,
            "state": self.state,
            "behind": self.behind,
            "age": round(self.age, 3),
        }


class Reactors:
    """All policies and effects of a worker."""

    def __init__(self, context: ReactorContext, holds: Callable[[int], bool]) -> None:
        self._context = context
        self._reactors = [Reactor(context, declared, holds) for declared in context.app.reactions]
        self._tasks: list[asyncio.Task[None]] = []
        self.timers: dict[str, tuple[int, int, int]] = {}
        self.parked: dict[str, int] = {}
        self._count_after = 0.0

    def assign(self, partitions: frozenset[int]) -> None:
        """Work on these partitions from now on."""
        for reactor in self._reactors:
            reactor.assign(partitions)

    async def released(self) -> None:
        """Wait until nothing is under way for partitions that were taken away."""
        for reactor in self._reactors:
            await reactor.released()

    def wake(self) -> None:
        """Look at the clock now: it was set."""
        for reactor in self._reactors:
            reactor.wake()

    def start(self, verify: Verify) -> None:
        """Begin, each in a task of its own."""
        self._tasks += [asyncio.create_task(reactor.run(verify)) for reactor in self._reactors]

    async def stop(self, timeout: float) -> bool:
        """Finish what is under way and stop; return whether that took no longer than `timeout` seconds."""
        for reactor in self._reactors:
            reactor.stop()
        if not self._tasks:
            return True
        _, late = await asyncio.wait(self._tasks, timeout=timeout)
        return not late

    async def close(self) -> None:
        """Give up what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._context.threads.shutdown(wait=False, cancel_futures=True)

    async def is_settled(self) -> bool:
        """Return whether everything in the log has been reacted to, and no timer is due."""
        last = (await self._context.log.info()).last
        return all(reactor.is_settled(last) for reactor in self._reactors)

    @property
    def trouble(self) -> str:
        """Which of them can't work, and why; empty if all can."""
        found = [reactor for reactor in self._reactors if reactor.trouble_lasts > TROUBLE_S]
        return "; ".join(f"{reactor.declared.name}: {reactor.state}" for reactor in found)

    def report(self) -> list[dict[str, Any]]:
        """Return how each is doing, as JSON data."""
        found = []
        for reactor in self._reactors:
            pending, late, failed = self.timers.get(reactor.declared.name, (0, 0, 0))
            timers = {"pending": pending, "late": late, "failed": failed}
            found.append(reactor.report() | {"timers": timers, "parked": self.parked.get(reactor.declared.name, 0)})
        return found

    def publish_metrics(self) -> None:
        """Bring the gauges up to date that cost nothing."""
        for reactor in self._reactors:
            REACTION_LAG.labels(reaction=reactor.declared.name).set(reactor.behind)
            REACTION_AGE.labels(reaction=reactor.declared.name).set(reactor.age)

    async def count(self) -> None:
        """Count timers and parked aggregates, in the whole database, and forget what is needed no longer.

        Counting a million timers takes its time: the next count is the later, the longer this one takes.
        """
        context, began = self._context, time.monotonic()
        if began < self._count_after:
            return
        self.timers = await context.run(partial(timers.counts, context.engine, int((context.now() - 1.0) * MICROS)))
        self.parked = await context.run(partial(letters.count, context.engine))
        before = datetime.now(UTC) - timedelta(seconds=context.settings.policies.retention)
        old = before.isoformat(timespec="seconds")
        await context.run(partial(store.forget_rejections, context.engine, old))
        for reactor in self._reactors:
            name = reactor.declared.name
            if reactor.declared.kind == "policy":
                await context.run(partial(timers.sweep, context.engine, name))
            pending, late, _ = self.timers.get(name, (0, 0, 0))
            REACTION_PARKED.labels(reaction=name).set(self.parked.get(name, 0))
            if reactor.declared.kind == "policy":
                TIMERS_PENDING.labels(policy=name).set(pending)
                TIMERS_LATE.labels(policy=name).set(late)
        took = time.monotonic() - began
        self._count_after = began + took * COUNT_SHARE
