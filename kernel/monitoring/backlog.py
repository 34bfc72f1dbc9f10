"""The backlog of the projections: stable levels for each partition of each projection. No function reads a clock.

A level is a step of a ladder. It begins when the measurements have reached its threshold for some time. It ends when
all measurements have been below a share of the threshold for the same time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from kernel.settings import Backlog

PACE_S = 10.0
"""Time constant of the rate in seconds. After this time without progress the rate is 0."""
SHOWN = 20
"""Largest number of partitions of a projection in a report, the worst first."""


class Level(IntEnum):
    """Level of a backlog."""

    OK = 0
    WARN = 1
    CRITICAL = 2


class Ladder:
    """A level from 0 upwards, with hysteresis and a minimum duration of changes.

    Args:
        steps: number of levels above 0.
        hysteresis: share of a threshold below which its level ends.
        min_duration: seconds for which a change must last before it counts.
    """

    __slots__ = ("_hysteresis", "_min_duration", "_on", "_since", "level")

    def __init__(self, steps: int, hysteresis: float, min_duration: float) -> None:
        self._hysteresis, self._min_duration = hysteresis, min_duration
        self._on = [False] * steps
        self._since: list[float | None] = [None] * steps
        self.level = 0

    def update(self, ratios: Sequence[float], now: float) -> int:
        """Add a measurement, as a ratio to each level's threshold, and return the level."""
        for step, ratio in enumerate(ratios):
            wanted = ratio >= (self._hysteresis if self._on[step] else 1.0)
            since = self._since[step]
            if wanted == self._on[step]:
                self._since[step] = None
            elif now - (now if since is None else since) >= self._min_duration:
                self._on[step], self._since[step] = wanted, None
            elif since is None:
                self._since[step] = now
        self.level = sum(self._on)
        return self.level

    @property
    def still(self) -> bool:
        """True if the level is 0 and no change has begun."""
        return not self.level and self._since == [None] * len(self._since)


class Transition(NamedTuple):
    """A change of level, with the measurement that caused it."""

    before: Level
    after: Level
    behind: float
    age: float


class Alarm:
    """The level of one projection's backlog in one partition.

    Attributes:
        count: number of commits behind.
        age: age in seconds of the oldest of these commits.
    """

    __slots__ = ("_ladder", "_thresholds", "age", "count", "level")

    def __init__(self, thresholds: Backlog) -> None:
        self._thresholds = thresholds
        self._ladder = Ladder(2, thresholds.hysteresis, thresholds.min_duration)
        self.level = Level.OK
        self.count = self.age = 0.0

    def update(self, count: float, age: float, now: float) -> Transition | None:
        """Add a measurement, and return the change of level, if any. The age is ignored if the count is 0."""
        self.count, self.age = count, age if count else 0.0
        at = self._thresholds
        before = self.level
        warn = max(count / at.count_warn, self.age / at.age_warn)
        critical = max(count / at.count_critical, self.age / at.age_critical)
        self.level = Level(self._ladder.update((warn, critical), now))
        return Transition(before, self.level, count, self.age) if self.level != before else None

    @property
    def still(self) -> bool:
        """True if nothing is behind, the level is ok, and no change has begun: the alarm can be forgotten."""
        return not self.count and self._ladder.still


class Rate:
    """The rate of a counter per second, exponentially weighted over `PACE_S`."""

    def __init__(self) -> None:
        self.per_second = 0.0
        self._done = 0
        self._at: float | None = None
        self._moved = 0.0

    def update(self, done: int, now: float) -> float:
        """Add the counter's value, and return the rate."""
        if self._at is None or done < self._done:
            self._done, self._at, self._moved = done, now, now
        elif now > self._at:
            passed, more = now - self._at, done - self._done
            weight = 1 - math.exp(-passed / PACE_S) if self.per_second else 1.0
            self.per_second += weight * (more / passed - self.per_second)
            self._done, self._at = done, now
            if more:
                self._moved = now
            elif now - self._moved >= PACE_S:
                self.per_second = 0.0
        return self.per_second


@dataclass(frozen=True, slots=True)
class Change:
    """Partitions of one projection with the same change of level in one round of measurements.

    Attributes:
        behind: number of commits behind, in all of these partitions.
        age: highest age of these partitions in seconds.
    """

    projection: str
    before: Level
    after: Level
    partitions: list[int]
    behind: int
    age: float


@dataclass(slots=True)
class Behind:
    """The backlog of one projection, over all partitions.

    Attributes:
        level: worst level of any partition.
        behind: number of commits behind, in all partitions.
        age: age in seconds of the oldest commit that is not projected; 0 if there is none.
        drain: seconds until the backlog is 0 at the current rate; infinite if there is no progress.
        levels: number of partitions at each level, without partitions that have no alarm.
    """

    projection: str
    level: Level = Level.OK
    behind: float = 0.0
    age: float = 0.0
    drain: float = 0.0
    levels: tuple[int, int, int] = (0, 0, 0)


