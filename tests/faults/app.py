"""The app under test: tanks with a limit, so that a decision on stale state shows, and handlers that can be poisoned.

Each event carries the level on which it was decided. A note names the colour to tally, or the projection whose
handler is to fail on it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence

from sqlalchemy import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import Aggregate, Rejected, applies, command, event, handles
from kernel import App
from projections import Recorded, Rows, Sql, Tallies, Tally, Transaction

NAME_VARIABLE = "FAULTS_APP"
BROKEN_VARIABLE = "FAULTS_BROKEN"
"""Set for a program whose handlers fail for a tenth of the tanks."""
BROKEN_WORDS = "a bad deploy can't take this tank"
VERSION_VARIABLE = "FAULTS_VERSION"
"""Version of the projections; 1 unless set."""
VERSION = int(os.environ.get(VERSION_VARIABLE, "1"))
LIMIT = 100


@event
class Filled:
    amount: int
    level: int
    note: str


@event
class Drained:
    amount: int
    level: int
    note: str


@event
class Marked:
    note: str


@command
class Fill:
    amount: int
    note: str


@command
class Drain:
    amount: int
    note: str


@command
class Burst:
    """Several steps, all or none; a negative step drains."""

    amounts: list[int]
    notes: list[str]


@command
class Mark:
    note: str


class Tank(Aggregate):
    level: int = 0

    @handles
    def fill(self, command: Fill) -> Filled:
        return self._filled(self.level, command.amount, command.note)

    @handles
    def drain(self, command: Drain) -> Drained:
        return self._drained(self.level, command.amount, command.note)

    @handles
    def burst(self, command: Burst) -> list[Filled | Drained]:
        level, events = self.level, []
        for amount, note in zip(command.amounts, command.notes, strict=True):
            made = self._filled(level, amount, note) if amount >= 0 else self._drained(level, -amount, note)
            level = made.level
            events.append(made)
        return events

    @handles
    def mark(self, command: Mark) -> Marked:
        return Marked(command.note)

    def _filled(self, level: int, amount: int, note: str) -> Filled:
        if level + amount > LIMIT:
            raise Rejected(f"level is {self.level}")
        return Filled(amount, level + amount, note)

    def _drained(self, level: int, amount: int, note: str) -> Drained:
        if amount > level:
            raise Rejected(f"level is {self.level}")
        return Drained(amount, level - amount, note)

    @applies
    def filled(self, event: Filled) -> None:
        self.level += event.amount

    @applies
    def drained(self, event: Drained) -> None:
        self.level -= event.amount

    @applies
    def marked(self, event: Marked) -> None:
        pass


class Base(DeclarativeBase):
    pass


class Level(Base):
    __tablename__ = "levels"
    tank: Mapped[str] = mapped_column(primary_key=True)
    level: Mapped[int] = mapped_column(default=0)
    events: Mapped[int] = mapped_column(default=0)
    last: Mapped[str | None]


class Colour(Base):
    __tablename__ = "colours"
    colour: Mapped[str] = mapped_column(primary_key=True)
    times: Mapped[int] = mapped_column(default=0)
    amount: Mapped[int] = mapped_column(default=0)


class Entry(Base):
    """An event. No column is unique: a database that refuses duplicates would hide them from the checker."""

    __tablename__ = "entries"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    tank: Mapped[str]
    sequence: Mapped[int]
    kind: Mapped[str]
    amount: Mapped[int]
    note: Mapped[str]


def _poisoned(note: str, projection: str) -> None:
    if note.startswith(f"poison-{projection} "):
        raise ValueError(f"{projection} can't take this")


def _broken(tank: str) -> None:
    if BROKEN_VARIABLE in os.environ and zlib.crc32(tank.encode()) % 10 == 0:
        raise ValueError(BROKEN_WORDS)


class Levels(Rows[Level], of=Tank, version=VERSION):
    @applies
    def filled(self, row: Level, event: Filled) -> None:
        self._count(row, event.note, event.amount)

    @applies
    def drained(self, row: Level, event: Drained) -> None:
        self._count(row, event.note, -event.amount)

    @applies
    def marked(self, row: Level, event: Marked) -> None:
        self._count(row, event.note, 0)

    def _count(self, row: Level, note: str, change: int) -> None:
        _broken(row.tank)
        _poisoned(note, "Levels")
        row.level += change
        row.events += 1
        row.last = note


class Colours(Tallies[Colour], of=Tank, version=VERSION):
    @applies
    def filled(self, tally: Tally[Colour], event: Filled) -> None:
        self._count(tally, event.note, event.amount)

    @applies
    def drained(self, tally: Tally[Colour], event: Drained) -> None:
        self._count(tally, event.note, -event.amount)

    @applies
    def marked(self, tally: Tally[Colour], event: Marked) -> None:
        self._count(tally, event.note, 0)

    def _count(self, tally: Tally[Colour], note: str, change: int) -> None:
        colour = note.split(" ", maxsplit=1)[0]
        tally[colour].times += 1
        tally[colour].amount += change
        _poisoned(note, "Colours")


class Entries(Sql, of=Tank):
    tables = (Entry,)

    @applies
    def filled(self, tx: Transaction, events: Sequence[Recorded[Filled]]) -> None:
        self._insert(tx, [(recorded, "Filled", recorded.event.amount) for recorded in events])

    @applies
    def drained(self, tx: Transaction, events: Sequence[Recorded[Drained]]) -> None:
        self._insert(tx, [(recorded, "Drained", recorded.event.amount) for recorded in events])

    @applies
    def marked(self, tx: Transaction, events: Sequence[Recorded[Marked]]) -> None:
        self._insert(tx, [(recorded, "Marked", 0) for recorded in events])

    def _insert(self, tx: Transaction, made: list[tuple[Recorded[Filled | Drained | Marked], str, int]]) -> None:
        tx.execute(
            insert(tx.table(Entry)),
            [
                {
                    "tank": recorded.meta.aggregate_id,
                    "sequence": recorded.meta.sequence,
                    "kind": kind,
                    "amount": amount,
                    "note": recorded.event.note,
                }
                for recorded, kind, amount in made
            ],
        )
        for recorded, _, _ in made:
            _broken(recorded.meta.aggregate_id)
            _poisoned(recorded.event.note, "Entries")


def tanks(name: str) -> App:
    """Return the app under this name, and so with its own stream."""
    from tests.faults.gauges import Bell, Gauge, Stories, Watch

    projections = [Levels, Colours, Entries, Stories]
    return App(name, aggregates=[Tank, Gauge], projections=projections, policies=[Watch], effects=[Bell])


app = tanks(os.environ.get(NAME_VARIABLE, "faults"))
