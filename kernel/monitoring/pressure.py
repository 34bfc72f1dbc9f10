"""The pressure on the publishing side: appends in flight and waiting, their latency, commands in progress."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from kernel.monitoring.backlog import Ladder

MEDIUM, HIGH, CRITICAL = 0.5, 0.75, 0.9
"""Shares of a limit at which the levels begin."""


class Pressure(IntEnum):
    """Level of the pressure: how close to its limits the publishing side works."""

    LOW = 0
    MEDIUM = 1
    HIGH = 2
    CRITICAL = 3


class PressureGauge:
    """Computes the level of the pressure from shares of limits. It reads no clock: the caller passes the time.

    Args:
        max_in_flight: largest number of appends in flight; appends that wait to be sent count too.
        max_pending: largest number of commands in progress.
        max_latency: seconds after which an append without an answer is read back.
        hysteresis: share of a threshold below which its level ends.
        min_duration: seconds for which a new level must last.
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
        """Add a measurement. Return the levels before and after if the level changed, else None.

        Args:
            queued: number of appends that wait to be sent.
            in_flight: number of appends that are sent and not answered.
            pending: number of commands that are not answered.
            latency: longest recent duration of an append in seconds.
            refusal: reason why the log refuses appends, empty if it does not; a refusal is critical.
            now: seconds of a monotonic clock.
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
