"""Policies on a real log and both databases: what is owed is done once, whatever happens."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Engine, select, update

from aggregates import Meta, Policy, Reactions, Rejected, Send, reacts
from kernel import Rebuild
from kernel.reactions import letters, store
from kernel.reactions.work import PolicyWorker
from projections import dead_letters
from projections.errors import Fenced
from projections.tables import checkpoint
from tests.kernel.reactions.conftest import Running, Shop
from tests.shops import Fulfilment, Order, Pay, Payment, Place, Placed, Refuse, Request, shop


async def test_a_policy_sends_what_it_owes_and_says_why(running: Running, app_name: str) -> None:
    async with running(shop(app_name)) as at:
        await at.client.execute(Order, "o", Place(), command_id="c-1", correlation_id="visit")
        await at.settled()
        await at.client.execute(Payment, "pay-o", Pay())
        await at.settled()
        events = await at.events()
    assert [(kind, envelope.type) for kind, _, envelope in events] == [
        ("Order", "Placed"), ("Payment", "Requested"), ("Payment", "Paid"), ("Order", "Confirmed"),
    ]  # fmt: skip
    placed, requested, paid, confirmed = (envelope for _, _, envelope in events)
    assert (requested.causation_id, requested.correlation_id, requested.depth) == (placed.id, "visit", 1)
    assert (confirmed.causation_id, confirmed.correlation_id, confirmed.depth) == (paid.id, paid.commandid, 1)
    assert placed.depth == 0


async def test_what_was_sent_before_a_crash_takes_effect_once(
    running: Running, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashes = 0

    def crash(engine: Engine, name: str, epoch: int, done: store.ReactionWrite) -> None:
        nonlocal crashes
        if done.moves and crashes < 3:
            crashes += 1
            raise RuntimeError("the process is gone before the checkpoint is written")
        write(engine, name, epoch, done)

    write = store.write
    monkeypatch.setattr(store, "write", crash)
    async with running(shop(app_name)) as at:
        await asyncio.gather(*(at.client.execute(Order, f"o{n}", Place()) for n in range(50)))
        await at.until(lambda: crashes == 3)
        await at.settled()
        assert await at.counts() == {"Placed": 50, "Requested": 50}


async def test_a_policy_goes_on_after_a_restart_where_it_was(running: Running, app_name: str) -> None:
    async with running(shop(app_name)) as at:
        await at.client.execute(Order, "a", Place())
        await at.settled()
    async with running(shop(app_name, policies=())) as at:
        await at.client.execute(Order, "b", Place())
    async with running(shop(app_name)) as at:
        await at.settled()
        assert await at.counts() == {"Placed": 2, "Requested": 2}


class Later(Policy, of=Order, start="beginning"):
    @reacts
    def placed(self, event: Placed, meta: Meta) -> Reactions:
        return Send(Payment, f"later-{meta.aggregate_id}", Request(meta.aggregate_id, 1))


async def test_a_new_policy_begins_now_or_at_the_beginning(running: Running, app_name: str) -> None:
    async with running(shop(app_name, policies=())) as at:
        await asyncio.gather(*(at.client.execute(Order, f"o{n}", Place()) for n in range(20)))
    async with running(shop(app_name, policies=(Fulfilment, Later))) as at:
        await at.client.execute(Order, "new", Place())
        await at.settled()
        sent = [key for kind, key, _ in await at.events() if kind == "Payment"]
    assert sorted(sent) == sorted(["pay-new", "later-new", *(f"later-o{n}" for n in range(20))])


async def test_a_rebuild_runs_no_policy(running: Running, app_name: str) -> None:
    app = shop(app_name)
    async with running(app) as at:
        await asyncio.gather(*(at.client.execute(Order, f"o{n}", Place()) for n in range(30)))
        await at.settled()
        before = [envelope.id for _, _, envelope in await at.events()]
        parts = at.service.parts
        await Rebuild(app, parts.log, parts.engine, [app.projection("Orders")]).run()
        await at.settled()
        assert [envelope.id for _, _, envelope in await at.events()] == before


async def test_a_rejection_is_recorded_and_handled_and_stays(
    running: Running, app_name: str, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    async with running(shop(app_name)) as at:
        await at.client.execute(Order, "dear", Place(cents=5_000))
        await at.settled()
        assert (await at.client.load(Order, "dear")).state.state == "refused"
        (row,) = store.rejections(engine, "Fulfilment")
        assert (row["command"], row["aggregate_id"], row["reason"]) == ("Request", "pay-dear", "too much")
        before = [envelope.id for _, _, envelope in await at.events()]
    # as after a crash before the checkpoint; and meanwhile such a payment would be taken
    _go_back(engine, "Fulfilment")
    monkeypatch.setattr("tests.shops.MOST", 10_000)
    async with running(shop(app_name)) as at:
        await at.settled()
        assert [envelope.id for _, _, envelope in await at.events()] == before
        assert len(store.rejections(engine, "Fulfilment")) == 1


def _go_back(engine: Engine, name: str) -> None:
    with engine.begin() as connection:
        connection.execute(update(checkpoint).where(checkpoint.c.projection == name).values(sequence=0))


async def test_what_fails_parks_its_aggregate_alone_and_in_order(
    running: Running, app_name: str, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    async with running(shop(app_name)) as at:
        await at.client.execute(Order, "bad", Place(cents=13))
        await at.client.execute(Order, "bad", Place(cents=14))
        await at.client.execute(Order, "good", Place())
        await at.settled()
        assert [key for kind, key, _ in await at.events() if kind == "Payment"] == ["pay-good"]
        (parked,) = dead_letters.waiting(engine, "Fulfilment")
        assert (parked.aggregate, parked.aggregate_id, parked.events, parked.reaction) == ("Order", "bad", 2, True)
        assert "ValueError: unlucky" in parked.error
        monkeypatch.setattr("tests.shops.UNLUCKY", -1)
        assert letters.ask_again(engine, "Fulfilment", "Order", "bad") == 2
        await at.until(lambda: not dead_letters.waiting(engine, "Fulfilment"))
        await at.client.execute(Order, "bad", Place(cents=15))
        await at.settled()
        asked = [envelope.data for kind, key, envelope in await at.events() if (kind, key) == ("Payment", "pay-bad")]
    assert [bytes(data) for data in asked] == [b'{"order":"bad","cents":%d}' % cents for cents in (13, 14, 15)]


async def test_a_skipped_event_is_owed_nothing(running: Running, app_name: str, engine: Engine) -> None:
    async with running(shop(app_name)) as at:
        await at.client.execute(Order, "bad", Place(cents=13))
        await at.client.execute(Order, "bad", Place(cents=14))
        await at.settled()
        assert letters.skip(engine, "Fulfilment", "Order", "bad", "ann", "it was a test") == 1
        letters.ask_again(engine, "Fulfilment", "Order", "bad")
        await at.until(lambda: not dead_letters.waiting(engine, "Fulfilment"))
        await at.settled()
        assert [envelope.type for kind, _, envelope in await at.events() if kind == "Payment"] == ["Requested"]
        (skipped,) = dead_letters.skipped(engine)
        assert (skipped["projection"], skipped["who"], skipped["sequence"]) == ("Fulfilment", "ann", 1)


class Both(Policy, of=Order):
    @reacts
    def placed(self, event: Placed, meta: Meta) -> Reactions:
        yield Send(Payment, "dear", Request(meta.aggregate_id, 5_000))
        yield Send(Payment, "bad", Request(meta.aggregate_id, 13))


async def test_what_was_rejected_before_a_failure_is_not_decided_anew_in_the_retry(
    running: Running, app_name: str, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    app = shop(app_name, policies=(Both,))
    async with running(app) as at:
        await at.client.execute(Order, "o", Place())
        await at.until(lambda: bool(dead_letters.waiting(engine, "Both")))
        assert len(store.rejections(engine, "Both")) == 1
    monkeypatch.setattr("tests.shops.MOST", 10_000)
    monkeypatch.setattr("tests.shops.UNLUCKY", -1)
    async with running(app) as at:
        letters.ask_again(engine, "Both", "Order", "o")
        await at.until(lambda: not dead_letters.waiting(engine, "Both"))
        await at.settled()
        assert [key for kind, key, _ in await at.events() if kind == "Payment"] == ["bad"]


class Echo(Policy, of=Order):
    @reacts
    def placed(self, event: Placed, meta: Meta) -> Reactions:
        other = "b" if meta.aggregate_id == "a" else "a"
        return Send(Order, other, Place())


@pytest.mark.setting("policies.depth")
async def test_a_loop_of_policies_is_noticed(running: Running, app_name: str, engine: Engine) -> None:
    async with running(shop(app_name, policies=(Echo,)), policies__depth=5) as at:
        await at.client.execute(Order, "a", Place())
        await at.until(lambda: bool(dead_letters.waiting(engine, "Echo")))
        await at.settled()
        assert await at.counts() == {"Placed": 6}
        (parked,) = dead_letters.waiting(engine, "Echo")
    assert "a loop: 5 policies in a row" in parked.error


async def test_a_paused_policy_forgets_nothing(running: Running, app_name: str, engine: Engine) -> None:
    async with running(shop(app_name)) as at:
        await at.client.execute(Order, "a", Place())
        await at.settled()
        store.pause(engine, "Fulfilment", True)
        await at.until(lambda: _state(at) == "paused")
        await at.client.execute(Order, "b", Place())
        assert await at.counts() == {"Placed": 2, "Requested": 1}
        store.pause(engine, "Fulfilment", False)
        await at.until(lambda: _state(at) == "running")
        await at.settled()
        assert await at.counts() == {"Placed": 2, "Requested": 2}


def _state(at: Shop) -> str:
    (report,) = at.service.status()["reactions"]
    state: str = report["state"]
    return state


async def test_two_workers_share_a_policy_and_hand_it_over(running: Running, app_name: str) -> None:
    app = shop(app_name)

    async def place(at: Shop, start: int) -> None:
        orders = range(start, start + 100)
        await asyncio.gather(*(at.client.execute(Order, f"o{n}", Place(), timeout=30) for n in orders))

    async with running(app) as first:
        await place(first, 0)
        async with running(app) as second:
            await asyncio.gather(place(first, 100), place(second, 200))
            await first.until(lambda: bool(second.service.partitions))
            await asyncio.gather(place(first, 300), place(second, 400))
        await first.settled()
        assert await first.counts() == {"Placed": 500, "Requested": 500}


async def test_an_owner_that_was_fenced_writes_nothing(running: Running, app_name: str, engine: Engine) -> None:
    async with running(shop(app_name)) as at:
        await at.client.execute(Order, "a", Place())
        await at.settled()
    old = store.claim(engine, app_name, "Fulfilment", range(64))
    assert old is not None
    new = store.claim(engine, app_name, "Fulfilment", range(64))
    assert new is not None
    position = old.positions[7]
    write = store.ReactionWrite([("Fulfilment", 0, 7, position, position + 5)])
    with pytest.raises(Fenced):
        store.write(engine, "Fulfilment", old.epoch, write)
    with engine.connect() as connection:
        assert position + 5 not in connection.scalars(select(checkpoint.c.sequence)).all()


async def test_an_event_of_a_newer_program_waits_for_it(running: Running, app_name: str, engine: Engine) -> None:
    from tests.shops import Confirm, Confirmed

    known = Fulfilment
    app = shop(app_name, policies=(known,), orders=False)
    confirmed = app.types["Order"].events.pop("Confirmed")
    async with running(shop(app_name, policies=(), orders=False)) as at:
        await at.client.execute(Order, "o", Place())
    async with running(app) as old:
        assert old.service.app.reactions
    async with running(shop(app_name, policies=(), orders=False)) as at:
        await at.client.execute(Order, "o", Confirm())
        await at.client.execute(Order, "o", Place(cents=7))
    async with running(app) as old:
        await old.settled()
        (waiting,) = dead_letters.waiting(engine, "Fulfilment")
        assert (waiting.newer, waiting.events) == (True, 2)
        assert (await old.counts())["Requested"] == 0
    assert confirmed.cls is Confirmed
    async with running(shop(app_name, policies=(known,), orders=False)) as new:
        await new.until(lambda: not dead_letters.waiting(engine, "Fulfilment"))
        await new.settled()
        assert (await new.counts())["Requested"] == 1


async def test_an_app_refuses_a_name_that_has_been_of_another_kind(running: Running, app_name: str) -> None:
    from projections import SchemaError
    from tests.shops import Mails

    class Renamed(Mails, of=Order, name="Fulfilment"):
        pass

    async with running(shop(app_name)):
        pass
    with pytest.raises(SchemaError, match="Fulfilment has run as policy"):
        async with running(shop(app_name, policies=(), effects=[Renamed()])):
            pass


@pytest.mark.setting("policies.in_flight")
async def test_no_more_events_are_worked_on_at_once_than_the_settings_say(
    running: Running, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work = most = 0
    go = asyncio.Event()

    async def deliver(self: PolicyWorker, request: dict[str, Any]) -> str:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await go.wait()
        at_work -= 1
        return ""

    monkeypatch.setattr(PolicyWorker, "deliver", deliver)
    async with running(shop(app_name), policies__in_flight=3) as at:
        await asyncio.gather(*(at.client.execute(Order, f"o{n}", Place()) for n in range(10)))
        await at.until(lambda: at_work == 3)
        go.set()
        await at.settled()
    assert most == 3


@pytest.mark.setting("policies.retention")
async def test_a_rejection_is_forgotten_after_the_set_time(running: Running, app_name: str, engine: Engine) -> None:
    async with running(shop(app_name), policies__retention=1.0) as at:
        await at.client.execute(Order, "dear", Place(cents=5_000))
        await at.settled()
        assert len(store.rejections(engine)) == 1
        async with asyncio.timeout(20):
            while store.rejections(engine):
                await at.service.parts.reactors.count()
                await asyncio.sleep(0.1)


class Two(Policy, of=Order):
    @reacts
    def placed(self, event: Placed, meta: Meta) -> Reactions:
        yield Send(Payment, "dear", Request("dear", 5_000))
        yield Send(Payment, "unlucky", Request("unlucky", 13))


async def test_a_rejection_stays_when_its_event_is_tried_again_after_a_restart(
    running: Running, app_name: str, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    app = shop(app_name, policies=(Two,))
    async with running(app) as at:
        await at.client.execute(Order, "o", Place())
        await at.settled()
        assert (len(store.rejections(engine)), len(dead_letters.waiting(engine))) == (1, 1)
    monkeypatch.setattr("tests.shops.MOST", 10_000)
    monkeypatch.setattr("tests.shops.UNLUCKY", -1)
    async with running(app) as at:
        store.forget_rejections(engine, "9999")
        letters.ask_again(engine, "Two", "Order", "o")
        await at.until(lambda: not dead_letters.waiting(engine))
        assert [key for kind, key, _ in await at.events() if kind == "Payment"] == ["unlucky"]


async def test_a_rejection_is_recorded_whatever_its_reason_contains(
    running: Running, app_name: str, engine: Engine
) -> None:
    def refuse(_order: Order, _command: object) -> None:
        raise Rejected("no \0 'way' \U0001f600")

    app = shop(app_name, policies=(Echo,))
    handlers = app.types["Order"].handlers
    place = handlers[Place].function
    async with running(app) as at:
        await at.client.execute(Order, "warm", Refuse(""))
        handlers[Place].function = lambda order, command: (place if order.id == "a" else refuse)(order, command)
        await at.client.execute(Order, "a", Place())
        await at.settled()
        (row,) = store.rejections(engine, "Echo")
        assert row["reason"] == "no \\0 'way' \U0001f600"


def test_workers_that_start_together_register_a_policy_once(read_side_engine: Engine) -> None:
    apps = [shop("shop", policies=(Fulfilment, Two, Echo, Later)) for _ in range(6)]
    with ThreadPoolExecutor(6) as threads:
        begun = list(threads.map(lambda app: store.register(read_side_engine, app.reactions, 4, 7), apps))
    assert sorted(name for found in begun for name, _ in found) == ["Echo", "Fulfilment", "Later", "Two"]


async def test_commands_are_taken_until_policies_have_let_go_of_partitions(running: Running, app_name: str) -> None:
    app = shop(app_name)
    async with running(app) as first:
        ownership, reactors = first.service.parts.ownership, first.service.parts.reactors
        listening: list[int] = []
        released = reactors.released

        async def note() -> None:
            listening.append(len(ownership._listening))
            await released()

        reactors.released = note  # type: ignore[method-assign]
        before = len(ownership._listening)
        async with running(app) as second:
            await first.until(lambda: bool(second.service.partitions))
        assert listening[0] == before
