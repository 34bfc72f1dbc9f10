"""An app whose rows have keys of their own: events of two aggregate types meet in the rows of orders and of days."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import date
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import Aggregate, applies, command, event, handles
from aggregates.commit import Decision, encode
from aggregates.declaration import declare
from kernel import App
from kernel.log.base import Stored
from kernel.log.memory import MemoryLog
from kernel.projector.grouping import Sorter, batch_of
from kernel.projector.parking import stored_commit
from projections import DROP, Drop, HandlerFailed, Rows
from projections.checkpoints import Move, claim
from projections.exclusions import load_parked
from projections.fold import Folded
from projections.unit_of_work import Write, Writer
from tests.conftest import ReadSide

PARTITIONS = 4


@event
class Noted:
    """Something about an order, which other orders may have a part in."""

    text: str
    orders: list[str]
    day: date = date(2026, 1, 31)


@event
class Paid:
    order: str
    cents: int
    day: date = date(2026, 1, 31)


@command
class Note:
    text: str
    orders: list[str]


@command
class Pay:
    order: str
    cents: int


class Order(Aggregate):
    @handles
    def note(self, command: Note) -> Noted:
        return Noted(command.text, command.orders)

    @applies
    def noted(self, event: Noted) -> None: ...


class Payment(Aggregate):
    @handles
    def pay(self, command: Pay) -> Paid:
        return Paid(command.order, command.cents)

    @applies
    def paid(self, event: Paid) -> None: ...


class Base(DeclarativeBase):
    pass


class OrderView(Base):
    __tablename__ = "order_views"
    order: Mapped[str] = mapped_column(primary_key=True)
    story: Mapped[str] = mapped_column(default="")
    cents: Mapped[int] = mapped_column(default=0)


class Latest(Base):
    __tablename__ = "latest"
    day: Mapped[date] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(primary_key=True)
    of: Mapped[str | None]


class Orders(Rows[OrderView], of=(Order, Payment)):
    def key(self, event: Noted | Paid) -> str | Sequence[str] | None:
        if isinstance(event, Paid):
            return event.order
        if event.text == "whose":
            raise LookupError("whose is it?")
        return event.orders or None

    @applies
    def noted(self, row: OrderView, event: Noted) -> Drop | None:
        if event.text == "bad":
            raise ValueError(f"bad with {row.order}")
        row.story += f" {event.text}"
        return DROP if event.text == "end" else None

    @applies
    def paid(self, row: OrderView, event: Paid) -> None:
        row.story += f" {event.cents}"
        row.cents += event.cents


class Days(Rows[Latest], of=(Payment, Order)):
    """Texts and dates under another key than an id, the newest of each."""

    def key(self, event: Noted | Paid) -> tuple[date, str]:
        return event.day, "note" if isinstance(event, Noted) else "payment"

    @applies
    def happened(self, row: Latest, event: Noted | Paid) -> None:
        row.of = event.order if isinstance(event, Paid) else event.text


APP = App("orders", aggregates=[Order, Payment], projections=[Orders, Days])
TYPES = {"Order": declare(Order), "Payment": declare(Payment)}


class Log:
    """A log in memory, with commits of the app."""

    def __init__(self, app: App = APP) -> None:
        self.log = MemoryLog(app.name, PARTITIONS)
        self.versions: dict[str, int] = {}

    @property
    def stored(self) -> list[Stored]:
        return self.log._all

    def append(self, aggregate_id: str, *events: Any) -> Stored:
        name = "Order" if isinstance(events[0], Noted) else "Payment"
        address = self.log.subjects.address(name, aggregate_id)
        version = self.versions.get(address.subject, 0)
        self.versions[address.subject] = version + len(events)
        decision = Decision("command", [TYPES[name].event_types[type(event)].encode(event) for event in events])
        payload = encode(f"/orders/{name}", aggregate_id, [decision], version, "2026-01-31T12:00:00Z")
        known = [stored.sequence for stored in self.stored if stored.subject == address.subject]
        self.log.append(address.subject, known[-1] if known else 0, payload)
        return self.stored[-1]


class Worker:
    """Keeps some partitions up to date, as a session does, with what it has folded in memory."""

    def __init__(self, engine: Engine, log: Log, partitions: Sequence[int] = range(PARTITIONS), app: App = APP) -> None:
        self.engine, self.log, self.app = engine, log, app
        self.claim(partitions)

    def claim(self, partitions: Sequence[int]) -> None:
        claimed = claim(self.engine, self.app.name, self.app.projections, partitions)
        self.position, self.generations = claimed.position, claimed.generations
        self.plan = self.app.plan(self.engine.dialect)
        self.writer = Writer(self.engine, self.plan, self.generations, claimed.epoch)
        with self.engine.connect() as connection:
            load_parked(connection, self.plan, self.generations)
        self.at = self.position.lowest
        self.kept: dict[tuple[str, str], tuple[list[Any], int | None]] = {}
        self.sorter = Sorter(
            self.log.log.subjects, self.app.types, self.position, len(self.app.projections),
            lambda *_: None, lambda *_: None, self.plan,
        )  # fmt: skip

    def fold(self, commits: list[Stored]) -> tuple[Write, list[HandlerFailed]]:
        async def sort() -> Any:
            return [*await self.sorter.sort(commits), *await self.sorter.route()]

        groups = asyncio.run(sort())
        folded = Folded(self.plan)
        for group in groups:
            if group.key not in self.kept:
                with self.engine.connect() as connection:
                    rows, _ = self.writer.load_rows(connection, group.key[0], [group.key[1]])
                    kept = self.writer.load_kept(connection, group.key[0], rows).get(group.key[1])
                self.kept[group.key] = rows[group.key[1]], None
            else:
                kept = None
            rows, last = self.kept[group.key]
            last = self.plan.fold(*group.key, rows, group.commits, folded, last, group.skip, kept)
            self.kept[group.key] = rows, last
        for failure, letter in self.sorter.left_out:
            folded.failures.append(failure)
            folded.letters.append(letter)
        self.moves: list[Move] = self.position.moves(self.generations, commits[-1].sequence)
        subjects = self.log.log.subjects
        write = self.writer.freeze(
            folded, self.moves, lambda letter: stored_commit(letter, commits, subjects), batch_of(groups)
        )
        self.writer.park_suspects(write)
        return write, folded.failures

    def project(self, count: int | None = None) -> list[HandlerFailed]:
        """Read and write the next commits. Return what failed."""
        commits = self.log.stored[self.at : None if count is None else self.at + count]
        if not commits:
            return []
        write, failures = self.fold(commits)
        refused = self.writer.commit(write)
        for failure in refused:
            self.plan.park(failure)
            self.kept.pop(failure.aggregate, None)
        for key in [key for key in self.kept if key in self.plan.parked]:
            del self.kept[key]
        self.position.advance(self.moves, self.generations)
        self.at = commits[-1].sequence
        return failures + refused


def prepare(engine: Engine, app: App = APP) -> ReadSide:
    """Make the tables."""
    return ReadSide(engine, app, PARTITIONS)
