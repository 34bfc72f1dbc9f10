"""The rows about an app in the process of a test."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from itertools import count
from statistics import median
from typing import Any

from benchmarks import rival
from benchmarks.report import Row
from benchmarks.rounds import in_turns, medians, rounded
from examples.bank import Account, Deposit, app
from kernel.testing import RunningApp, running

SECONDS, ACCOUNTS, IN_FLIGHT, STARTS = 1.5, 200, 256, 10
MOST_MS = 100.0
NOWHERE = "nothing: in memory"


async def measure() -> list[Row]:
    """Measure starts, and commands with the projection of the example: many at once, and one after the other."""
    starts = [await _start() for _ in range(STARTS)]
    print(f"  running(app): started within {median(starts):.1f} ms", flush=True)
    ways = {"ours": partial(_commands, IN_FLIGHT), "one by one": partial(_commands, 1), "rival": _theirs}
    figures = await in_turns("running(app)", ways)
    found = medians(figures)
    extra: dict[str, Any] = {"one_by_one": round(found["one by one"]), "rounds": rounded(figures)}
    return [
        Row(
            f"running(app): commands in the process of a test, projected; {IN_FLIGHT} in flight",
            "commands/s",
            found["ours"],
            rival=found["rival"],
            durability=NOWHERE,
            rival_is="eventsourcing in memory: load, decide, save; without a projection",
            extra=extra,
        ),
        Row(
            "running(app): start of the example's app",
            "ms",
            median(starts),
            aim=f"<= {MOST_MS:g} ms",
            met=median(starts) <= MOST_MS,
            durability=NOWHERE,
            extra={"longest_ms": round(max(starts), 1)},
        ),
    ]


async def _start() -> float:
    begun = time.perf_counter()
    async with running(app):
        return (time.perf_counter() - begun) * 1e3


async def _theirs() -> float:
    # new accounts each time: the rival loads what a command concerns, and histories grow
    commands = rival.Commands({}, ACCOUNTS)
    try:
        return commands.run(SECONDS)[0]
    finally:
        commands.close()


async def _commands(in_flight: int) -> float:
    """Return the commands per second, until the last one is projected."""
    numbers = count()
    async with running(app) as kernel:
        begun = time.perf_counter()
        await asyncio.gather(*(_send(kernel, numbers, begun + SECONDS) for _ in range(in_flight)))
        await kernel.settled()
        return next(numbers) / (time.perf_counter() - begun)


async def _send(kernel: RunningApp, numbers: count[int], until: float) -> None:
    while time.perf_counter() < until:
        await kernel.execute(Account, f"account-{next(numbers) % ACCOUNTS}", Deposit(1))
