"""Commands by the ten thousand, by somebody who does not care about refusals."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from itertools import count
from typing import Self

from kernel import Client
from kernel.transport.connection import NatsConnection, publish_frame

ACCOUNTS = 1_000
TICK_S = 0.01
PATIENCE_S = 30.0


@dataclass
class Seen:
    """What came back since the last look."""

    sent: int = 0
    refused: int = 0
    accepted_ms: list[float] = field(default_factory=list)


class Flood:
    """Sends deposits of one cent each, on the client's connection, without the client's patience.

    Attributes:
        accepted: how many in all.
        told: the shortest and the longest time to retry after.
    """

    def __init__(self, client: Client, connection: NatsConnection) -> None:
        self._connection, self._log = connection, client.log
        self._inbox = connection.new_inbox().encode()
        self._sent: dict[bytes, float] = {}
        self._tokens = count(1)
        self._seen = Seen()
        self._busy = 0
        self._offering: asyncio.Task[None] | None = None
        self.accepted = 0
        self.told = (float("inf"), 0.0)

    @classmethod
    async def connect(cls, client: Client) -> Self:
        """Use a client's connection."""
        flood = cls(client, client.log._connection)
        await flood._connection.listen(f"{flood._inbox.decode()}.*", flood._answered)
        return flood

    @property
    def unanswered(self) -> int:
        """Commands without an answer."""
        return len(self._sent)

    def keep_busy(self, under_way: int) -> None:
        """Send the next command whenever one is answered, so many at a time."""
        self._busy = under_way
        self._send(under_way)

    def offer(self, rate: float) -> None:
        """Send so many a second, whatever comes back."""
        self._offering = asyncio.create_task(self._offer(rate))

    async def _offer(self, rate: float) -> None:
        began, sent = time.perf_counter(), 0
        while True:
            due = int((time.perf_counter() - began) * rate)
            # somebody who fell behind by more than a tenth of a second does not catch up
            self._send(min(due - sent, int(rate / 10)))
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

    def collect(self) -> Seen:
        """Return what happened since the last time."""
        seen, self._seen = self._seen, Seen()
        return seen

    def _send(self, how_many: int) -> None:
        now = time.perf_counter()
        frames = []
        for _ in range(how_many):
            number = next(self._tokens)
            token = b"%d" % number
            name = f"a{number % ACCOUNTS}"
            payload = b'{"aggregate":"Account","id":"%b","command":"Deposit","data":{"cents":1},"command_id":"o%d"}' % (
                name.encode(),
                number,
            )
            frames.append(publish_frame(self._where(name), payload, reply=b"%b.%b" % (self._inbox, token)))
            self._sent[token] = now
        self._seen.sent += how_many
        self._connection.send(b"".join(frames))

    def _where(self, name: str) -> bytes:
        address = self._log.subjects.address("Account", name)
        return self._log.subjects.commands(address.partition).encode()

    def _answered(self, subject: bytes, _reply: bytes, payload: bytes, _headers: bytes | None) -> None:
        started = self._sent.pop(subject[subject.rfind(b".") + 1 :], None)
        if started is None:
            return
        if payload.startswith(b'{"ok"'):
            self.accepted += 1
            self._seen.accepted_ms.append((time.perf_counter() - started) * 1000)
        else:
            self._seen.refused += 1
            if self._seen.refused % 100 == 1:
                after = json.loads(payload)["error"]["retry_after"]
                self.told = (min(self.told[0], after), max(self.told[1], after))
        if self._busy:
            self._send(1)
