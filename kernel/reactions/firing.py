"""Firing the timers of a policy: never early, and once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec

from aggregates import InvalidMessage
from kernel.errors import NotDeclared
from kernel.reactions import store, timers
from kernel.reactions.context import ReactorContext
from kernel.reactions.store import ReactionWrite
from kernel.reactions.timers import AT_ONCE, MICROS, DueTimer
from kernel.reactions.work import Failed, PolicyWorker
from projections.dead_letters import MAX_PAUSE_S
from projections.errors import reason
from projections.unit_of_work import one_line

logger = logging.getLogger("eskernel.reactions")
LOOK_S = 0.5
"""The clock is looked at so often while a timer is pending: it may be set."""


class TimerFiring:
    """Sends the commands of a policy's timers when their time has come.

    Nothing is asked of the database while no timer is due: this owner knows of each that it has set.

    Args:
        partitions: of the events that have set them.
        slots: how many commands may be under way at once.
    """

    def __init__(
        self,
        context: ReactorContext,
        policy: str,
        worker: PolicyWorker,
        partitions: Collection[int],
        slots: asyncio.Semaphore,
    ) -> None:
        self._context, self._policy, self._worker = context, policy, worker
        self._partitions, self._slots = frozenset(partitions), slots
        self._due: int | None = None
        self._earlier = asyncio.Event()
        self.firing = False

    def note(self, written: list[dict[str, Any]]) -> None:
        """Note timers that were written."""
        for each in written:
            due = each["due"]
            if due is not None and (self._due is None or due < self._due):
                self._due = due
                self._earlier.set()

    def wake(self) -> None:
        """Look at the clock now: it was set."""
        self._earlier.set()

    def is_due(self) -> bool:
        """Return whether a timer is to be fired by now."""
        return self.firing or (self._due is not None and self._due <= self._now())

    def _now(self) -> int:
        return int(self._context.now() * MICROS)

    async def run(self) -> None:
        """Fire what is due, again and again."""
        self.note([{"due": await self._find_next()}])
        while True:
            self._earlier.clear()
            if self._due is None:
                await self._earlier.wait()
            elif (wait := self._due - self._now()) > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(wait / MICROS, LOOK_S)):
                        await self._earlier.wait()
            else:
                self.firing = True
                try:
                    await self._fire()
                finally:
                    self.firing = False

    async def _find_next(self) -> int | None:
        return await self._context.run(partial(timers.next_due, self._context.engine, self._policy, self._partitions))

    async def _fire(self) -> None:
        run, engine, policy = self._context.run, self._context.engine, self._policy
        now = self._now()
        self._due = None  # what is written meanwhile is noted
        found = await run(partial(timers.due_timers, engine, policy, self._partitions, now))
        if found:
            sequences = {each.stream_sequence for each in found}
            self._worker.remember(await run(partial(store.read_rejected, engine, policy, sequences)))
            outcomes = await asyncio.gather(*(self._fire_one(each) for each in found))
            set_anew = [more for outcome in outcomes if isinstance(outcome, list) for more in outcome]
            if set_anew:
                await run(partial(store.write, engine, policy, 0, ReactionWrite(timers=set_anew)))
            fired = [each for each, outcome in zip(found, outcomes, strict=True) if isinstance(outcome, list)]
            failed = [
                (each, self._next_attempt(each, now), one_line(str(outcome)))
                for each, outcome in zip(found, outcomes, strict=True)
                if isinstance(outcome, Failed)
            ]
            await run(partial(timers.settle, engine, policy, fired, failed))
        self.note([{"due": now if len(found) == AT_ONCE else await self._find_next()}])

    async def _fire_one(self, timer: DueTimer) -> list[dict[str, Any]] | Failed:
        try:
            async with self._slots:
                return await self._worker.fire(timer)
        except Failed as failure:
            logger.warning("%s: the command of timer %s failed: %s", self._policy, timer.name, failure)
            return failure
        except (InvalidMessage, NotDeclared, msgspec.MsgspecError) as error:
            logger.warning("%s: timer %s can't be read: %s", self._policy, timer.name, error)
            return Failed(reason(error), transient=False)

    def _next_attempt(self, timer: DueTimer, now: int) -> int:
        pause = min(self._context.settings.dead_letters.retry_after * 2.0 ** min(timer.attempts, 30), MAX_PAUSE_S)
        return now + int(pause * MICROS)
