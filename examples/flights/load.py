"""Sending the flights as commands: many in flight at once, those of an aircraft in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from zlib import crc32

from examples.flights import Aircraft
from examples.flights.source import Step
from kernel import Client, Receipt

LANES = 256
"""Commands in flight; an aircraft always uses the same lane, so its commands never overtake each other."""


async def send(client: Client, steps: Sequence[Step], sent: Callable[[int], None] = lambda _: None) -> list[Receipt]:
    """Send every step; return the last receipt of each lane.

    Args:
        sent: called now and then with the number of commands that have taken effect.

    Raises:
        Rejected, CommandError: the first command that is refused ends the whole load.
    """
    lanes: list[list[Step]] = [[] for _ in range(LANES)]
    for step in steps:
        lanes[crc32(step.tail.encode()) % LANES].append(step)
    done = 0
    last: list[Receipt] = []

    async def run(lane: list[Step]) -> None:
        nonlocal done
        receipt = None
        for step in lane:
            receipt = await client.execute(Aircraft, step.tail, step.command, command_id=id_of(step), timeout=60)
            done += 1
            if done % 500 == 0:
                sent(done)
        if receipt is not None:
            last.append(receipt)

    async with asyncio.TaskGroup() as group:
        for lane in lanes:
            group.create_task(run(lane))
    sent(done)
    return last


def id_of(step: Step) -> str:
    """Return the same command id at every run: loading again, or after a crash, changes nothing."""
    return f"{type(step.command).__name__}-{step.command.flight}"
