"""Which faults come in a run, in which order, how long, and how far apart: all of it from one seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """The faults. `faults.py` says what each does."""

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


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault.

    Attributes:
        seconds: how long it lasts, where that means something.
        pause: seconds before it, after the one before.
        choice: decides between the variants of a fault, such as which worker.
        settle: whether commands must get through again before the next.
        overlap: whether the next one begins while this one lasts.
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
    Kind.WORKERS_KILL,
]
"""The faults of the short test; but for the first in an order of the seed's."""


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
    """Return a schedule of about so many seconds: each kind at least once, the rest mostly kills."""
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
    return _in_order(random.Random(seed), SHORT[1:])


def _in_order(chance: random.Random, kinds: list[Kind]) -> list[Fault]:
    """Shuffle; but poison comes first, so that everything else happens to aggregates which wait behind it."""
    chance.shuffle(kinds)
    return [_fault(chance, kind) for kind in [Kind.POISON, *kinds]]
