"""The cost of jobs, governor, metrics, health and backlog detection, measured against a service without them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from statistics import median

import psutil

from benchmarks import account, clients
from benchmarks.report import Row
from benchmarks.rounds import in_turns, medians, rounded

SECONDS, REST_S, ROUNDS = 2.0, 3.0, 7


async def measure(path: Path) -> list[Row]:
    """Measure commands with everything on and with only leases and passivation, and the CPU time at rest."""
    async with contextlib.AsyncExitStack() as stack:
        loads: dict[str, clients.Load] = {}
        pids: dict[str, int] = {}
        for name in ("with", "without"):
            bare = name == "without"
            load, _ = await stack.enter_async_context(
                clients.load(account.app, "benchmarks.account:app", path / name, sync=False, bare=bare)
            )
            loads[name], pids[name] = load, clients.process_of(path / name, account.app.name)

        def full(name: str) -> Callable[[], Awaitable[float]]:
            async def run() -> float:
                rate, _ = await loads[name].full(SECONDS)
                return rate

            return run

        def spent(name: str) -> Callable[[], Awaitable[float]]:
            async def run() -> float:
                """CPU microseconds of the service for a command."""
                process = psutil.Process(pids[name])
                before, begun = process.cpu_times(), loads[name].sent
                await loads[name].full(SECONDS)
                after = process.cpu_times()
                used = after.user + after.system - before.user - before.system
                return used * 1e6 / (loads[name].sent - begun)

            return run

        async def resting(name: str) -> float:
            process = psutil.Process(pids[name])
            before = process.cpu_times()
            await asyncio.sleep(REST_S)
            after = process.cpu_times()
            return (after.user + after.system - before.user - before.system) / REST_S * 100

        rates = await in_turns("care, commands", {name: full(name) for name in loads}, ROUNDS)
        costs = await in_turns("care, CPU us per command", {name: spent(name) for name in loads}, ROUNDS)
        rest = await in_turns("care, CPU % at rest", {name: partial(resting, name) for name in loads})
    found, cost = medians(rates), medians(costs)
    ratio = median(w / o for w, o in zip(rates["with"], rates["without"], strict=True))
    idle = medians(rest)
    return [
        Row(
            "commands with jobs, governor, metrics, health and backlog detection, against a service without",
            "commands/s",
            found["with"],
            limit=found["without"],
            aim_limit=0.97,
            limit_is="the same service with leases and passivation only, in turns",
            durability="process crash (all)",
            extra={
                "median_of_ratios": round(ratio, 4),
                "cpu_us_per_command": {name: round(microseconds, 1) for name, microseconds in cost.items()},
                "cpu_percent_at_rest": {name: round(percent, 2) for name, percent in idle.items()},
                "rounds": rounded(rates),
            },
        )
    ]
