"""Sending the flights as commands: many in flight at once, those of an aircraft in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from examples.flights import Aircraft
from examples.flights.source import Step
from kernel import Client, CommandMessage, Receipt

IN_FLIGHT = 256


async def send(client: Client, steps: Sequence[Step], sent: Callable[[int], None] = lambda _: None) -> list[Receipt]:
    """Send every step; return the last receipt of each partition.

    Args:
        sent: called now and then with the number of commands that have taken effect.

    Raises:
        Rejected, CommandError: the first command that is refused ends the whole load.
    """
    commands = (CommandMessage(Aircraft, step.tail, step.command, command_id=id_of(step)) for step in steps)
    last: dict[int, Receipt] = {}
    async for outcome in client.execute_many(commands, in_flight=IN_FLIGHT, progress=sent, raise_errors=True):
        receipt = outcome.receipt
        if receipt.partition not in last or last[receipt.partition].sequence < receipt.sequence:
            last[receipt.partition] = receipt
    return list(last.values())


def id_of(step: Step) -> str:
    """Return the same command id at every run: loading again, or after a crash, changes nothing."""
    return f"{type(step.command).__name__}-{step.command.flight}"
