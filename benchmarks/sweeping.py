"""Sweeps over 100,000 live actors: how long one holds the event loop, measured in a process of its own."""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import orjson

from benchmarks.residency import BATCH, LIVE, Worker, states
from benchmarks.rounds import percentiles
from kernel.actors.residents import Residents

ROUNDS = 400


class Turns:
    """How long each call held the event loop: in wall time and in processor time."""

    def __init__(self) -> None:
        self.clock: list[float] = []
        self.processor: list[float] = []

    async def hold(self, work: Callable[[], int]) -> int:
        """Run a function in one turn of the loop."""
        begin, own = time.perf_counter(), time.thread_time()
        found = work()
        self.processor.append(time.thread_time() - own)
        self.clock.append(time.perf_counter() - begin)
        await asyncio.sleep(0)
        return found


async def _passivate(residents: Residents, turns: Turns) -> int:
    """Passivate as the service's job does."""
    await turns.hold(residents.measure)
    total = 0
    while gone := await turns.hold(residents.sweep):
        total += gone
    return total


async def measure() -> dict[str, Any]:
    """Sweep without passivation, then under each limit in turn, and at last until no actor is left."""
    worker = Worker(2 * LIVE)
    residents = worker.residents
    fresh = worker.addresses()
    for _ in range(LIVE // BATCH):
        addresses = list(islice(fresh, BATCH))
        worker.activate(addresses, states(addresses))
    # the settings of a running service
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
    turns = Turns()
    measuring = time.perf_counter()
    while residents._changed:
        await turns.hold(residents.measure)
    measuring = time.perf_counter() - measuring
    memory = residents.memory
    for _ in range(ROUNDS):
        # a busy service: sweeps find used actors and new ones
        addresses = list(islice(fresh, 50)) + [resident.address for resident in islice(residents._live.values(), 50)]
        residents.wake(addresses)
        await _passivate(residents, turns)
    gone = {}
    residents.limit = LIVE - LIVE // 4
    gone["limit"] = await _passivate(residents, turns)
    residents.budget = residents.memory // 2
    gone["memory"] = await _passivate(residents, turns)
    residents.idle = 0.0
    gone["idle"] = await _passivate(residents, turns)
    assert len(residents) == 0
    return {
        "longest_ms": round(max(turns.processor) * 1e3, 2),
        "turns": len(turns.clock),
        "longest_by_the_clock_ms": round(max(turns.clock) * 1e3, 2),
        **{f"{name}_by_the_clock": value for name, value in percentiles(turns.clock).items()},
        "measuring_all_s": round(measuring, 2),
        "measured_bytes_each": round(memory / LIVE),
        "passivated": gone,
    }


if __name__ == "__main__":
    sys.stdout.buffer.write(orjson.dumps(asyncio.run(measure())))
