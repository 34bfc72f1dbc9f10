"""Rows under a key of their own, in a service: two workers, one after the other and beside each other."""

from __future__ import annotations

import asyncio
from pathlib import Path

from kernel import App, Client, Receipt, Service
from projections import dead_letters
from projections.database import open_database
from tests.conftest import settings_for
from tests.keyed import Days, Note, Order, Orders, Pay, Payment


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
