"""Steady load: commands at a given pace, to a few busy accounts that change slowly and to any of very many."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator

from examples.bank import Account, Deposit
from kernel import Client

HOT, HOT_SHARE, HOT_MOVES_S = 50, 0.3, 1.0
"""Busy accounts at any moment, their share of the commands, and seconds until one of them is replaced: no account's
history grows so long that loading it makes the load heavier with time."""
MOST_IN_FLIGHT = 1_000
"""With this many commands unanswered the load pauses instead of keeping its rate."""
TICK_S = 0.005


class Load:
    """A client that deposits one cent at a time.

    Attributes:
        acknowledged: cents by account that the service has acknowledged.
        unknown: cents by account whose command got no conclusive answer.
        failures: how often each error occurred.
        held_up: how often the load had to pause.
    """

    def __init__(self, client: Client, accounts: int) -> None:
        self.client, self.accounts = client, accounts
        self.acknowledged: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.answered = 0
        self.held_up = 0
        self._took: list[float] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._began = time.monotonic()

    @property
    def in_flight(self) -> int:
        """Commands sent and not answered."""
        return len(self._tasks)

    def everyone(self) -> Iterator[str]:
        """Yield every account once."""
        return map(_name, range(self.accounts))

    def mixture(self) -> Iterator[str]:
        """Yield accounts without end: busy ones for their share of the commands, any account for the rest."""
        while True:
            if random.random() < HOT_SHARE:
                first = int((time.monotonic() - self._began) / HOT_MOVES_S)
                # far apart, so that the busy accounts are spread over many partitions
                yield _name((first + random.randrange(HOT)) * 7919 % self.accounts)
            else:
                yield _name(random.randrange(self.accounts))

    async def drive(self, accounts: Iterator[str], rate: float) -> None:
        """Send to these accounts at a steady rate without waiting for answers; return when the accounts end."""
        begin, sent = time.perf_counter(), 0
        while True:
            while sent < (time.perf_counter() - begin) * rate:
                if len(self._tasks) >= MOST_IN_FLIGHT:
                    self.held_up += 1
                    await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
                    begin, sent = time.perf_counter(), 0
                    continue
                account = next(accounts, None)
                if account is None:
                    return
                task = asyncio.create_task(self._deposit(account))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                sent += 1
            await asyncio.sleep(TICK_S)

    async def _deposit(self, account: str) -> None:
        begin = time.perf_counter()
        try:
            await self.client.execute(Account, account, Deposit(1))
        except Exception as error:
            # no answer, or an inconclusive one; a refusal counts as a failure here too
            self.unknown[account] += 1
            self.failures[f"{type(error).__name__}: {error}"[:200]] += 1
        else:
            self.acknowledged[account] += 1
            self.answered += 1
            self._took.append(time.perf_counter() - begin)

    async def finish(self) -> None:
        """Wait for the answers that are still to come."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def latencies(self) -> list[float]:
        """Return the seconds that each command took since the last call, sorted."""
        took, self._took = self._took, []
        return sorted(took)

    def differences(self, stored: dict[str, int]) -> list[str]:
        """Compare the acknowledged cents with those in the projection."""
        found = []
        for account in sorted({*stored, *self.acknowledged}):
            least, has = self.acknowledged[account], stored.get(account, 0)
            if not least <= has <= least + self.unknown[account]:
                found.append(f"{account}: {least} acknowledged, {has} in the projection")
        return found


def _name(number: int) -> str:
    return f"account-{number}"
