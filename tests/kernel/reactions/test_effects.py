"""Effects: what is done outside is done at least once, in order for each aggregate, and again when it failed."""

from __future__ import annotations

import asyncio

from sqlalchemy import Engine, select

from aggregates import Meta, reacts
from kernel import Effect, Rebuild
from kernel.reactions import store
from projections import dead_letters
from projections.tables import checkpoint
from tests.kernel.reactions.conftest import Running, Shop
from tests.shops import Confirm, Mails, Order, Place, Placed, Refuse, shop


async def _confirm(at: Shop, *orders: str) -> None:
    for order in orders:
        await at.client.execute(Order, order, Place())
        await at.client.execute(Order, order, Confirm())


async def test_each_event_has_its_effect_and_a_rebuild_has_none(running: Running, app_name: str) -> None:
    mails = Mails()
    app = shop(app_name, policies=(), effects=[mails])
    async with running(app) as at:
        await _confirm(at, *(f"o{n}" for n in range(20)))
        await at.settled()
        assert sorted(order for _, order in mails.sent) == sorted(f"o{n}" for n in range(20))
        ids = {key: event.id for _, key, event in await at.events() if event.type == "Confirmed"}
        assert {(ids[order], order) for order in ids} == set(mails.sent)
        await Rebuild(app, at.service.parts.log, at.service.parts.engine, [app.projection("Orders")]).run()
        await at.settled()
    async with running(app) as at:
        await at.settled()
    assert len(mails.sent) == 20


async def test_an_effect_that_fails_is_tried_again_and_holds_up_its_aggregate_alone(
    running: Running, app_name: str, engine: Engine
) -> None:
    mails = Mails()
    mails.failing.add("bad")
    async with running(shop(app_name, policies=(), effects=[mails]), dead_letters__retry_after=0.1) as at:
        await _confirm(at, "bad")
        await at.client.execute(Order, "bad", Refuse("second thoughts"))
        await _confirm(at, "good")
        await at.until(lambda: mails.tried.count("bad") > 2)
        assert [order for _, order in mails.sent] == ["good"]
        (parked,) = dead_letters.waiting(engine, "Mails")
        assert (parked.aggregate_id, parked.events) == ("bad", 2)
        assert "the mail server says no" in parked.error
        mails.failing.clear()
        await at.until(lambda: not dead_letters.waiting(engine, "Mails"))
        kinds = {event.id: event.type for _, _, event in await at.events()}
    assert [kinds[event] for event, order in mails.sent if order == "bad"] == ["Confirmed", "Refused"]


async def test_an_effect_that_hangs_holds_up_its_aggregate_alone(
    running: Running, app_name: str, engine: Engine
) -> None:
    mails = Mails()
    mails.blocked["slow"] = asyncio.Event()
    async with running(shop(app_name, policies=(), effects=[mails])) as at:
        await _confirm(at, "slow", *(f"o{n}" for n in range(20)))
        await at.until(lambda: len(mails.sent) == 20)
        assert dead_letters.waiting(engine, "Mails") == []
        mails.blocked["slow"].set()
        await at.settled()
        assert len(mails.sent) == 21


async def test_a_checkpoint_waits_for_what_is_under_way(running: Running, app_name: str, engine: Engine) -> None:
    mails = Mails()
    mails.blocked["slow"] = asyncio.Event()
    async with running(shop(app_name, policies=(), effects=[mails])) as at:
        subjects = at.service.parts.log.subjects
        place = subjects.partition("Order", "slow")
        neighbour = next(f"n{n}" for n in range(10_000) if subjects.partition("Order", f"n{n}") == place)
        await _confirm(at, "slow", neighbour, "fast")

        def passed(order: str) -> int:
            own = checkpoint.c.projection == "Mails", checkpoint.c.partition == subjects.partition("Order", order)
            with engine.connect() as connection:
                return int(connection.scalar(select(checkpoint.c.sequence).where(*own)) or 0)

        await at.until(lambda: passed("fast") == 6)
        assert passed("slow") < 2
        mails.blocked["slow"].set()
        await at.until(lambda: passed("slow") >= 2)


class Hasty(Effect, of=Order, timeout=0.1):
    def __init__(self) -> None:
        self.tried = 0

    @reacts
    async def placed(self, event: Placed, meta: Meta) -> None:
        self.tried += 1
        if self.tried == 1:
            await asyncio.sleep(60)


async def test_an_effect_that_takes_too_long_is_cancelled_and_tried_again(
    running: Running, app_name: str, engine: Engine
) -> None:
    hasty = Hasty()
    async with running(shop(app_name, policies=(), effects=[hasty]), dead_letters__retry_after=0.1) as at:
        await at.client.execute(Order, "o", Place())
        await at.until(lambda: hasty.tried == 2 and not dead_letters.waiting(engine, "Hasty"))


class Busy(Effect, of=Order, concurrency=3):
    def __init__(self) -> None:
        self.now = self.most = 0
        self.done = asyncio.Event()

    @reacts
    async def placed(self, event: Placed) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        await self.done.wait()
        self.now -= 1


async def test_no_more_handlers_of_an_effect_run_at_once_than_it_says(running: Running, app_name: str) -> None:
    busy = Busy()
    async with running(shop(app_name, policies=(), effects=[busy])) as at:
        await asyncio.gather(*(at.client.execute(Order, f"o{n}", Place()) for n in range(12)))
        await at.until(lambda: busy.now == 3)
        busy.done.set()
        await at.settled()
    assert busy.most == 3


async def test_an_effect_is_replayed_from_where_a_person_says(running: Running, app_name: str, engine: Engine) -> None:
    mails = Mails()
    async with running(shop(app_name, policies=(), effects=[mails])) as at:
        await _confirm(at, "a")
        middle = (await at.client.execute(Order, "b", Place())).sequence
        await at.client.execute(Order, "b", Confirm())
        await at.settled()
        store.go_back(engine, "Mails", middle - 1)
        await at.until(lambda: len(mails.sent) == 3)
        await at.settled()
    assert [order for _, order in mails.sent] == ["a", "b", "b"]


async def test_an_effect_goes_on_with_what_waited_after_a_restart(
    running: Running, app_name: str, engine: Engine
) -> None:
    mails = Mails()
    mails.failing.add("bad")
    app = shop(app_name, policies=(), effects=[mails])
    async with running(app, dead_letters__retries=0) as at:
        await _confirm(at, "bad")
        await at.until(lambda: bool(dead_letters.waiting(engine, "Mails")))
        (parked,) = dead_letters.waiting(engine, "Mails")
        assert parked.next_attempt is None
    mails.failing.clear()
    async with running(app) as at:
        await at.client.execute(Order, "bad", Refuse("later"))
        await at.settled()
        assert mails.sent == []
        from kernel.cli.asking import ask_workers

        (done,) = await ask_workers(engine, dead_letters.waiting(engine, "Mails"))
        assert (done.folded, done.left) == (2, 0)
    assert [order for _, order in mails.sent] == ["bad", "bad"]