class BacklogMeter:
    """Measures the backlog: an alarm for each partition of each projection that is behind.

    A round of measurements is a `feed` for each partition that is behind, and then one `finish`.
    """

    def __init__(self, thresholds: Backlog, projections: Sequence[str]) -> None:
        self._thresholds = thresholds
        self._alarms: dict[str, dict[int, Alarm]] = {name: {} for name in projections}
        self._fed: set[tuple[str, int]] = set()
        self._changes: dict[tuple[str, Level, Level], list[tuple[int, Transition]]] = {}
        self._rate = Rate()
        self.projections = {name: Behind(name) for name in projections}

    @property
    def worst(self) -> Level:
        """The worst level of any partition."""
        return max((behind.level for behind in self.projections.values()), default=Level.OK)

    @property
    def rate(self) -> float:
        """Commits projected per second."""
        return self._rate.per_second

    def feed(self, projection: str, partition: int, count: float, age: float, now: float) -> None:
        """Add a measurement.

        Args:
            count: number of commits behind.
            age: age in seconds of the oldest of these commits.
            now: seconds of a monotonic clock.
        """
        alarms = self._alarms[projection]
        alarm = alarms.get(partition)
        if alarm is None:
            alarm = alarms[partition] = Alarm(self._thresholds)
        self._fed.add((projection, partition))
        self._update(projection, partition, alarm, count, age, now)

    def _update(self, projection: str, partition: int, alarm: Alarm, count: float, age: float, now: float) -> None:
        if change := alarm.update(count, age, now):
            self._changes.setdefault((projection, change.before, change.after), []).append((partition, change))

    def finish(self, owned: Collection[int], done: int, now: float) -> list[Change]:
        """End a round: partitions that were not fed are not behind. Return the changes of level, grouped.

        Args:
            owned: the partitions of this worker; alarms of other partitions end.
            done: counter of projected commits.
        """
        rate = self._rate.update(done, now)
        for name, alarms in self._alarms.items():
            for partition, alarm in list(alarms.items()):
                if partition not in owned:
                    del alarms[partition]
                    if alarm.level:
                        gone = Transition(alarm.level, Level.OK, 0, 0.0)
                        self._changes.setdefault((name, alarm.level, Level.OK), []).append((partition, gone))
                elif (name, partition) not in self._fed:
                    self._update(name, partition, alarm, 0, 0.0, now)
                    if alarm.still:
                        del alarms[partition]
            self.projections[name] = _sum(name, alarms.values(), rate)
        self._fed.clear()
        changes, self._changes = self._changes, {}
        return [
            Change(
                name,
                before,
                after,
                sorted(partition for partition, _ in members),
                round(sum(transition.behind for _, transition in members)),
                max(transition.age for _, transition in members),
            )
            for (name, before, after), members in changes.items()
        ]

    def report(self) -> dict[str, Any]:
        """Return the last round as JSON data, with each projection's worst partitions. An infinite time is null."""
        return {
            "level": self.worst.name.lower(),
            "rate": round(self.rate, 1),
            "projections": [self._report(behind) for behind in self.projections.values()],
        }

    def _report(self, behind: Behind) -> dict[str, Any]:
        worst = sorted(
            self._alarms[behind.projection].items(), key=lambda item: (-item[1].level, -item[1].age, -item[1].count)
        )
        drain = None if math.isinf(behind.drain) else round(behind.drain, 1)
        return {
            "projection": behind.projection,
            "level": behind.level.name.lower(),
            "behind": round(behind.behind),
            "age": round(behind.age, 3),
            "drain": drain,
            "warn": behind.levels[Level.WARN],
            "critical": behind.levels[Level.CRITICAL],
            "partitions": [
                {
                    "partition": partition,
                    "level": alarm.level.name.lower(),
                    "behind": round(alarm.count, 1),
                    "age": round(alarm.age, 3),
                    "drain": drain if alarm.count else 0.0,
                }
                for partition, alarm in worst[:SHOWN]
            ],
        }


def _sum(projection: str, alarms: Collection[Alarm], rate: float) -> Behind:
    behind = sum(alarm.count for alarm in alarms)
    levels = [0, 0, 0]
    for alarm in alarms:
        levels[alarm.level] += 1
    return Behind(
        projection,
        max((alarm.level for alarm in alarms), default=Level.OK),
        behind,
        max((alarm.age for alarm in alarms), default=0.0),
        0.0 if not behind else behind / rate if rate else math.inf,
        (levels[0], levels[1], levels[2]),
    )
