"""Residents: the cost of a live actor, measured in a fresh process, whose memory holds nothing else."""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import orjson
import psutil
from sqlalchemy.dialects import sqlite

from aggregates.cell import Cell
from aggregates.commit import Decision, Envelope, decode, encode, timestamp
from aggregates.context import uuid7
from aggregates.declaration import EventType
from benchmarks.our_projection import Discard
from benchmarks.rounds import percentiles
from examples.bank import Account, Deposited, app
from kernel.actors.mailbox import Fold, Loaded, Turn
from kernel.actors.snapshots import NO_SNAPSHOTS
from kernel.commands.gateway import CommandGateway
from kernel.log import MemoryLog
from kernel.log.subjects import Address, Subjects
from kernel.settings import Passivation
from kernel.transport.outbox import Outbox
from projections.fold import Folded

LIVE, CYCLE_LIVE, SINGLE = 100_000, 10_000, 5_000
BATCH = 1_000


class Worker:
    """Actors without a service around them."""

    def __init__(self, limit: int) -> None:
        self.subjects = Subjects(app.name, 64)
        log = MemoryLog()
        passivation = Passivation(count=limit, idle=3_600.0, memory=0)
        gateway = CommandGateway(app, log, Outbox(Discard()), lambda _partition: True, passivation, NO_SNAPSHOTS)
        self.bugs: list[str] = []
        gateway.report_bug = self.bugs.append  # type: ignore[method-assign]
        self.actors, self.residents = gateway.actors, gateway.residents
        self.plan = app.plan(sqlite.dialect())
        deposited = EventType(Deposited, "Deposited", 1).encode(Deposited(1))
        payload = encode("/bank/Account", "a", [Decision(uuid7(), [deposited])], 0, timestamp())
        self.commits: list[tuple[int, list[Envelope]]] = [(1, decode(payload))]
        self._number = 0

    def addresses(self) -> Iterator[Address]:
        """Yield addresses never seen before."""
        while True:
            self._number += 1
            yield self.subjects._address("Account", f"account-{self._number}")

    def activate(self, addresses: list[Address], cells: list[Any]) -> None:
        """Activate aggregates: each loads its state and folds one event into its row."""
        turn = Turn(self.plan, Folded(self.plan))
        messages: list[tuple[Any, Any]] = []
        for resident, cell in zip(self.residents.wake(addresses), cells, strict=True):
            messages.append((resident.actor, Fold(resident.address, turn, self.commits, [None], frozenset())))
            messages.append((resident.actor, Loaded(cell)))
        self.actors.send(messages)
        assert not self.bugs, self.bugs[0]


def states(addresses: list[Address]) -> list[Cell[Any]]:
    """Return the aggregates' states, which belong to the user."""
    declared = app.type_of(Account)
    return [Cell(declared, address.id) for address in addresses]


def memory() -> int:
    """Return the resident memory of this process."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def one_hundred_thousand() -> dict[str, Any]:
    """Activate 100,000 aggregates and keep them."""
    worker = Worker(2 * LIVE)
    fresh = worker.addresses()
    worker.activate(first := list(islice(fresh, BATCH)), states(first))
    make = worker.plan.makers[0]
    before = memory()
    own = [(cell, [make(cell.state.id)]) for cell in states([_named(number) for number in range(LIVE)])]
    between = memory()
    for _ in range(LIVE // BATCH):
        addresses = list(islice(fresh, BATCH))
        worker.activate(addresses, states(addresses))
    after = memory()
    assert len(worker.residents) == LIVE + BATCH
    state = (between - before) / len(own)
    # the settings of a running service
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    took = []
    for address in islice(fresh, SINGLE):
        cells = states([address])
        begin = time.perf_counter()
        worker.activate([address], cells)
        took.append(time.perf_counter() - begin)
    activation = {name.replace("_ms", "_us"): round(value * 1e3, 1) for name, value in percentiles(took).items()}
    return {
        "state_bytes": round(state),
        "actor_bytes": round((after - between) / LIVE - state),
        **{f"activation_{name}": value for name, value in activation.items()},
    }


def _named(number: int) -> Address:
    return Address("", 0, "Account", f"own-{number}")


def cycles(count: int) -> dict[str, Any]:
    """Activate new aggregates all the time, with at most 10,000 live."""
    worker = Worker(CYCLE_LIVE)
    fresh = worker.addresses()
    warm, early = count // 5, 0
    started = time.perf_counter()
    for done in range(0, count, BATCH):
        if done == warm:
            early = memory()
        addresses = list(islice(fresh, BATCH))
        worker.activate(addresses, states(addresses))
        while worker.residents.sweep():
            pass
    seconds = time.perf_counter() - started
    late = memory()
    return {
        "activations": count,
        "activations_per_second": round(count / seconds),
        "memory_after_a_fifth_mib": round(early / 2**20, 1),
        "memory_at_the_end_mib": round(late / 2**20, 1),
        "growth_bytes_per_activation": round((late - early) / (count - warm), 2),
    }


async def _main(count: int) -> None:
    found = one_hundred_thousand() if count == 0 else cycles(count)
    sys.stdout.buffer.write(orjson.dumps(found))


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1])))
