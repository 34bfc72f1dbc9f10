"""Are the projections behind, and by how much: levels that do not flap, per projection and partition. Pure: no clock.

A level is a ladder of steps. A step is taken when a measurement has reached its threshold for some time, and left when
every measurement has been below a share of the threshold for as long.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from kernel.settings import Backlog as Thresholds

PACE_S = 10.0
"""Time constant of the rate; without any progress for so long, it is 0."""
SHOWN = 20
"""Partitions of a projection in a report, the worst first."""


class Level(IntEnum):
    """How bad it is."""

    OK = 0
    WARN = 1
    CRITICAL = 2


class Ladder:
    """A level from 0 upwards, with hysteresis and a least duration.

    Args:
        steps: how many there are above 0.
        hysteresis: share of a threshold below which its step is left.
        min_duration: seconds that a change must hold before it counts.
    """

    __slots__ = ("_hysteresis", "_min_duration", "_on", "_since", "level")

    def __init__(self, steps: int, hysteresis: float, min_duration: float) -> None:
        self._hysteresis, self._min_duration = hysteresis, min_duration
        self._on = [False] * steps
        self._since: list[float | None] = [None] * steps
        self.level = 0

    def update(self, ratios: Sequence[float], now: float) -> int:
        """Take a measurement as shares of each step's threshold, which grow from step to step; return the level."""
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
        """Whether it is at 0, and no change is under way."""
        return not self.level and self._since == [None] * len(self._since)


class Transition(NamedTuple):
    """A change of level, and what was measured then."""

    before: Level
    after: Level
    behind: float
    age: float


class Alarm:
    """The level of one projection's backlog in one partition.

    Attributes:
        count: commits behind.
        age: of the oldest of them, in seconds.
    """

    __slots__ = ("_ladder", "_thresholds", "age", "count", "level")

    def __init__(self, thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self._ladder = Ladder(2, thresholds.hysteresis, thresholds.min_duration)
        self.level = Level.OK
        self.count = self.age = 0.0

    def update(self, count: float, age: float, now: float) -> Transition | None:
        """Take a measurement; return the change of level that it led to. With nothing waiting, age means nothing."""
        self.count, self.age = count, age if count else 0.0
        at = self._thresholds
        before = self.level
        warn = max(count / at.count_warn, self.age / at.age_warn)
        critical = max(count / at.count_critical, self.age / at.age_critical)
        self.level = Level(self._ladder.update((warn, critical), now))
        return Transition(before, self.level, count, self.age) if self.level != before else None

    @property
    def still(self) -> bool:
        """Whether there is nothing to remember."""
        return not self.count and self._ladder.still


class Rate:
    """How much is done in a second, from a counter: exponentially weighted over some seconds."""

    def __init__(self) -> None:
        self.per_second = 0.0
        self._done = 0
        self._at: float | None = None
        self._moved = 0.0

    def update(self, done: int, now: float) -> float:
        """Take the counter's value; return the rate."""
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
    """Partitions of one projection that changed from one level to another at the same look.

    Attributes:
        behind: their commits behind.
        age: the highest of theirs, in seconds.
    """

    projection: str
    before: Level
    after: Level
    partitions: list[int]
    behind: int
    age: float


@dataclass(slots=True)
class Behind:
    """How far one projection is behind, over all partitions.

    Attributes:
        level: the worst of any partition.
        behind: commits in all partitions.
        age: in seconds, of the oldest commit not projected; 0 if there is none.
        drain: seconds until nothing waits at the present rate; infinite when it stands still.
        levels: partitions at each level, but for those without anything to tell.
    """

    projection: str
    level: Level = Level.OK
    behind: float = 0.0
    age: float = 0.0
    drain: float = 0.0
    levels: tuple[int, int, int] = (0, 0, 0)


class Backlog:
    """An alarm for each projection and partition that has something waiting.

    A look is a `feed` for all that have, then one `finish`.
    """

    def __init__(self, thresholds: Thresholds, projections: Sequence[str]) -> None:
        self._thresholds = thresholds
        self._alarms: dict[str, dict[int, Alarm]] = {name: {} for name in projections}
        self._fed: set[tuple[str, int]] = set()
        self._changes: dict[tuple[str, Level, Level], list[tuple[int, Transition]]] = {}
        self._rate = Rate()
        self.projections = {name: Behind(name) for name in projections}

    @property
    def worst(self) -> Level:
        """The worst level of any partition."""
        return max((one.level for one in self.projections.values()), default=Level.OK)

    @property
    def rate(self) -> float:
        """Commits projected in a second."""
        return self._rate.per_second

    def feed(self, projection: str, partition: int, count: float, age: float, now: float) -> None:
        """Take a measurement.

        Args:
            count: commits behind.
            age: seconds, of the oldest of them.
            now: seconds of any clock that is never set.
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
        """End a look: what was not fed has nothing waiting. Return what changed, several partitions together.

        Args:
            owned: the partitions that are still ours; the others' alarms end here.
            done: a counter of commits projected.
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
                round(sum(one.behind for _, one in members)),
                max(one.age for _, one in members),
            )
            for (name, before, after), members in changes.items()
        ]

    def report(self) -> dict[str, Any]:
        """Return the last look as JSON data: the worst partitions of each projection, an infinite time as null."""
        return {
            "level": self.worst.name.lower(),
            "rate": round(self.rate, 1),
            "projections": [self._report(one) for one in self.projections.values()],
        }

    def _report(self, one: Behind) -> dict[str, Any]:
        worst = sorted(
            self._alarms[one.projection].items(), key=lambda item: (-item[1].level, -item[1].age, -item[1].count)
        )
        drain = None if math.isinf(one.drain) else round(one.drain, 1)
        return {
            "projection": one.projection,
            "level": one.level.name.lower(),
            "behind": round(one.behind),
            "age": round(one.age, 3),
            "drain": drain,
            "warn": one.levels[Level.WARN],
            "critical": one.levels[Level.CRITICAL],
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
