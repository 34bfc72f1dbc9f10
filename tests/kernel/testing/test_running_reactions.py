"""Policies, timers and effects of an app in the test's own process, with a clock that the test moves."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from aggregates import After, Cancel, Meta, Policy, Reactions, Send, reacts
from aggregates.commit import Envelope, decode
from kernel import App, Effect
from kernel.errors import NotSettled
from kernel.reactions import firing
from kernel.testing import RunningApp, running
from tests.apps import Lines, Note, Notebook, Noted

NOON = datetime(2039, 1, 1, 12, 0, 0, 5, tzinfo=UTC)
"""A float of seconds lies below this microsecond an hour later."""
HOUR = timedelta(hours=1)


class Reminders(Policy, of=Notebook):
    """Passes a count on to the next notebook, reminds of what was noted, and is refused."""

    @reacts
    def noted(self, event: Noted, meta: Meta) -> Reactions:
        kind, _, rest = event.text.partition(" ")
        if kind == "count" and event.number:
            return Send(Notebook, f"{meta.aggregate_id}+", Note("count", event.number - 1))
        if kind == "remind":
            return After(HOUR, Send(Notebook, meta.aggregate_id, Note(f"reminded {rest}")), key=rest)
        if kind == "forget":
            return Cancel(rest)
        if kind == "nothing":
            return Send(Notebook, "elsewhere", Note(""))
        if kind == "fail":
            raise ValueError("no such reminder")
        return None


class Post(Effect, of=Notebook):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.posted: list[str] = []

    @reacts
    async def noted(self, event: Noted) -> None:
        self.posted.append(event.text)


def reminders(*effects: Effect) -> App:
    return App("reminders", aggregates=[Notebook], projections=[Lines], policies=[Reminders], effects=effects)


async def texts(kernel: RunningApp) -> list[str]:
    return [row["text"] for row in await kernel.query("select text from lines order by notebook, sequence")]


async def events(kernel: RunningApp) -> list[Envelope]:
    batch = await (await kernel.log.read(0)).next(1_000)
    return [envelope for commit in batch.commits for envelope in decode(commit.payload)]


async def test_it_is_settled_when_a_chain_of_policies_has_come_to_its_end() -> None:
    async with running(reminders()) as kernel:
        await kernel.execute(Notebook, "n", Note("count", 5))
        await kernel.settled()
        assert await texts(kernel) == ["count"] * 6


async def test_a_timer_fires_when_the_clock_is_moved_there_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firing, "LOOK_S", 3_600.0)  # it is told that the clock was moved
    async with running(reminders(), now=NOON) as kernel:
        for text in ("remind me", "remind you", "forget you"):
            await kernel.execute(Notebook, "n", Note(text))
        kernel.clock.advance(HOUR - timedelta(microseconds=1))
        await kernel.settled()
        assert await texts(kernel) == ["remind me", "remind you", "forget you"]
        kernel.clock.advance(timedelta(microseconds=1))
        await kernel.settled()
        assert await texts(kernel) == ["remind me", "remind you", "forget you", "reminded me"]
        assert (await events(kernel))[-1].time == "2039-01-01T13:00:00.000005Z"
        kernel.clock.advance(24 * HOUR)
        await kernel.settled()
        assert len(await events(kernel)) == 4


async def test_effects_are_waited_for() -> None:
    post = Post()
    async with running(reminders(post)) as kernel:
        await kernel.execute(Notebook, "n", Note("count", 2))
        await kernel.settled()
    assert post.posted == ["count"] * 3


async def test_a_rejection_is_an_outcome_and_a_failure_is_told() -> None:
    async with running(reminders()) as kernel:
        await kernel.execute(Notebook, "n", Note("nothing"))
        await kernel.settled()
        await kernel.execute(Notebook, "bad", Note("fail"))
        with pytest.raises(NotSettled, match="Reminders: event 1 of Notebook bad: .*no such reminder"):
            await kernel.settled()
        assert len(await texts(kernel)) == 2
