"""Timers: due times that follow from events, fired once and never early, however the log and the workers behave."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import Engine, select

from kernel.reactions import store, timers
from kernel.reactions.timers import DueTimer
from projections.errors import Fenced
from projections.tables import timer
from tests.kernel.reactions.conftest import Running, Shop
from tests.shops import Order, Pay, Payment, Place, Refuse, shop


async def _expired(at: Shop) -> dict[str, int]:
    found: dict[str, int] = {}
    for _, order, envelope in await at.events():
        if envelope.type == "Expired":
            found[order] = found.get(order, 0) + 1
    return found


async def test_a_timer_is_fired_once_and_not_early(running: Running, app_name: str) -> None:
    async with running(shop(app_name)) as at:
        await asyncio.gather(*(at.client.execute(Order, f"o{n}", Place(expires=0.3)) for n in range(20)))
        await at.settled()
        async with asyncio.timeout(20):
            while len(await _expired(at)) < 20:
                await asyncio.sleep(0.05)
        await at.settled()
        assert set((await _expired(at)).values()) == {1}
        placed = {key: event for _, key, event in await at.events() if event.type == "Placed"}
        for _, key, event in await at.events():
            if event.type == "Expired":
                waited = datetime.fromisoformat(event.time) - datetime.fromisoformat(placed[key].time)
                assert waited.total_seconds() >= 0.3
                assert (event.causation_id, event.depth) == (placed[key].id, 1)


HOUR = 3600.0


@pytest.fixture
def move_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after which services see a clock that is more than an hour ahead."""
    return lambda: monkeypatch.setattr("kernel.assembly.time", SimpleNamespace(time=lambda: time.time() + HOUR + 60))


async def test_a_cancelled_timer_is_not_fired(
    running: Running, app_name: str, engine: Engine, move_clock: Callable[[], None]
) -> None:
    async with running(shop(app_name)) as at:
        await at.client.execute(Order, "o", Place(expires=HOUR))
        await at.client.execute(Order, "other", Place(expires=HOUR))
        await at.settled()
        await at.client.execute(Payment, "pay-o", Pay())
        await at.settled()
        assert [row["name"] for row in timers.pending(engine)] == ["other"]
    move_clock()
    async with running(shop(app_name)) as at:
        await at.until(lambda: not timers.pending(engine))
        await at.settled()
        assert await at.counts() == {"Placed": 2, "Requested": 2, "Paid": 1, "Confirmed": 1, "Expired": 1}


async def test_what_was_due_in_an_outage_is_fired_afterwards(
    running: Running, app_name: str, engine: Engine, move_clock: Callable[[], None]
) -> None:
    async with running(shop(app_name)) as at:
        await asyncio.gather(*(at.client.execute(Order, f"o{n}", Place(expires=HOUR)) for n in range(30)))
        await at.settled()
        assert len(timers.pending(engine)) == 30
    move_clock()
    async with running(shop(app_name)) as at:
        await at.until(lambda: not timers.pending(engine))
        await at.settled()
        assert await _expired(at) == {f"o{n}": 1 for n in range(30)}


