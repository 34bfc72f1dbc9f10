"""The window of questions to a server."""

from __future__ import annotations

import asyncio

import pytest

from kernel.log import window
from kernel.log.window import LEAST, MOST, Window


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(window, "time", clock)
    return clock


async def ask(of: Window, clock: Clock, cost: int, seconds: float) -> None:
    async with of.room(cost):
        clock.now += seconds


async def test_slow_answers_make_the_window_smaller_and_fast_ones_larger(clock: Clock) -> None:
    of = Window()
    for _ in range(100):
        await ask(of, clock, 16, 0.5)
    assert of.size == LEAST
    for _ in range(10_000):
        await ask(of, clock, 16, 0.01)
    assert of.size == MOST


async def test_what_was_asked_together_shrinks_the_window_once(clock: Clock) -> None:
    of = Window()
    size = of.size
    rooms = [of.room(16) for _ in range(20)]
    for room in rooms:
        await room.__aenter__()
    clock.now += 1.0
    for room in rooms:
        await room.__aexit__(None, None, None)
    assert of.size == pytest.approx(size * 0.7)


async def test_no_more_than_the_window_is_under_way_and_all_pass_in_order(clock: Clock) -> None:
    of = Window()
    passed: list[int] = []
    most = under_way = 0
    go_on = asyncio.Event()

    async def work(number: int) -> None:
        nonlocal under_way, most
        async with of.room(100):
            passed.append(number)
            under_way += 100
            most = max(most, under_way)
            await go_on.wait()
            under_way -= 100

    tasks = [asyncio.create_task(work(number)) for number in range(50)]
    await asyncio.sleep(0)
    tasks[30].cancel()
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert passed == [number for number in range(50) if number != 30]
    assert most <= of.size


async def test_work_that_is_larger_than_the_window_passes_alone(clock: Clock) -> None:
    of = Window()
    async with asyncio.timeout(5):
        await ask(of, clock, 10 * MOST, 0.0)
        await ask(of, clock, 1, 0.0)
