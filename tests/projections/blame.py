"""What the tests of blame share: projections that refuse some events, and how to fold and to find what was parked."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import CheckConstraint, Engine, Integer, Numeric, String, delete, insert, select
from sqlalchemy.orm import DeclarativeBase, mapped_column

from aggregates import Aggregate, applies, command, event, handles
from kernel import App
from projections import DROP, Drop, Recorded, Rows, Sql, Tallies, Tally, Transaction
from projections.tables import dead_letter
from tests.conftest import Commit, ReadSide, envelopes


@command
class Nothing:
    pass


@event
class Named:
    name: str | None


@event
class Unnamed:
    name: str


@event
class Counted:
    first: str
    second: str
    times: int = 1


@event
class Gone:
    pass


class Thing(Aggregate):
    @handles
    def nothing(self, command: Nothing) -> None: ...

    @applies
    def any(self, event: Named | Unnamed | Counted | Gone) -> None: ...


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = "things"
    __table_args__ = (CheckConstraint("name <> 'bad'"),)
    id = mapped_column(String, primary_key=True)
    name = mapped_column(String(20), nullable=True)
    count = mapped_column(Integer, default=0)


class Owner(Base):
    __tablename__ = "owners"
    id = mapped_column(String, primary_key=True)
    name = mapped_column(String(20), nullable=True, unique=True)


class Count(Base):
    __tablename__ = "counts"
    __table_args__ = (CheckConstraint("times < 4"),)
    name = mapped_column(String, primary_key=True)
    times = mapped_column(Integer)
    cents = mapped_column(Numeric(12, 2))


class Taken(Base):
    __tablename__ = "taken"
    name = mapped_column(String, primary_key=True)


class Things(Rows[Row], of=Thing):
    @applies
    def named(self, row: Row, event: Named) -> None:
        if event.name == "raises":
            row.count = -1
            raise ValueError("a handler that raises half way")
        row.name = event.name
        row.count += 1

    @applies
    def gone(self, row: Row, event: Gone) -> Drop:
        return DROP


class Owners(Rows[Owner], of=Thing):
    @applies
    def named(self, row: Owner, event: Named) -> None:
        row.name = event.name


class Counts(Tallies[Count], of=Thing):
    @applies
    def named(self, tally: Tally[Count], event: Named) -> None:
        tally[event.name].times += 1
        if event.name == "half":
            raise ValueError("after it has counted")

    @applies
    def counted(self, tally: Tally[Count], event: Counted) -> None:
        tally[event.first].times += event.times
        tally[event.second].times += event.times


class Names(Sql, of=Thing):
    tables = (Taken,)

    @applies
    def named(self, tx: Transaction, events: Sequence[Recorded[Named]]) -> None:
        tx.execute(insert(tx.table(Taken)), [{"name": recorded.event.name} for recorded in events])

    @applies
    def unnamed(self, tx: Transaction, events: Sequence[Recorded[Unnamed]]) -> None:
        table = tx.table(Taken)
        tx.execute(delete(table).where(table.c.name.in_([recorded.event.name for recorded in events])))


def side_of(engine: Engine, *projections: Any) -> ReadSide:
    """Return the read side of an app with these projections."""
    return ReadSide(engine, App("things", aggregates=[Thing], projections=projections))


def commit(place: int, key: str, after: int, *events: Any) -> Commit:
    """Return a commit of a thing at a place of the stream, whose first event follows the thing's event `after`."""
    return place, "Thing", key, envelopes(Thing, list(events), after)


def commits(*histories: tuple[str, list[Any]]) -> list[Commit]:
    """Return one commit for each entry, in stream order."""
    versions: dict[str, int] = {}
    made = []
    for place, (aggregate_id, events) in enumerate(histories, 1):
        made.append(commit(place, aggregate_id, versions.get(aggregate_id, 0), *events))
        versions[aggregate_id] = versions.get(aggregate_id, 0) + len(events)
    return made


def letters(engine: Engine) -> list[tuple[str, str, int]]:
    """Return projection, aggregate id and sequence of the dead letters, sorted."""
    with engine.connect() as connection:
        rows = connection.execute(select(dead_letter).order_by(dead_letter.c.id)).all()
    return sorted((row.projection, row.aggregate_id, row.sequence) for row in rows)
