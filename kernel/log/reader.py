"""Reading JetStream in order, fast: an ephemeral pull consumer without acknowledgements, two requests outstanding.

The consumer's own position is worth nothing to us (checkpoints in SQL are the truth), so when anything is odd, a
missed heartbeat, a gap in the consumer's count, a reconnect, a server's refusal, the reader makes a new consumer
behind the last commit that it handed out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any

import orjson

from kernel.log.base import Batch, LogError, Stored
from kernel.log.wire import Wire, header_of, publish_frame, status_of

HEARTBEAT_S = 2.0
PULL_EXPIRES_S = 30.0
WINDOW = 8_000
"""Commits in one pull request; two are outstanding."""
MAX_SUBJECTS = 200_000
"""Subjects whose text is kept."""

Api = Callable[..., Any]


class JetStreamReader:
    """A position in the stream; see `LogReader`.

    Args:
        api: asks the JetStream API.
        subject: filter, or None to read the whole stream unfiltered, which is the fastest.
    """

    def __init__(self, wire: Wire, api: Api, prefix: str, stream: str, after: int, subject: str | None) -> None:
        self._wire, self._api, self._prefix, self._stream = wire, api, prefix, stream
        self._after, self._subject = after, subject
        self._buffer: list[tuple[bytes, bytes, bytes]] = []
        self._subjects: dict[bytes, str] = {}
        self._arrived = asyncio.Event()
        self._broken = True
        self._consumer = ""
        self._stop_listening: Callable[[], Any] | None = None
        self._requested = 0
        self._delivered = 0
        self._heard = 0.0
        wire.reconnections.append(self._break)

    def _break(self) -> None:
        self._broken = True
        self._arrived.set()

    async def _start(self) -> None:
        """Make a consumer behind what was handed out."""
        await self._drop()
        config: dict[str, Any] = {
            "deliver_policy": "by_start_sequence" if self._after else "all",
            "ack_policy": "none",
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": 60_000_000_000,
            "max_waiting": 8,
        }
        if self._after:
            config["opt_start_seq"] = self._after + 1
        if self._subject is not None:
            config["filter_subject"] = self._subject
        answer = await self._api(f"CONSUMER.CREATE.{self._stream}", {"stream_name": self._stream, "config": config})
        self._consumer = answer["name"]
        self._buffer.clear()
        self._requested = self._delivered = 0
        self._broken = False
        self._heard = time.monotonic()
        # a new inbox each time: late messages of the old consumer must not be taken for the new one's
        self._inbox = self._wire.new_inbox()
        self._stop_listening = await self._wire.listen(self._inbox, self._receive)
        self._next = f"{self._prefix}.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}".encode()
        self._pull()

    def _receive(self, subject: bytes, reply: bytes, payload: bytes, headers: bytes | None) -> None:
        self._heard = time.monotonic()
        status = status_of(headers)
        if not status:
            self._requested -= 1
            self._buffer.append((subject, reply, payload))
            if not self._arrived.is_set():
                self._arrived.set()
        elif status in (404, 408):
            left = header_of(headers or b"", b"Nats-Pending-Messages")
            self._requested -= int(left) if left else self._requested
            self._arrived.set()
        elif status != 100:
            self._break()

    def _pull(self) -> None:
        while not self._broken and self._requested + len(self._buffer) <= WINDOW:
            request = orjson.dumps(
                {
                    "batch": WINDOW,
                    "expires": int(PULL_EXPIRES_S * 1e9),
                    "idle_heartbeat": int(HEARTBEAT_S * 1e9),
                }
            )
            self._requested += WINDOW
            self._wire.send(publish_frame(self._next, self._inbox.encode(), request))

    async def next(self, limit: int, timeout: float | None = None) -> Batch:
        """See `LogReader.next`.

        Raises:
            Unavailable: no consumer could be made; trying again later goes on from the same place.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._broken:
                await self._start()
            if self._buffer:
                batch = self._take(limit)
                if batch is not None:
                    return batch
                continue
            self._pull()
            self._arrived.clear()
            wait = HEARTBEAT_S if deadline is None else min(HEARTBEAT_S, deadline - time.monotonic())
            if wait <= 0:
                return Batch([], 0)
            try:
                async with asyncio.timeout(wait):
                    await self._arrived.wait()
            except TimeoutError:
                if time.monotonic() - self._heard > 2.5 * HEARTBEAT_S:
                    self._broken = True

    def _take(self, limit: int) -> Batch | None:
        taken = self._buffer[:limit]
        del self._buffer[:limit]
        self._pull()
        # $JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time>.<pending>, or with a domain and
        # an account hash before the stream and a random token at the end
        first, last = taken[0][1].split(b"."), taken[-1][1].split(b".")
        offset = 5 if len(first) == 9 else 7
        # the consumer counts what it delivers: a missing number is a message that got lost on the way
        if int(first[offset + 1]) != self._delivered + 1 or int(last[offset + 1]) != self._delivered + len(taken):
            self._broken = True
            return None
        self._delivered += len(taken)
        sequences: Iterable[int] = range(int(first[offset]), int(last[offset]) + 1)
        if int(last[offset]) - int(first[offset]) != len(taken) - 1:
            sequences = [int(reply.split(b".", offset + 1)[offset]) for _, reply, _ in taken]
        if len(self._subjects) > MAX_SUBJECTS:
            self._subjects.clear()
        # the same text object each time: its hash is known, and comparing it is comparing a pointer
        name, new = self._subjects, tuple.__new__
        commits: list[Stored] = [
            new(Stored, (sequence, name.get(subject) or name.setdefault(subject, subject.decode()), payload))
            for sequence, (subject, _, payload) in zip(sequences, taken, strict=True)
        ]
        self._after = commits[-1].sequence
        return Batch(commits, int(last[offset + 3]))

    async def _drop(self) -> None:
        if self._stop_listening is not None:
            await self._stop_listening()
            self._stop_listening = None
        if self._consumer:
            consumer, self._consumer = self._consumer, ""
            try:
                await self._api(f"CONSUMER.DELETE.{self._stream}.{consumer}", {})
            except LogError:
                pass  # it is gone, or goes by itself when nobody has pulled for a minute

    async def close(self) -> None:
        """Remove the consumer; a second call does nothing."""
        if self._break not in self._wire.reconnections:
            return
        self._wire.reconnections.remove(self._break)
        self._broken = True
        if self._wire.is_connected:
            await self._drop()
