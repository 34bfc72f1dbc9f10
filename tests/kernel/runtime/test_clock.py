"""The clock: the system's, and one that a test moves."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from kernel.runtime import clock
from kernel.runtime.clock import SYSTEM_CLOCK, Clock, MovableClock

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


async def test_what_waits_for_a_moment_goes_on_when_the_clock_is_moved_there_the_earliest_first() -> None:
    moved, reached = MovableClock(NOON), []

    async def wait(minutes: int) -> None:
        await moved.reach(NOON + minutes * MINUTE)
        reached.append(minutes)

    tasks = [asyncio.create_task(wait(minutes)) for minutes in (3, 1, 2, 0)]
    await asyncio.sleep(0)
    assert reached == [0]
    moved.advance(2 * MINUTE - timedelta(microseconds=1))
    await tasks[1]
    assert reached == [0, 1]
    moved.advance(MINUTE + timedelta(microseconds=1))
    await asyncio.gather(*tasks)
    assert reached == [0, 1, 2, 3]


async def test_a_wait_that_is_cancelled_leaves_nothing_behind() -> None:
    moved = MovableClock(NOON)
    waiting = asyncio.create_task(moved.reach(NOON + MINUTE))
    await asyncio.sleep(0)
    waiting.cancel()
    moved.advance(MINUTE)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert moved._waiting == []


def test_time_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="time does not go back"):
        MovableClock(NOON).advance(-MINUTE)


def test_a_time_without_zone_is_utc_and_another_zone_is_turned_into_it() -> None:
    assert MovableClock(NOON.replace(tzinfo=None)).now() == NOON
    local = datetime.fromisoformat("2026-01-01T14:00:00+02:00")
    assert MovableClock(local).now().isoformat() == NOON.isoformat()


async def test_the_systems_clock_is_looked_at_again_while_something_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Set(Clock):
        """A clock that somebody sets an hour ahead when it is looked at for the second time."""

        looks = 0

        def now(self) -> datetime:
            self.looks += 1
            return NOON if self.looks == 1 else NOON + timedelta(hours=1)

    monkeypatch.setattr(clock, "LOOK_S", 0.0)
    await Set().reach(NOON + MINUTE)
    await SYSTEM_CLOCK.reach(datetime.now(UTC))
