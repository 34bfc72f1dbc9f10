"""Reads JetStream fast and in order, with an ephemeral pull consumer and two outstanding requests.

The checkpoints in SQL are the position of a projection; the consumer's own position does not matter. So the reader
creates a new consumer, after the last commit that it has returned, whenever something is wrong: a missed heartbeat, a
gap in the consumer's count, a reconnect, or a refusal by the server.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import orjson

from kernel.errors import LogError
from kernel.log.base import CommitBatch, Stored
from kernel.settings import Consumer
from kernel.transport.connection import NatsConnection, header_of, publish_frame, status_of

PULL_EXPIRES_S = 30.0
PULL_BYTES = 128 << 20
"""Bytes that a request asks for at most; twice as much may wait here. No message of a server is larger."""
MAX_SUBJECTS = 200_000
"""Largest number of subjects whose text is cached."""

READ_AHEAD = 128_000
"""Default for the commits that the server delivers ahead of acknowledgements: four full batches."""
LONGEST_PAUSE_S = 5.0
"""A consumer that brings nothing before the server ends it is not replaced sooner than after a growing pause."""
GENTLE = 250
"""Commits of a request of a gentle reader."""
_numbers = itertools.count(1)
Api = Callable[..., Any]


def gentle_reader(settings: Consumer) -> Consumer:
    """Return the settings of a reader to which few commits are on their way at a time."""
    return settings.model_copy(update={"window": min(settings.window, GENTLE)})


class JetStreamReader:
    """A position in the stream; see `LogReader`.

    Args:
        api: calls the JetStream API.
        subject: subject filter, or None to read the whole stream, which is fastest.
        worker: name of the worker, for the consumer's name.
        on_acknowledge: called with each sequence that is acknowledged.
        on_consumer: called whenever a consumer was created.

    Attributes:
        consumer: the name of the consumer; empty if there is none.
        trouble: why the server has ended the last consumer, empty if it has not.
    """

    def __init__(
        self,
        connection: NatsConnection,
        api: Api,
        stream: str,
        after: int,
        subject: str | None,
        settings: Consumer,
        worker: str,
        on_acknowledge: Callable[[int], None],
        on_consumer: Callable[[], None],
    ) -> None:
        self._on_acknowledge, self._on_consumer = on_acknowledge, on_consumer
        self._connection, self._api, self._stream = connection, api, stream
        self._after, self._subject = after, subject
        self._settings, self._worker = settings, worker
        self._window, self._heartbeat = settings.window, settings.heartbeat
        self._acknowledging = settings.ack_policy == "all"
        # the last message of each returned batch that is not yet acknowledged
        self._handed: deque[tuple[int, bytes]] = deque()
        self._buffer: list[tuple[bytes, bytes, bytes]] = []
        self._subjects: dict[bytes, str] = {}
        self._arrived = asyncio.Event()
        self._broken = True
        self.consumer = self.trouble = ""
        self._creating: asyncio.Future[dict[str, Any]] | None = None
        self._fruitless = 0
        self._not_before = 0.0
        self._stop_listening: Callable[[], Any] | None = None
        self._requested = 0
        self._delivered = 0
        self._heard = 0.0
        connection.reconnections.append(self._break)

    def _break(self) -> None:
        self._broken = True
        self._arrived.set()

    async def _start(self) -> None:
        """Create a consumer that starts after the last returned commit."""
        await self._drop()
        config: dict[str, Any] = {
            "name": f"{self._settings.name_prefix}-{self._worker}-{next(_numbers)}",
            "deliver_policy": "by_start_sequence" if self._after else self._settings.deliver_policy,
            "ack_policy": self._settings.ack_policy,
            "replay_policy": self._settings.replay_policy,
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": int(self._settings.inactive_threshold * 1e9),
            "max_waiting": self._settings.max_waiting,
        }
        if self._acknowledging:
            config["ack_wait"] = int(self._settings.ack_wait * 1e9)
            config["max_deliver"] = self._settings.max_deliver
            config["max_ack_pending"] = self._settings.max_ack_pending or READ_AHEAD
        if self._after:
            config["opt_start_seq"] = self._after + 1
        if self._subject is not None:
            config["filter_subject"] = self._subject
        where = ".".join(filter(None, (f"CONSUMER.CREATE.{self._stream}.{config['name']}", self._subject)))
        self._creating = asyncio.ensure_future(self._api(where, {"stream_name": self._stream, "config": config}))
        answer = await asyncio.shield(self._creating)
        self._creating = None
        self.consumer = answer["name"]
        self._buffer.clear()
        self._handed.clear()
        self._requested = self._delivered = 0
        self._broken = False
        self._heard = time.monotonic()
        self._on_consumer()
        # until it brings something
        self._fruitless += 1
        if self._fruitless > 1:
            pause = min(0.01 * 2.0 ** min(self._fruitless, 16), LONGEST_PAUSE_S)
            self._not_before = self._heard + pause * random.uniform(0.5, 1.0)
        # a new inbox each time: late messages of the old consumer must not reach the new one
        self._inbox = self._connection.new_inbox()
        self._stop_listening = await self._connection.listen(self._inbox, self._receive)
        self._next = f"{self._connection.api}.CONSUMER.MSG.NEXT.{self._stream}.{self.consumer}".encode()
        self._pull()

    def _receive(self, subject: bytes, reply: bytes, payload: bytes, headers: bytes | None) -> None:
        status = status_of(headers)
        if not status:
            self._requested -= 1
            if not self._buffer:
                self._arrived.set()
            self._buffer.append((subject, reply, payload))
            return
        self._heard = time.monotonic()
        if status == 409 and b"Batch Completed" in (headers or b""):
            pass  # all that was asked for has come; servers say so where a request limits its bytes
        elif status in (404, 408) or (status == 409 and b"MaxBytes" in (headers or b"")):
            left = header_of(headers or b"", b"Nats-Pending-Messages")
            self._requested -= int(left) if left else self._requested
            self._arrived.set()
        elif status != 100:
            self.trouble = (headers or b"")[9:80].split(b"\r\n")[0].decode(errors="replace")
            self._break()

    def _pull(self) -> None:
        while not self._broken and self._requested + len(self._buffer) <= self._window:
            request = orjson.dumps(
                {
                    "batch": self._window,
                    "max_bytes": PULL_BYTES,
                    "expires": int(max(PULL_EXPIRES_S, 3 * self._heartbeat) * 1e9),
                    "idle_heartbeat": int(self._heartbeat * 1e9),
                }
            )
            self._requested += self._window
            self._connection.send(publish_frame(self._next, request, reply=self._inbox.encode()))

    async def next(self, limit: int, timeout: float | None = None) -> CommitBatch:
        """See `LogReader.next`.

        Raises:
            Unavailable: no consumer could be created; a later call continues at the same place.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._broken:
                if not await self._rest(deadline):
                    return CommitBatch([], 0)
                await self._start()
            if self._buffer:
                batch = self._take(limit)
                if batch is not None:
                    return batch
                continue
            self._pull()
            self._arrived.clear()
            wait = self._heartbeat if deadline is None else min(self._heartbeat, deadline - time.monotonic())
            if wait <= 0:
                return CommitBatch([], 0)
            try:
                async with asyncio.timeout(wait):
                    await self._arrived.wait()
            except TimeoutError:
                if time.monotonic() - self._heard > 2.5 * self._heartbeat:
                    self._broken = True

    async def _rest(self, deadline: float | None) -> bool:
        """Pause before another consumer, where the last ones brought nothing; return False if the deadline is first."""
        pause = self._not_before - time.monotonic()
        if pause <= 0:
            return True
        left = pause if deadline is None else deadline - time.monotonic()
        await asyncio.sleep(max(0.0, min(pause, left)))
        return left >= pause

    def _take(self, limit: int) -> CommitBatch | None:
        self._heard = time.monotonic()
        taken = self._buffer[:limit]
        del self._buffer[:limit]
        self._pull()
        # $JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time>.<pending>, or with a domain and
        # an account hash before the stream and a random token at the end
        first, last = taken[0][1].split(b"."), taken[-1][1].split(b".")
        offset = 5 if len(first) == 9 else 7
        # the consumer counts its deliveries: a missing number is a message that was lost on the way
        if int(first[offset + 1]) != self._delivered + 1 or int(last[offset + 1]) != self._delivered + len(taken):
            self._broken = True
            return None
        self._delivered += len(taken)
        self._fruitless, self.trouble = 0, ""
        if self._acknowledging:
            if any(reply.split(b".", offset)[offset - 1] != b"1" for _, reply, _ in taken):
                self._broken = True  # a redelivered message comes out of order
                return None
            self._handed.append((int(last[offset]), taken[-1][1]))
        sequences: Iterable[int] = range(int(first[offset]), int(last[offset]) + 1)
        if int(last[offset]) - int(first[offset]) != len(taken) - 1:
            sequences = [int(reply.split(b".", offset + 1)[offset]) for _, reply, _ in taken]
        if len(self._subjects) > MAX_SUBJECTS:
            self._subjects.clear()
        # one text object per subject: its hash is cached, and comparing it compares a pointer
        name, new = self._subjects, tuple.__new__
        commits: list[Stored] = [
            new(Stored, (sequence, name.get(subject) or name.setdefault(subject, subject.decode()), payload))
            for sequence, (subject, _, payload) in zip(sequences, taken, strict=True)
        ]
        self._after = commits[-1].sequence
        return CommitBatch(commits, int(last[offset + 3]), int(first[offset + 2]) / 1e9)

    def acknowledge(self, sequence: int) -> None:
        """See `LogReader.acknowledge`."""
        self._on_acknowledge(sequence)
        reply = b""
        while self._handed and self._handed[0][0] <= sequence:
            reply = self._handed.popleft()[1]
        if reply.startswith(b"$JS.ACK.") and not self._broken:  # it may be another one's message
            self._connection.send(publish_frame(reply, b"+ACK"))

    async def _drop(self) -> None:
        if self._stop_listening is not None:
            await self._stop_listening()
            self._stop_listening = None
        if self._creating is not None:
            # who waited for it was cancelled; a server may delete a consumer before it has created it
            creating, self._creating = self._creating, None
            with suppress(Exception):  # it could not be created
                self.consumer = (await creating)["name"]
        if self.consumer:
            consumer, self.consumer = self.consumer, ""
            try:
                await self._api(f"CONSUMER.DELETE.{self._stream}.{consumer}", {})
            except LogError:
                pass  # the consumer is deleted already, or the server deletes it after a time without pull requests

    async def close(self) -> None:
        """Delete the consumer. A second call does nothing."""
        if self._break not in self._connection.reconnections:
            return
        self._connection.reconnections.remove(self._break)
        self._broken = True
        if self._connection.is_connected:
            await self._drop()