async def test_an_owner_that_dies_while_firing_leads_to_no_second_command(
    running: Running, app_name: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle, crashes = timers.settle, itertools.count(1)

    def crash(*arguments: Any) -> None:
        if next(crashes) <= 2:
            raise RuntimeError("the process is gone before it is noted")
        settle(*arguments)

    monkeypatch.setattr(timers, "settle", crash)
    async with running(shop(app_name)) as at:
        await asyncio.gather(*(at.client.execute(Order, f"o{n}", Place(expires=0.1)) for n in range(50)))
        await at.settled()
        await at.until(lambda: next(crashes) > 3 and not timers.pending(engine))
        await at.settled()
        assert await _expired(at) == {f"o{n}": 1 for n in range(50)}


async def test_a_rejected_timer_is_recorded_and_over(
    running: Running, app_name: str, engine: Engine, move_clock: Callable[[], None]
) -> None:
    async with running(shop(app_name)) as at:
        await at.client.execute(Order, "o", Place(expires=HOUR))
        await at.client.execute(Order, "o", Refuse("no"))
        await at.settled()
    move_clock()
    async with running(shop(app_name)) as at:
        await at.until(lambda: bool(store.rejections(engine)))
        await at.until(lambda: not timers.pending(engine))
        (row,) = store.rejections(engine, "Fulfilment")
        assert (row["command"], row["aggregate_id"], row["reason"]) == ("Expire", "o", "it is refused")


async def test_a_timer_whose_command_fails_is_tried_again(
    running: Running, app_name: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Order, command: object) -> None:
        raise ValueError("not today")

    app = shop(app_name)
    handlers = app.types["Order"].handlers
    expire = next(cls for cls in handlers if cls.__name__ == "Expire")
    good = handlers[expire].function
    handlers[expire].function = fail
    async with running(app, dead_letters__retry_after=0.2) as at:
        await at.client.execute(Order, "o", Place(expires=0.1))
        await at.until(lambda: bool(timers.pending(engine, failed=True)))
        (row,) = timers.pending(engine, "Fulfilment")
        assert "ValueError: not today" in row["error"]
        handlers[expire].function = good
        await at.until(lambda: not timers.pending(engine))
        assert await _expired(at) == {"o": 1}


# in the database alone


@contextmanager
def _policy(engine: Engine) -> Iterator[None]:
    app = shop("shop")
    store.register(engine, app.reactions, 4, 0)
    yield


def _change(name: str, sequence: int, due: int | None) -> dict[str, Any]:
    owed = None if due is None else "{}"
    return {"name": name, "partition": 1, "stream_sequence": sequence, "place": 0, "due": due, "owed": owed}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("together", [True, False])
def test_of_changes_to_a_timer_that_of_the_latest_event_wins_in_whatever_order_they_come(
    read_side_engine: Engine, order: Sequence[int], together: bool
) -> None:
    engine = read_side_engine
    with _policy(engine):
        changes = [[_change("t", 5, 50), _change("t", 7, None), _change("t", 9, 90)][place] for place in order]
        for written in [changes] if together else [[change] for change in changes]:
            store.write(engine, "Fulfilment", 0, store.ReactionWrite(timers=list(written)))
        (row,) = timers.pending(engine)
        assert (row["stream_sequence"], row["due"]) == (9, 90)


def test_a_cancellation_that_comes_first_holds_until_all_partitions_have_passed_it(read_side_engine: Engine) -> None:
    engine = read_side_engine
    with _policy(engine):
        store.write(engine, "Fulfilment", 0, store.ReactionWrite(timers=[_change("t", 7, None)]))
        timers.sweep(engine, "Fulfilment")
        store.write(engine, "Fulfilment", 0, store.ReactionWrite(timers=[_change("t", 5, 50)]))
        assert timers.pending(engine) == []
        claimed = store.claim(engine, "shop", "Fulfilment", range(4))
        assert claimed is not None
        moves = [("Fulfilment", 0, partition, 0, 8) for partition in range(4)]
        store.write(engine, "Fulfilment", claimed.epoch, store.ReactionWrite(moves))
        timers.sweep(engine, "Fulfilment")
        with engine.connect() as connection:
            assert connection.scalars(select(timer.c.name)).all() == []


def test_a_timer_that_was_set_anew_while_it_fired_stays(read_side_engine: Engine) -> None:
    engine = read_side_engine
    with _policy(engine):
        store.write(engine, "Fulfilment", 0, store.ReactionWrite(timers=[_change("t", 5, 50)]))
        (due,) = timers.due_timers(engine, "Fulfilment", range(4), 60)
        assert isinstance(due, DueTimer)
        store.write(engine, "Fulfilment", 0, store.ReactionWrite(timers=[_change("t", 6, 70)]))
        timers.settle(engine, "Fulfilment", [due], [])
        (row,) = timers.pending(engine)
        assert row["due"] == 70


def test_a_person_cancels_timers_by_key(read_side_engine: Engine) -> None:
    engine = read_side_engine
    with _policy(engine):
        written = [_change("a", 5, 50), _change("b", 6, 60)]
        store.write(engine, "Fulfilment", 0, store.ReactionWrite(timers=written))
        assert timers.cancel(engine, "Fulfilment", ["a", "never"]) == 1
        assert [row["name"] for row in timers.pending(engine)] == ["b"]
        assert timers.next_due(engine, "Fulfilment", range(4)) == 60
        assert timers.counts(engine, 55) == {"Fulfilment": (1, 0, 0)}
        assert timers.counts(engine, 65) == {"Fulfilment": (1, 1, 0)}


def test_a_timer_that_is_cancelled_while_its_command_fails_stays_cancelled(read_side_engine: Engine) -> None:
    engine = read_side_engine
    with _policy(engine):
        store.write(engine, "Fulfilment", 0, store.ReactionWrite(timers=[_change("t", 5, 50)]))
        (due,) = timers.due_timers(engine, "Fulfilment", range(4), 60)
        timers.cancel(engine, "Fulfilment", ["t"])
        timers.settle(engine, "Fulfilment", [], [(due, 99, "failed")])
        assert timers.pending(engine) == []


def test_only_the_owner_of_its_partition_sets_a_timer(read_side_engine: Engine) -> None:
    engine = read_side_engine
    with _policy(engine):
        old = store.claim(engine, "shop", "Fulfilment", range(4))
        assert old is not None
        store.claim(engine, "shop", "Fulfilment", range(4))
        with pytest.raises(Fenced):
            store.write(engine, "Fulfilment", old.epoch, store.ReactionWrite(timers=[_change("t", 5, 50)]))
        assert timers.pending(engine) == []
