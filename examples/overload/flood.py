"""Commands by the ten thousand, from a sender that ignores refusals.

It needs nothing of the kernel but the wire format: any NATS client can send commands.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from itertools import count
from typing import Self

from nats.aio.client import Client as NatsClient
from nats.aio.msg import Msg

ACCOUNTS = 1_000
_COMMAND = b'{"aggregate":"Account","id":"a%d","command":"Deposit","data":{"cents":1},"command_id":"o%d"}'
TICK_S = 0.01
PATIENCE_S = 30.0


@dataclass
class Answers:
    """The commands sent and the answers received since the last collection."""

    sent: int = 0
    refused: int = 0
    accepted_ms: list[float] = field(default_factory=list)


class Flood:
    """Sends deposits of one cent each, and never waits after a refusal.

    Attributes:
        accepted: accepted commands in all.
        retry_after: the shortest and the longest `retry_after` of a sample of the refusals, in seconds.
    """

    def __init__(self, connection: NatsClient, app: str) -> None:
        self._connection = connection
        self._subject = f"{app}.cmd"
        self._inbox = connection.new_inbox()
        self._sent: dict[str, float] = {}
        self._numbers = count(1)
        self._answers = Answers()
        self._busy = 0
        self._offering: asyncio.Task[None] | None = None
        self.accepted = 0
        self.retry_after = (float("inf"), 0.0)

    @classmethod
    async def start(cls, connection: NatsClient, app: str) -> Self:
        """Return a flood that listens for its answers, and sends nothing yet."""
        flood = cls(connection, app)
        await connection.subscribe(f"{flood._inbox}.*", cb=flood._receive)
        return flood

    @property
    def unanswered(self) -> int:
        """Commands without an answer."""
        return len(self._sent)

    async def keep_busy(self, in_flight: int) -> None:
        """Keep this many commands in flight: send the next one whenever one is answered."""
        self._busy = in_flight
        await self._send(in_flight)

    def offer(self, rate: float) -> None:
        """Send this many commands per second, whatever the answers."""
        self._offering = asyncio.create_task(self._offer(rate))

    async def _offer(self, rate: float) -> None:
        began, sent = time.perf_counter(), 0
        while True:
            due = int((time.perf_counter() - began) * rate)
            # a sender that is late by more than a tenth of a second does not catch up
            await self._send(min(due - sent, int(rate / 10)))
            sent = due
            await asyncio.sleep(TICK_S)

    async def stop(self) -> None:
        """Send no more, and wait for the answers that are still to come."""
        self._busy = 0
        if self._offering is not None:
            self._offering.cancel()
        deadline = time.monotonic() + PATIENCE_S
        while self._sent and time.monotonic() < deadline:  # noqa: ASYNC110 - thousands of answers, no event for all
            await asyncio.sleep(TICK_S)

    def collect(self) -> Answers:
        """Return what was sent and answered since the last call."""
        answers, self._answers = self._answers, Answers()
        return answers

    async def _send(self, how_many: int) -> None:
        now = time.perf_counter()
        for _ in range(how_many):
            number = next(self._numbers)
            payload = _COMMAND % (number % ACCOUNTS, number)
            self._sent[str(number)] = now
            await self._connection.publish(self._subject, payload, reply=f"{self._inbox}.{number}")
        self._answers.sent += how_many

    async def _receive(self, message: Msg) -> None:
        if not message.data:
            return  # NATS answers "no responders" with an empty message; the command stays unanswered
        started = self._sent.pop(message.subject.rpartition(".")[2], None)
        if started is None:
            return
        if message.data.startswith(b'{"ok"'):
            self.accepted += 1
            self._answers.accepted_ms.append((time.perf_counter() - started) * 1000)
        else:
            self._answers.refused += 1
            if self._answers.refused % 100 == 1:
                seconds = json.loads(message.data)["error"]["retry_after"]
                self.retry_after = (min(self.retry_after[0], seconds), max(self.retry_after[1], seconds))
        if self._busy:
            await self._send(1)
