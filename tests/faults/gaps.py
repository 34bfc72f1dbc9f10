"""The longest time without a receipt: from the service, and from a bare nats-py loop beside it on the same cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client as Nats
from nats.js.api import StreamConfig

from tests.faults.clients import Load

LANES: Final = 16
"""Senders on each side, each with an aggregate or a subject of its own."""
TIMEOUT_S: Final = 1.0
"""Both sides wait this long for an answer, and then send again."""
PAUSE_S: Final = 0.1
BARE: Final = "bare"
_REFUSED = (nats.errors.Error, nats.js.errors.Error, TimeoutError, ConnectionError)


@dataclass(slots=True)
class Receipts:
    """The times of one side's receipts, in seconds of the loop's clock."""

    times: list[float] = field(default_factory=list)

    def longest(self, start: float, end: float) -> float:
        """Return the longest gap that touches this span of time."""
        inside = [time for time in self.times if start <= time <= end]
        before = max((time for time in self.times if time < start), default=start)
        after = min((time for time in self.times if time > end), default=end)
        points = [before, *inside, after]
        return max(later - earlier for earlier, later in pairwise(points))


class Probes:
    """Sends marks to the service, and bare messages to a replicated stream of its own, at the same pace.

    Attributes:
        service, bare: their receipts.
    """

    def __init__(self, load: Load, urls: list[str]) -> None:
        self.service, self.bare = Receipts(), Receipts()
        self._load, self._urls = load, urls
        self._connections: list[Nats] = []
        self._lanes: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()

    async def start(self) -> None:
        """Make the bare stream, and begin on both sides."""
        for _ in range(4):  # as many as the load has clients
            self._connections.append(
                await nats.connect(
                    self._urls, max_reconnect_attempts=-1, reconnect_time_wait=0.25, ping_interval=2, error_cb=_ignore
                )
            )
        config = StreamConfig(name=BARE, subjects=[f"{BARE}.>"], num_replicas=len(self._urls))
        await self._connections[0].jetstream(timeout=10).add_stream(config)
        for number in range(LANES):
            self._begin(self._send_marks(number))
            self._begin(self._publish(number))

    def _begin(self, lane: Coroutine[Any, Any, None]) -> None:
        self._lanes.append(asyncio.create_task(lane))

    async def stop(self) -> None:
        """Send no more, and wait for the last outcomes."""
        self._stopping.set()
        await asyncio.gather(*self._lanes)

    async def close(self) -> None:
        for lane in self._lanes:
            lane.cancel()
        await asyncio.gather(*self._lanes, return_exceptions=True)
        for connection in self._connections:
            await connection.close()

    async def _send_marks(self, number: int) -> None:
        clock = asyncio.get_running_loop().time
        while not self._stopping.is_set():
            if await self._load.mark(f"probe-{number}", number % 4, TIMEOUT_S):
                self.service.times.append(clock())
            await asyncio.sleep(PAUSE_S)

    async def _publish(self, number: int) -> None:
        clock = asyncio.get_running_loop().time
        streams = self._connections[number % 4].jetstream(timeout=TIMEOUT_S)
        while not self._stopping.is_set():
            try:
                await streams.publish(f"{BARE}.{number}", b"x" * 200)
            except _REFUSED:
                await asyncio.sleep(PAUSE_S / 2)
                continue
            self.bare.times.append(clock())
            await asyncio.sleep(PAUSE_S)


async def _ignore(_error: Exception) -> None:
    """Take the error, which nats-py would print otherwise."""
