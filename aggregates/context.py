"""Time, ids and randomness for command handlers, so that a test can fix them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import MappingProxyType

from aggregates.origin import UNKNOWN, Origin

_last = (0, 0)
_prefix = ""


def uuid7() -> str:
    """Return a new UUIDv7 (RFC 9562): 48 bits of milliseconds, a 12-bit count within them, 62 random bits.

    Ids made by one process are in ascending order.
    """
    global _last, _prefix
    millis = time.time_ns() // 1_000_000
    before, count = _last
    if millis > before:
        count = 0
        text = f"{millis:012x}"
        _prefix = f"{text[:8]}-{text[8:]}-7"
        _last = (millis, 0)
    elif count < 0xFFF:
        count += 1
        _last = (before, count)
    else:
        # more than 4,096 ids in a millisecond, or the clock was set back: borrow from the next millisecond
        count = 0
        text = f"{before + 1:012x}"
        _prefix = f"{text[:8]}-{text[8:]}-7"
        _last = (before + 1, 0)
    low = hex(random.getrandbits(62) | 0x8000_0000_0000_0000)
    return f"{_prefix}{count:03x}-{low[2:6]}-{low[6:]}"


def _system_time() -> datetime:
    return datetime.now(UTC)


class Context:
    """Passed to a command handler whose second parameter is annotated `Context`.

    Ids and random numbers are derived from the command's id: deciding a command again gives the same values. `now`
    differs between decisions.

    Args:
        now: the moment of decision, or a function that returns it, called once and only where a handler asks.

    Attributes:
        command_id: the id of the command being decided.
    """

    __slots__ = ("_now", "_origin", "_random", "command_id")

    def __init__(
        self, command_id: str, now: datetime | Callable[[], datetime] = _system_time, origin: Origin = UNKNOWN
    ) -> None:
        self.command_id = command_id
        self._now, self._origin = now, origin
        self._random: random.Random | None = None

    @property
    def now(self) -> datetime:
        """The moment of decision (UTC)."""
        if not isinstance(self._now, datetime):
            self._now = self._now()
        return self._now

    @property
    def actor(self) -> str:
        """Who sent the command, as its sender says; empty if it names nobody."""
        return self._origin.actor

    @property
    def tenant(self) -> str:
        """The tenant that the command is for, as its sender says; empty if it names none."""
        return self._origin.tenant

    @property
    def metadata(self) -> Mapping[str, str]:
        """What else the sender says of the command. It is stored with the events; it can't be changed."""
        return MappingProxyType(self._origin.metadata)

    @property
    def occurred_at(self) -> datetime:
        """When what the command records has happened (UTC): `now`, unless the sender says otherwise."""
        return self._origin.occurred_at or self.now

    @property
    def random(self) -> random.Random:
        """A generator seeded with the command's id."""
        if self._random is None:
            self._random = random.Random(self.command_id)
        return self._random

    def new_id(self) -> str:
        """Return a new id. The calls of one decision return the same ids whenever the command is decided again."""
        return f"{self.random.getrandbits(128):032x}"
