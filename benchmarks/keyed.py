"""The rows about views under a key of their own: over two aggregates, beside rows by id of the same events."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import Aggregate, applies, command, event, handles
from benchmarks import backlog, our_projection, places
from benchmarks.places import Postgres
from benchmarks.projecting import SURVIVES
from benchmarks.report import Row
from benchmarks.rounds import in_turns, medians, rounded
from kernel.app import App
from kernel.log import open_log
from kernel.settings.sources import settings_of
from kernel.transport.dial import connect
from projections import Rows

ORDERS, EACH = 5_000, 6


@command
class Change:
    order: str
    cents: int


@command
class Pay:
    order: str
    cents: int


@event
class Changed:
    order: str
    cents: int


@event
class Paid:
    order: str
    cents: int


class Order(Aggregate):
    @handles
    def change(self, command: Change) -> Changed:
        return Changed(command.order, command.cents)

    @applies
    def changed(self, event: Changed) -> None: ...


class Payment(Aggregate):
    @handles
    def pay(self, command: Pay) -> Paid:
        return Paid(command.order, command.cents)

    @applies
    def paid(self, event: Paid) -> None: ...


class Base(DeclarativeBase):
    pass


class Standing(Base):
    __tablename__ = "standings"
    order: Mapped[str] = mapped_column(primary_key=True)
    owed: Mapped[int] = mapped_column(default=0)
    paid: Mapped[int] = mapped_column(default=0)


class OrderRow(Base):
    __tablename__ = "order_rows"
    id: Mapped[str] = mapped_column(primary_key=True)
    owed: Mapped[int] = mapped_column(default=0)


class PaymentRow(Base):
    __tablename__ = "payment_rows"
    id: Mapped[str] = mapped_column(primary_key=True)
    paid: Mapped[int] = mapped_column(default=0)


class Standings(Rows[Standing], of=(Order, Payment)):
    def key(self, event: Changed | Paid) -> str:
        return event.order

    @applies
    def changed(self, row: Standing, event: Changed) -> None:
        row.owed += event.cents

    @applies
    def paid(self, row: Standing, event: Paid) -> None:
        row.paid += event.cents


class OrdersById(Rows[OrderRow], of=Order):
    @applies
    def changed(self, row: OrderRow, event: Changed) -> None:
        row.owed += event.cents


class PaymentsById(Rows[PaymentRow], of=Payment):
    @applies
    def paid(self, row: PaymentRow, event: Paid) -> None:
        row.paid += event.cents


KEYED = App("orders", aggregates=[Order, Payment], projections=[Standings])
BY_ID = App("orders", aggregates=[Order, Payment], projections=[OrdersById, PaymentsById])


def commands() -> Iterator[tuple[str, Any]]:
    """Yield changes and payments of orders in turns; each order has one payment."""
    for number in range(EACH):
        for order in range(ORDERS):
            yield f"order-{order}", Change(f"order-{order}", number)
            yield f"payment-{order}", Pay(f"order-{order}", number)


async def measure(path: Path, pg: Postgres) -> list[Row]:
    """Measure live projection and rebuild of both apps in turns, on both databases."""
    numbers = itertools.count()
    rows: list[Row] = []
    async with places.nats(path / "nats") as url:
        wire = await connect(url, name="bench")
        log = await open_log(wire, KEYED.name, settings_of({"jetstream.group_commit": "never"}))
        try:
            count = await backlog.fill(KEYED, log, commands())
            for database in ("SQLite", "PostgreSQL"):

                def made(database: str = database) -> str:
                    sqlite = f"sqlite:///{path / f'{next(numbers)}.db'}"
                    return sqlite if database == "SQLite" else pg.database("keyed", relaxed=True)

                figures = await in_turns(
                    f"keyed on {database}",
                    {
                        "live, keyed": lambda made=made: our_projection.live(KEYED, log, made()),  # type: ignore[misc]
                        "live, by id": lambda made=made: our_projection.live(BY_ID, log, made()),  # type: ignore[misc]
                        "rebuild, keyed": lambda made=made: our_projection.rebuild(KEYED, log, made()),  # type: ignore[misc]
                        "rebuild, by id": lambda made=made: our_projection.rebuild(BY_ID, log, made()),  # type: ignore[misc]
                    },
                )
                rows += [_row(kind, database, figures, count) for kind in ("live", "rebuild")]
        finally:
            await log.close()
            await wire.close()
    return rows


def _row(kind: str, database: str, figures: dict[str, list[float]], count: int) -> Row:
    keyed, by_id = f"{kind}, keyed", f"{kind}, by id"
    found = medians(figures)
    return Row(
        f"{kind} of a keyed view over two aggregates on {database}: {count:,} events, {ORDERS:,} rows",
        "events/s",
        found[keyed],
        limit=found[by_id],
        aim_limit=0.7,
        limit_is="two Rows by id of the same events",
        durability=SURVIVES[database],
        extra={"rounds": rounded({keyed: figures[keyed], by_id: figures[by_id]})},
    )
