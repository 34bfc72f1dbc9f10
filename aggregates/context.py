"""Time, ids and randomness for command handlers, so that a test can fix them and a retry repeats them."""

from __future__ import annotations

import random
import time
from datetime import UTC, datetime

_last_tick = 0


def uuid7() -> str:
    """Return a new UUIDv7 (RFC 9562): 48 bits of milliseconds, then a clock-ordered and random remainder."""
    global _last_tick
    tick = max(time.time_ns(), _last_tick + 250)
    _last_tick = tick
    millis, rest = divmod(tick, 1_000_000)
    low = random.getrandbits(62) | 0x8000_0000_0000_0000
    ms = f"{millis:012x}"
    text = f"{low:016x}"
    return f"{ms[:8]}-{ms[8:]}-7{rest >> 8:03x}-{text[:4]}-{text[4:]}"


class Context:
    """Given to a command handler that asks for it with a second parameter annotated `Context`.

    Everything in it follows from the command's id and the moment of decision, so deciding again gives the same.

    Attributes:
        command_id: the id of the command being decided.
        now: the moment of decision (UTC).
    """

    __slots__ = ("_random", "command_id", "now")

    def __init__(self, command_id: str, now: datetime | None = None) -> None:
        self.command_id = command_id
        self.now = now or datetime.now(UTC)
        self._random: random.Random | None = None

    @property
    def random(self) -> random.Random:
        """A generator seeded with the command's id."""
        if self._random is None:
            self._random = random.Random(self.command_id)
        return self._random

    def new_id(self) -> str:
        """Return an id for a new thing, the same one each time this command is decided."""
        return f"{self.random.getrandbits(128):032x}"
