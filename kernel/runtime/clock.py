"""What time it is: the system's clock, or one that a test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

LOOK_S = 1.0
"""A wait looks at the system's clock this often at least: it may be set meanwhile."""


class Clock:
    """The system's clock."""

    def now(self) -> datetime:
        """Return the present time, in UTC."""
        return datetime.now(UTC)

    async def reach(self, moment: datetime) -> None:
        """Wait until it is `moment` (UTC if it has no zone) or later."""
        moment = _in_utc(moment)
        while (left := (moment - self.now()).total_seconds()) > 0:  # noqa: ASYNC110 - nobody tells when the system's clock is set
            await asyncio.sleep(min(left, LOOK_S))


SYSTEM_CLOCK = Clock()


class MovableClock(Clock):
    """A clock that stands still until it is moved.

    Args:
        now: where it begins (UTC if it has no zone); the system's time by default.

    Attributes:
        moved: functions that are called when it was moved.
    """

    def __init__(self, now: datetime | None = None) -> None:
        self._now = super().now() if now is None else _in_utc(now)
        self._waiting: list[tuple[datetime, asyncio.Future[None]]] = []
        self.moved: list[Callable[[], None]] = []

    def now(self) -> datetime:
        """Return the time at which it stands, in UTC."""
        return self._now

    def advance(self, by: timedelta) -> None:
        """Move on at once. What waits for a moment up to then goes on, the earliest first.

        Raises:
            ValueError: time does not go back.
        """
        if by < timedelta(0):
            raise ValueError(f"advance({by!r}): time does not go back; begin earlier, with running(app, now=...)")
        self._now += by
        due = sorted((each for each in self._waiting if each[0] <= self._now), key=lambda each: each[0])
        self._waiting = [each for each in self._waiting if each[0] > self._now]
        for _, future in due:
            if not future.done():
                future.set_result(None)
        for callback in self.moved:
            callback()

    async def reach(self, moment: datetime) -> None:
        """Wait until it was moved to `moment` (UTC if it has no zone) or beyond."""
        moment = _in_utc(moment)
        if moment <= self._now:
            return
        waiting = moment, asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        try:
            await waiting[1]
        finally:
            if waiting in self._waiting:  # who waited was cancelled
                self._waiting.remove(waiting)


def _in_utc(moment: datetime) -> datetime:
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
