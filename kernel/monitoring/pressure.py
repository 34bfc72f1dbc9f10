"""How hard the publishing side is pressed: appends in flight and waiting, their latency, commands under way."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from kernel.monitoring.backlog import Ladder

MEDIUM, HIGH, CRITICAL = 0.5, 0.75, 0.9
"""Shares of a limit at which the levels begin."""


class Pressure(IntEnum):
    """How near its limits the publishing side works."""

    LOW = 0
    MEDIUM = 1
    HIGH = 2
    CRITICAL = 3


class PressureGauge:
    """The level of pressure, from shares of limits; pure: the clock is passed in.

    Args:
        max_in_flight: appends that may be in flight; those that wait to be sent count as well.
        max_pending: commands that may be under way.
        max_latency: seconds after which an append without an answer is looked into.
        hysteresis, min_duration: as for the backlog.
    """

    def __init__(
        self, max_in_flight: int, max_pending: int, max_latency: float, hysteresis: float, min_duration: float
    ) -> None:
        self._limits = max_in_flight, max_pending, max_latency
        self._ladder = Ladder(3, hysteresis, min_duration)
        self.level = Pressure.LOW
        self.shown: dict[str, Any] = {"level": "low"}

    def update(
        self, queued: int, in_flight: int, pending: int, latency: float, refusal: str, now: float
    ) -> tuple[Pressure, Pressure] | None:
        """Take a measurement; return the levels before and after, if it changed.

        Args:
            queued, in_flight: appends waiting to be sent, and sent without an answer.
            pending: commands without an answer.
            latency: seconds, the longest of late.
            refusal: why the log takes nothing, or nothing; that alone is critical.
        """
        max_in_flight, max_pending, max_latency = self._limits
        share = max((queued + in_flight) / max_in_flight, pending / max_pending, latency / max_latency, bool(refusal))
        before = self.level
        self.level = Pressure(self._ladder.update((share / MEDIUM, share / HIGH, share / CRITICAL), now))
        self.shown = {
            "level": self.level.name.lower(),
            "queued": queued,
            "in_flight": in_flight,
            "max_in_flight": max_in_flight,
            "commands_pending": pending,
            "max_commands_pending": max_pending,
            "latency": round(latency, 4),
            "refusal": refusal,
        }
        return (before, self.level) if self.level != before else None
