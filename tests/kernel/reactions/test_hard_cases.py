"""What one aggregate, timer or handler does wrong holds up nobody else. In one process, with a clock to move."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import pytest
from sqlalchemy import func, select

from aggregates import (
    After,
    Aggregate,
    Cancel,
    Meta,
    Policy,
    Reactions,
    Refusal,
    Rejected,
    Send,
    applies,
    command,
    event,
    handles,
    reacts,
)
from kernel import App, Effect
from kernel.reactions import letters, store, timers
from kernel.reactions.work import PolicyWorker
from kernel.testing import RunningApp, running
from projections import dead_letters
from projections.tables import timer


@event
class Told:
    what: str


@command
class Tell:
    what: str


class Desk(Aggregate):
    told: int = 0

    @handles
    def tell(self, command: Tell) -> Told:
        if command.what.startswith("no"):
            raise Rejected(command.what)
        return Told(command.what)

    @applies
    def was_told(self, event: Told) -> None:
        self.told += 1


class Source(Desk):
    pass


React = Callable[[Told, Meta], Reactions]


class Rules(Policy, of=Source):
    def __init__(self, react: React, on_rejected: Callable[[Refusal], Reactions] = lambda _: None) -> None:
        self.react, self.rejected = react, on_rejected

    @reacts
    def told(self, event: Told, meta: Meta) -> Reactions:
        return self.react(event, meta)

    def on_rejected(self, refusal: Refusal) -> Reactions:
        return self.rejected(refusal)


def _app(*rules: Any) -> App:
    return App("desks", aggregates=[Source, Desk], policies=[Rules(*rules)])


async def _told(kernel: RunningApp, desk: str) -> int:
    return (await kernel.load(Desk, desk)).state.told


async def _until(found: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not found():
            await asyncio.sleep(0.005)


def _send(to: Any, what: Any = "x") -> Send:
    return Send(Desk, to, Tell(what))


FAULTS: dict[str, tuple[Reactions, str]] = {
    "no-text": (_send(123), "the id 123, which is not a text"),
    "nul": (_send("a\0b"), "control characters"),
    "long": (_send("x" * 300), "at most 255"),
    "surrogate": (_send("\ud800"), "not valid Unicode"),
    "no-class": (Send(cast(Any, "Desk"), "a", Tell("x")), "not the class of an aggregate"),
    "no-json": (_send("a", object()), "not JSON serializable"),
    "too-large": (_send("a", "x" * (2 << 20)), "too-large"),
    "timer-nul": (After(timedelta(0), _send("a\0b")), "control characters"),
    "timer-surrogate": (After(timedelta(0), _send("a", "\ud800")), "surrogates not allowed"),
    "timer-integer": (After(timedelta(0), _send("a", 1 << 70)), "64-bit"),
    "timer-never": (After(timedelta.max, _send("a")), "OverflowError"),
    "key": (After(timedelta(1), _send("a"), key=cast(Any, None)), "printable text"),
    "endless": ((_send("a") for _ in iter(int, 1)), "more than 10,000 reactions"),
}


async def test_a_command_that_can_not_be_sent_parks_its_aggregate_alone() -> None:
    def react(_event: Told, meta: Meta) -> Reactions:
        return FAULTS[meta.aggregate_id][0] if meta.aggregate_id in FAULTS else _send("good")

    async with running(_app(react)) as kernel:
        for source in (*FAULTS, "fine"):
            await kernel.execute(Source, source, Tell("x"))
        await _until(lambda: len(dead_letters.waiting(kernel.parts.engine)) == len(FAULTS))
        found = {parked.aggregate_id: parked.error for parked in dead_letters.waiting(kernel.parts.engine)}
        assert [source for source, (_, why) in FAULTS.items() if why not in found[source]] == []
        async with asyncio.timeout(20):
            while not await _told(kernel, "good"):
                await asyncio.sleep(0.005)


class Calls(Effect, of=Source):
    def __init__(self) -> None:
        self.tried = 0

    @reacts
    async def told(self, event: Told) -> None:
        self.tried += 1
        if self.tried == 1:
            inner = asyncio.ensure_future(asyncio.sleep(60))
            inner.cancel()
            await inner


async def test_an_effect_that_is_cancelled_from_within_is_tried_again() -> None:
    calls = Calls()
    async with running(App("desks", aggregates=[Source], effects=[calls])) as kernel:
        await kernel.execute(Source, "a", Tell("x"))
        await _until(lambda: bool(dead_letters.waiting(kernel.parts.engine)))
        letters.ask_again(kernel.parts.engine, "Calls", "Source", "a")
        await _until(lambda: not dead_letters.waiting(kernel.parts.engine))
    assert calls.tried == 2


def _start_or_stop(event: Told, meta: Meta) -> Reactions:
    if event.what == "start":
        return After(timedelta(minutes=30), _send("fired"), key=meta.aggregate_id)
    return Cancel(meta.aggregate_id)


async def test_cancelled_timers_leave_nothing_behind_when_no_timer_fires() -> None:
    async with running(_app(_start_or_stop)) as kernel:
        for number in range(20):
            await kernel.execute(Source, f"s{number}", Tell("start"))
            await kernel.execute(Source, f"s{number}", Tell("stop"))
        await kernel.settled()
        async with asyncio.timeout(20):
            while True:
                await kernel.parts.reactors.count()
                with kernel.parts.engine.connect() as connection:
                    if not connection.scalar(select(func.count()).select_from(timer)):
                        break
                await asyncio.sleep(0.05)


async def test_what_was_cancelled_in_an_outage_is_not_fired_after_it() -> None:
    async with running(_app(_start_or_stop)) as kernel:
        sources = [f"s{number}" for number in range(1_000)]
        for source in sources:
            await kernel.execute(Source, source, Tell("start"))
        await kernel.settled()
        store.pause(kernel.parts.engine, "Rules", True)
        await _until(lambda: kernel.parts.reactors.report()[0]["state"] == "paused")
        for source in sources:
            await kernel.execute(Source, source, Tell("stop"))
        kernel.clock.advance(timedelta(minutes=31))
        store.pause(kernel.parts.engine, "Rules", False)
        await _until(lambda: kernel.parts.reactors.report()[0]["state"] == "running")
        await kernel.settled()
        assert await _told(kernel, "fired") == 0


async def test_the_rejection_of_a_timer_changes_other_timers_of_the_same_event() -> None:
    def react(_event: Told, _meta: Meta) -> Reactions:
        yield After(timedelta(minutes=10), _send("x", "no"), key="remind")
        yield After(timedelta(minutes=30), _send("fired"), key="expire")

    async with running(_app(react, lambda _: Cancel("expire"))) as kernel:
        await kernel.execute(Source, "s", Tell("x"))
        await kernel.settled()
        kernel.clock.advance(timedelta(minutes=11))
        await kernel.settled()
        assert timers.pending(kernel.parts.engine) == []


async def test_a_dead_letter_that_is_retried_sets_no_timer_that_a_later_event_has_cancelled() -> None:
    broken = True

    def react(event: Told, meta: Meta) -> Reactions:
        if event.what == "start" and broken:
            raise ValueError("broken")
        return After(timedelta(hours=1), _send("fired"), key="k") if event.what == "start" else Cancel("k")

    async with running(_app(react)) as kernel:
        engine = kernel.parts.engine
        first = (await kernel.execute(Source, "bad", Tell("start"))).sequence
        await kernel.execute(Source, "other", Tell("stop"))
        await _until(lambda: bool(dead_letters.waiting(engine)))
        await _until(lambda: store_lowest(kernel) > first + 1)
        timers.sweep(engine, "Rules")
        broken = False
        letters.ask_again(engine, "Rules", "Source", "bad")
        await _until(lambda: not dead_letters.waiting(engine))
        assert timers.pending(engine) == []


def store_lowest(kernel: RunningApp) -> int:
    """Return the lowest checkpoint; a commit that nobody waits for moves all of them on."""
    from kernel.reactions.standing import read_standings

    return read_standings(kernel.parts.engine, 0.0)[0].lowest + 1


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands for the desk `stuck` get no answer."""
    deliver = PolicyWorker.deliver

    async def wait(self: PolicyWorker, request: dict[str, Any]) -> str:
        if request["id"] == "stuck":
            await asyncio.Event().wait()
        return await deliver(self, request)

    monkeypatch.setattr(PolicyWorker, "deliver", wait)


