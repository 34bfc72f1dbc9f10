"""The faults of a run, their order, durations and distances: all chosen from one seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """The kinds of faults. `faults.py` implements them."""

    WORKER_KILL = "worker killed"
    WORKERS_KILL = "all workers killed"
    WORKER_FREEZE = "worker frozen beyond its lease"
    WORKER_PAUSE = "worker frozen briefly"
    PARENT_KILL = "parent killed"
    PARENT_STOP = "stopped and started"
    SERVER_KILL = "server killed"
    SERVER_FREEZE = "server frozen"
    CUT = "network cut"
    HALF_OPEN = "network half-open"
    DELAY = "network slow"
    DATABASE = "database away"
    POISON = "poison events"
    GARBAGE = "garbage in the stream"
    DEPUTY = "deputy attempts"
    COLD = "all workers killed onto long histories"
    BACKLOG = "backlog over shared tallies"
    BAD_DEPLOY = "bad deploy, rolled back"
    RESTORE = "log restored from its snapshot"
    DEPLOY = "new version deployed, rolled back, shown again"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        seconds: how long it lasts, for faults that last.
        pause: seconds between the previous fault and this one.
        choice: selects the variant of a fault, such as which worker.
        settle: whether commands must take effect again before the next fault.
        overlap: whether the next fault begins while this one lasts.
    """

    kind: Kind
    seconds: float
    pause: float
    choice: int
    settle: bool
    overlap: bool

    def __str__(self) -> str:
        extra = f"{', settle' if self.settle else ''}{', overlap' if self.overlap else ''}"
        return f"+{self.pause:.1f}s {self.kind} {self.seconds:.1f}s ({self.choice}{extra})"


_LENGTHS = {
    Kind.WORKER_FREEZE: (5.0, 8.0),
    Kind.WORKER_PAUSE: (0.3, 1.5),
    Kind.SERVER_KILL: (0.0, 1.5),
    Kind.SERVER_FREEZE: (0.5, 6.0),
    Kind.CUT: (1.0, 4.0),
    Kind.HALF_OPEN: (2.0, 8.0),
    Kind.DELAY: (2.0, 5.0),
    Kind.DATABASE: (1.0, 3.0),
    Kind.BACKLOG: (1.0, 3.0),
    Kind.BAD_DEPLOY: (1.0, 4.0),
    Kind.DEPLOY: (0.2, 2.0),
    Kind.WORKERS_KILL: (0.0, 1.0),
    Kind.PARENT_KILL: (0.0, 1.0),
}
_RECOVERY_S = 2.0
_KILLS = [Kind.WORKER_KILL] * 5 + [Kind.SERVER_KILL] * 2 + [Kind.WORKERS_KILL, Kind.PARENT_KILL]
SHORT = [
    Kind.POISON,
    Kind.WORKER_KILL,
    Kind.CUT,
    Kind.SERVER_KILL,
    Kind.WORKER_FREEZE,
    Kind.GARBAGE,
    Kind.DEPUTY,
]
"""The faults of each short test. The first one stays first; the seed orders the others."""
BY_TURNS = [[Kind.COLD, Kind.BACKLOG], [Kind.BAD_DEPLOY, Kind.RESTORE], [Kind.DEPLOY]]
"""Further faults of the short test, of which a seed has some: all of them would take too long."""


def _fault(chance: random.Random, kind: Kind) -> Fault:
    return Fault(
        kind,
        round(chance.uniform(*_LENGTHS.get(kind, (0.0, 0.0))), 2),
        round(chance.choice([0.1, 0.5, 1.0, 2.0]) * chance.random() * 2, 2),
        chance.randrange(1 << 16),
        chance.random() < 0.6,
        chance.random() < 0.25,
    )


def plan(seed: int, seconds: float) -> list[Fault]:
    """Return a schedule of about this many seconds: each kind at least once, the rest mostly kills."""
    chance = random.Random(seed)
    kinds = [*Kind, Kind.POISON, Kind.GARBAGE, Kind.WORKER_FREEZE, Kind.WORKER_FREEZE]
    length = sum(sum(_LENGTHS.get(kind, (0.0, 0.0))) / 2 + _RECOVERY_S for kind in kinds)
    while length < seconds:
        kind = chance.choice(_KILLS) if chance.random() < 0.75 else chance.choice(list(Kind))
        kinds.append(kind)
        length += sum(_LENGTHS.get(kind, (0.0, 0.0))) / 2 + _RECOVERY_S
    return _in_order(chance, kinds)


def short_plan(seed: int) -> list[Fault]:
    """Return the schedule of the short test."""
    return _in_order(random.Random(seed), [*SHORT[1:], *BY_TURNS[seed // 2 % len(BY_TURNS)]])


def _in_order(chance: random.Random, kinds: list[Kind]) -> list[Fault]:
    """Shuffle all faults except poison, which comes first, so that the other faults meet parked aggregates."""
    chance.shuffle(kinds)
    return [_fault(chance, kind) for kind in [Kind.POISON, *kinds]]
