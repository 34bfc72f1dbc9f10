"""Logs full of events, to read and fold."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from typing import Any

from aggregates.cell import Cell
from aggregates.commit import Decision, encode, timestamp
from aggregates.context import Context, uuid7
from examples import bank, flights
from examples.flights import source
from kernel.app import App
from kernel.log import JetStreamLog

CHUNK = 20_000


def flight_commands(months: int) -> Iterator[tuple[str, Any]]:
    """Yield tail numbers and commands of real flights in time order."""
    found, _ = source.steps(months)
    for step in found:
        yield step.tail, step.command


def deposits(accounts: int, each: int, prefix: str = "account-") -> Iterator[tuple[str, Any]]:
    """Yield account names and deposits, round robin."""
    for _ in range(each):
        for number in range(accounts):
            yield f"{prefix}{number}", bank.Deposit(number + 1)


async def fill(app: App, log: JetStreamLog, commands: Iterable[tuple[str, Any]]) -> int:
    """Append one commit for each command, as a service would; return how many."""
    takers = {cls: declared for declared in app.types.values() for cls in declared.commands.values()}
    cells: dict[tuple[str, str], Cell[Any]] = {}
    # the only writer knows the sequences beforehand; the server still checks each
    sequence = (await log.info()).last
    futures: list[asyncio.Future[int]] = []
    started = time.perf_counter()
    count = 0
    for name, command in commands:
        declared = takers[type(command)]
        cell = cells.get((declared.name, name))
        if cell is None:
            cell = cells[declared.name, name] = Cell(declared, name)
        command_id = uuid7()
        events = cell.decide(command, Context(command_id))
        payload = encode(
            f"/{app.name}/{declared.name}", name, [Decision(command_id, events)], cell.version, timestamp()
        )
        cell.evolve(events)
        futures.append(
            log.append(log.subjects.address(declared.name, name).subject, cell.position, payload, cell.links)
        )
        sequence += 1
        cell.advance(sequence)
        count += 1
        if len(futures) == CHUNK:
            assert (await asyncio.gather(*futures))[-1] == sequence
            futures.clear()
    await asyncio.gather(*futures)
    took = time.perf_counter() - started
    print(f"  {count:,} events of {len(cells):,} aggregates appended in {took:.1f} s", flush=True)
    return count


__all__ = ["bank", "deposits", "fill", "flight_commands", "flights"]
