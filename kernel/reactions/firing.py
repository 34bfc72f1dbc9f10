"""Firing the timers of a policy: never early, and once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec

from aggregates import InvalidMessage
from kernel.errors import NotDeclared
from kernel.reactions import store, timers
from kernel.reactions.context import ReactorContext
from kernel.reactions.store import Claimed, ReactionWrite, Rejections
from kernel.reactions.timers import AT_ONCE, MICROS, DueTimer
from kernel.reactions.work import Failed, PolicyWorker
from projections.dead_letters import MAX_PAUSE_S
from projections.errors import reason
from projections.unit_of_work import one_line

logger = logging.getLogger("eskernel.reactions")
LOOK_S = 0.5
"""The clock is looked at so often while a timer is pending: it may be set."""
Outcome = list[dict[str, Any]] | Failed


class TimerFiring:
    """Sends the commands of a policy's timers when their time has come.

    Nothing is asked of the database while no timer is due: this owner knows of each that it has set.

    Args:
        claimed: the partitions of the events that have set them.
        slots: how many commands may be under way at once.
    """

    def __init__(
        self,
        context: ReactorContext,
        policy: str,
        worker: PolicyWorker,
        claimed: Claimed,
        slots: asyncio.Semaphore,
    ) -> None:
        self._context, self._policy, self._worker = context, policy, worker
        self._partitions, self._epoch, self._slots = frozenset(claimed.positions), claimed.epoch, slots
        self._due: int | None = None
        self._news = asyncio.Event()
        self._under_way: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._done: list[tuple[DueTimer, Outcome]] = []
        self._failures: list[BaseException] = []
        self._busy = False

    def note(self, written: list[dict[str, Any]]) -> None:
        """Note timers that were written."""
        for each in written:
            due = each["due"]
            if due is not None and (self._due is None or due < self._due):
                self._due = due
                self._news.set()

    def wake(self) -> None:
        """Look at the clock now: it was set."""
        self._news.set()

    def is_due(self) -> bool:
        """Return whether a timer is to be fired by now."""
        return self._busy or bool(self._under_way) or (self._due is not None and self._due <= self._now())

    def _now(self) -> int:
        return int(self._context.now() * MICROS)

    async def run(self, caught_up: Callable[[], Awaitable[None]]) -> None:
        """Fire what is due, again and again.

        Args:
            caught_up: waits until the policy has reacted to what has happened before.
        """
        try:
            self.note([{"due": await self._find_next(None)}])
            await caught_up()
            while True:
                self._news.clear()
                if self._failures:
                    raise self._failures[0]
                if self._done or (self._is_past() and len(self._under_way) < AT_ONCE):
                    self._busy = True
                    await (self._settle() if self._done else self._begin())
                    self._busy = False
                    continue
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._pause()):
                        await self._news.wait()
        finally:
            for task in self._under_way.values():
                task.cancel()
            await asyncio.gather(*self._under_way.values(), return_exceptions=True)

    def _is_past(self) -> bool:
        return self._due is not None and self._due <= self._now()

    def _pause(self) -> float | None:
        if self._due is None or self._is_past():
            return None  # until a timer is set, or one is done
        return min((self._due - self._now()) / MICROS, LOOK_S)

    async def _find_next(self, after: int | None) -> int | None:
        find = partial(timers.next_due, self._context.engine, self._policy, self._partitions, after)
        return await self._context.run(find)

    async def _begin(self) -> None:
        """Begin to fire what is due and not under way, as many as may be at once."""
        run, engine = self._context.run, self._context.engine
        now = self._now()
        self._due = None  # what is written meanwhile is noted
        # those under way are still in the database
        found = await run(partial(timers.due_timers, engine, self._policy, self._partitions, now, 2 * AT_ONCE))
        more = len(found) == 2 * AT_ONCE
        found = [each for each in found if each.event not in self._under_way]
        if len(found) > (room := AT_ONCE - len(self._under_way)):
            found, more = found[:room], True
        if found:
            sequences = {each.stream_sequence for each in found}
            rejected = await run(partial(store.read_rejected, engine, self._policy, sequences))
            for timer in found:
                self._under_way[timer.event] = asyncio.create_task(self._fire(timer, rejected))
        self.note([{"due": now if more else await self._find_next(now)}])

    async def _fire(self, timer: DueTimer, rejected: Rejections) -> None:
        try:
            outcome = await self._find_outcome(timer, rejected)
        except Exception as error:
            self._failures.append(error)
        else:
            self._done.append((timer, outcome))
        self._news.set()

    async def _find_outcome(self, timer: DueTimer, rejected: Rejections) -> Outcome:
        try:
            async with self._slots:
                return await self._worker.fire(timer, rejected)
        except Failed as failure:
            logger.warning("%s: the command of timer %s failed: %s", self._policy, timer.name, failure)
            return failure
        except (InvalidMessage, NotDeclared, msgspec.MsgspecError) as error:
            logger.warning("%s: timer %s can't be read: %s", self._policy, timer.name, error)
            return Failed(reason(error), transient=False)

    async def _settle(self) -> None:
        """Write what became of those that are done."""
        run, engine, now = self._context.run, self._context.engine, self._now()
        done, self._done = self._done, []
        set_anew = [more for _, outcome in done if isinstance(outcome, list) for more in outcome]
        if set_anew:
            await run(partial(store.write, engine, self._policy, self._epoch, ReactionWrite(timers=set_anew)))
        fired = [timer for timer, outcome in done if isinstance(outcome, list)]
        failed = [
            (timer, self._next_attempt(timer, now), one_line(str(outcome)))
            for timer, outcome in done
            if isinstance(outcome, Failed)
        ]
        await run(partial(timers.settle, engine, self._policy, fired, failed))
        for timer, _ in done:  # not before: it would be fired again
            del self._under_way[timer.event]
        self.note(set_anew)
        self.note([{"due": attempt} for _, attempt, _ in failed])

    def _next_attempt(self, timer: DueTimer, now: int) -> int:
        pause = min(self._context.settings.dead_letters.retry_after * 2.0 ** min(timer.attempts, 30), MAX_PAUSE_S)
        return now + int(pause * MICROS)
