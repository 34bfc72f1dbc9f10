"""Rows under a key of their own, in a service: two workers, one after the other and beside each other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Mapped, mapped_column

from aggregates import applies
from kernel import App, Client, Receipt, Service
from kernel.testing import running
from projections import Rows, dead_letters
from projections.database import open_database
from tests.conftest import settings_for
from tests.keyed import Base, Days, Note, Order, Orders, Paid, Pay, Payment

Wait = Callable[..., Coroutine[Any, Any, Any]]


class OrderRow(Base):
    __tablename__ = "order_rows"
    id: Mapped[str] = mapped_column(primary_key=True)
    cents: Mapped[int] = mapped_column(default=0)


async def start(app: App, data: Path, nats: str, database: str) -> Service:
    service = Service(app, settings_for(data, nats=nats, database=database, lease=1.5))
    await service.start()
    return service


async def act(client: Client, number: int) -> Receipt:
    """Note or pay something, each by an aggregate of its own."""
    order = f"o{number % 7}"
    if number % 2:
        return await client.execute(Payment, f"p{number}", Pay(order, 1))
    return await client.execute(Order, f"n{number}", Note("x", [order, "all"]))


async def stories(client: Client, after: list[Receipt]) -> dict[str, tuple[int, int]]:
    rows = await client.query("select * from order_views", after=after)
    return {row["order"]: (row["story"].count("x"), row["cents"]) for row in rows}


def expected(numbers: range) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for number in numbers:
        for order in [f"o{number % 7}"] if number % 2 else [f"o{number % 7}", "all"]:
            notes, cents = found.get(order, (0, 0))
            found[order] = (notes + 1 - number % 2, cents + number % 2)
    return found


async def test_two_workers_keep_them_and_a_query_waits_for_any_event(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    app = App(app_name, aggregates=[Order, Payment], projections=[Orders, Days])
    first = await start(app, tmp_path / "one", nats_url, database_url)
    async with await Client.connect(app, nats=nats_url, database=database_url) as client:
        receipts = [await act(client, number) for number in range(10)]
        assert await stories(client, receipts) == expected(range(10))
        second = await start(app, tmp_path / "two", nats_url, database_url)
        receipts = await asyncio.gather(*(act(client, number) for number in range(10, 80)))
        assert await stories(client, receipts) == expected(range(80))
        for number in range(80, 86):  # each event alone, in a quiet log
            assert await stories(client, [await act(client, number)]) == expected(range(number + 1))
        await first.stop()
        receipts = [await act(client, number) for number in range(86, 90)]
        assert await stories(client, receipts) == expected(range(90))
    await second.stop()


async def test_a_row_that_fails_waits_alone_and_is_a_dead_letter(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    app = App(app_name, aggregates=[Order, Payment], projections=[Orders])
    service = await start(app, tmp_path, nats_url, database_url)
    async with await Client.connect(app, nats=nats_url, database=database_url) as client:
        await client.execute(Order, "n", Note("one", ["1", "2"]))
        await client.execute(Order, "n", Note("bad", ["1"]))
        await client.execute(Order, "n", Note("whose", ["2"]))
        last = await client.execute(Payment, "p", Pay("1", 5))
        await client.execute(Payment, "p", Pay("2", 5))
        last = await client.execute(Order, "n", Note("two", ["2"]))
        rows = await client.query('select "order", story from order_views order by "order"', after=last)
        assert [tuple(row.values()) for row in rows] == [("1", " one"), ("2", " one 5 two")]
    await service.stop()
    engine = open_database(database_url)
    parked = dead_letters.waiting(engine)
    engine.dispose()
    assert {(row.aggregate, row.aggregate_id, row.events) for row in parked} == {("Orders", "1", 2), ("Order", "n", 1)}


async def test_an_event_of_a_newer_program_lets_the_view_wait_and_no_other_projection(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    class Payments(Rows[OrderRow], of=Payment):
        @applies
        def paid(self, row: OrderRow, event: Paid) -> None:
            row.cents += event.cents

    app = App(app_name, aggregates=[Order, Payment], projections=[Orders, Payments])
    service = await start(app, tmp_path, nats_url, database_url)
    async with await Client.connect(app, nats=nats_url, database=database_url) as client:
        receipt = await client.execute(Order, "n", Note("one", ["1"]))
        await client.query("select 1", after=receipt)
        subject = client.log.subjects.address("Order", "n").subject
        (stored,) = await client.log.read_subject(subject)
        newer = stored.payload.replace(b'"sequence":1', b'"sequence":2')
        await client.log.append(subject, stored.sequence, newer.replace(b'"dataversion":1', b'"dataversion":2'), b"")
        await wait_until(lambda: "Orders is paused: only a newer program can go on" in service.parts.projector.state)
        paid = await client.execute(Payment, "p", Pay("1", 5))
        rows = await client.query("select cents from order_rows", after=paid, projections=["Payments"])
        assert rows == [{"cents": 5}]
        assert await client.query("select story, cents from order_views") == [{"story": " one", "cents": 0}]
    await service.stop()


async def test_a_whole_app_in_process_has_them_too() -> None:
    async with running(App("orders", aggregates=[Order, Payment], projections=[Orders, Days])) as kernel:
        await kernel.execute(Order, "n", Note("x", ["1", "2"]))
        receipt = await kernel.execute(Payment, "p", Pay("2", 5))
        assert await stories(kernel, [receipt]) == {"1": (1, 0), "2": (1, 5)}