@pytest.mark.usefixtures("stuck")
async def test_a_timer_whose_command_is_waited_for_holds_up_no_other_timer() -> None:
    def react(event: Told, _meta: Meta) -> Reactions:
        return After(timedelta(minutes=1), _send(event.what))

    async with running(_app(react)) as kernel:
        await kernel.execute(Source, "a", Tell("stuck"))
        await kernel.settled()
        kernel.clock.advance(timedelta(minutes=2))
        await kernel.execute(Source, "b", Tell("good"))
        await _until(lambda: len(timers.pending(kernel.parts.engine)) == 2)
        kernel.clock.advance(timedelta(minutes=2))
        await _until(lambda: len(timers.pending(kernel.parts.engine)) == 1)
        assert await _told(kernel, "good") == 1


@pytest.mark.usefixtures("stuck")
async def test_an_event_whose_command_is_waited_for_holds_up_no_timer_of_its_partition() -> None:
    def react(event: Told, _meta: Meta) -> Reactions:
        return _send("stuck") if event.what == "stuck" else After(timedelta(minutes=1), _send("good"))

    async with running(_app(react)) as kernel:
        await kernel.execute(Source, "a", Tell("stuck"))
        partition = kernel.log.subjects.partition("Source", "a")
        same = [f"s{n}" for n in range(500) if kernel.log.subjects.partition("Source", f"s{n}") == partition]
        assert same
        for source in same:
            await kernel.execute(Source, source, Tell("good"))
        await _until(lambda: len(timers.pending(kernel.parts.engine)) == len(same))


@pytest.mark.usefixtures("stuck")
async def test_many_events_of_an_aggregate_that_waits_hold_up_no_other() -> None:
    async with running(_app(lambda event, _: _send(event.what))) as kernel:
        for _ in range(2_500):
            await kernel.execute(Source, "busy", Tell("stuck"))
        await kernel.execute(Source, "a", Tell("good"))
        async with asyncio.timeout(20):
            while not await _told(kernel, "good"):
                await asyncio.sleep(0.01)


async def test_rejections_take_no_memory_when_they_are_recorded() -> None:
    async with running(_app(lambda _, __: _send("x", "no"))) as kernel:
        for number in range(20):
            await kernel.execute(Source, f"s{number}", Tell("x"))
        await kernel.settled()
        assert len(store.rejections(kernel.parts.engine)) == 20
        (reactor,) = kernel.parts.reactors._reactors
        (session,) = reactor._sessions
        assert cast(PolicyWorker, session._worker)._rejected == {}
