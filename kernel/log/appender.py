"""Appending to JetStream: many commits in flight, each with its expected sequence, grouped where that is faster.

One commit goes out as one message whose acknowledgement carries a token. Where the server waits for the disk at every
message (`sync_interval: always`) commits that are ready at the same moment go out as one atomic batch (2.12+): one
wait for all of them. Where it doesn't, a batch costs the server more than its messages one by one, so which it is gets
measured on the appends themselves. Nothing waits to fill a batch: what piled up during the last one is the next one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine
from statistics import median
from typing import Any

import msgspec

from aggregates.context import uuid7
from kernel.errors import Conflict, LogError, PayloadTooLarge, Replaced, Unavailable, UnknownOutcome
from kernel.log.base import Stored
from kernel.settings.jetstream import GroupCommit
from kernel.transport.connection import NatsConnection, publish_frame, status_of

logger = logging.getLogger("eskernel.log")

MAX_IN_FLIGHT = 4_000
"""The server drops publications beyond 10,000."""
MAX_GROUP = 1_000
"""Messages in an atomic batch; the server's own limit."""
MAX_GROUP_BYTES = 4 * 1024 * 1024
MAX_GROUPS_IN_FLIGHT = 1
"""More would be smaller ones, and each costs the server milliseconds: with 2, 256 commands in flight went slower."""
SLOW_COMMIT_S = 100e-6
"""Slower than this per message, with many under way, means that the server waits for the disk at each."""

_WRONG_LAST_SEQUENCE, _IN_FLIGHT_CONFLICT, _MESSAGE_TOO_LARGE = 10071, 10164, 10054
_FULL = {10023, 10047, 10077, 10122}


class Append:
    """One commit on its way."""

    __slots__ = ("attempts", "expected", "future", "payload", "sent", "started", "subject")

    def __init__(self, subject: str, expected: int, payload: bytes, future: asyncio.Future[int]) -> None:
        self.subject = subject
        self.expected = expected
        self.payload = payload
        self.future = future
        self.started = time.perf_counter()
        self.sent = 0.0
        self.attempts = 0


class _ApiError(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Ack(msgspec.Struct):
    seq: int = 0
    count: int = 0
    error: _ApiError | None = None


_decode_ack = msgspec.json.Decoder(_Ack).decode


class Appender:
    """Sends appends over one connection and settles every one of them.

    Attributes:
        refusal: why the log takes nothing at the moment, or nothing.
        highest: highest stream sequence acknowledged.
        verify: asked after each reconnect, before anything is sent: raises where this is another log.

    Args:
        last: reads a subject's last commit from the leader.
        atomic: whether the server takes atomic batches.
        timeout: seconds to wait for an acknowledgement before reading back what happened.
        deadline: seconds after which an append whose outcome can't be found out is given up as unknown.
        max_in_flight: messages sent and not acknowledged.
    """

    def __init__(
        self,
        connection: NatsConnection,
        last: Callable[[str], Coroutine[Any, Any, Stored | None]],
        *,
        atomic: bool,
        group_commit: GroupCommit = "auto",
        timeout: float = 5.0,
        deadline: float = 30.0,
        max_in_flight: int = MAX_IN_FLIGHT,
    ) -> None:
        self._connection = connection
        self._last = last
        self._atomic = atomic and group_commit != "never"
        self.grouping = self._atomic and group_commit == "always"
        self._timeout, self._deadline, self._max_in_flight = timeout, deadline, max_in_flight
        self._waiting: deque[Append] = deque()
        self._in_flight: dict[int, list[Append]] = {}
        self._messages_in_flight = 0
        self._token = 0
        self._scheduled = False
        self._settling: set[asyncio.Task[None]] = set()
        self._inbox = b""
        self._burst_left, self._burst_size, self._burst_start = 0, 0, 0.0
        self._burst_costs: deque[float] = deque(maxlen=8)
        self._closed = False
        self.read_backs = 0
        self.refusal = ""
        self.highest = 0
        self.verify: Callable[[], Coroutine[Any, Any, Any]] | None = None
        self._verified = asyncio.Event()
        self._verified.set()
        self._verifying: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Subscribe to the acknowledgements and watch over the time-outs."""
        self._inbox = self._connection.new_inbox().encode()
        self._loop = asyncio.get_running_loop()
        self._stop_listening = await self._connection.listen(f"{self._inbox.decode()}.*", self._acknowledged)
        self._connection.reconnections.append(self._lost_connection)
        self._watch = self._loop.create_task(self._expire())

    def append(self, subject: str, expected: int, payload: bytes) -> asyncio.Future[int]:
        """See `EventLog.append`."""
        future: asyncio.Future[int] = self._loop.create_future()
        if self._closed:
            future.set_exception(Unavailable("the log is closed"))
        elif len(payload) > self.max_payload:
            future.set_exception(
                PayloadTooLarge(f"{subject}: a commit of {len(payload)} bytes; the server takes {self.max_payload}")
            )
        else:
            self._waiting.append(Append(subject, expected, payload, future))
            if not self._scheduled:
                self._scheduled = True
                self._loop.call_soon(self._flush)
        return future

    @property
    def max_payload(self) -> int:
        """Most bytes of a commit: the server's limit less room for the headers."""
        return self._connection.max_payload - 512

    @property
    def _open(self) -> bool:
        """Whether commits may go out: what is written while disconnected would go out unlooked at."""
        return self._verified.is_set() and self._connection.is_connected

    @property
    def pressure(self) -> tuple[int, int]:
        """Commits waiting to be sent, and messages in flight."""
        return len(self._waiting), self._messages_in_flight

    @property
    def waiting_for(self) -> float:
        """Seconds since the oldest append was asked for that has no answer."""
        first = next(iter(self._in_flight.values()), None)
        oldest = first[0] if first else self._waiting[0] if self._waiting else None
        return time.perf_counter() - oldest.started if oldest is not None else 0.0

    def _flush(self) -> None:
        self._scheduled = False
        if not self._waiting or not self._open:
            return
        now = time.perf_counter()
        frames: list[bytes] = []
        if self.grouping:
            while self._waiting and len(self._in_flight) < MAX_GROUPS_IN_FLIGHT:
                self._send_group(self._take_group(), now, frames)
        else:
            room = self._max_in_flight - self._messages_in_flight
            count = min(room, len(self._waiting))
            if self._atomic and count >= 16 and not self._in_flight:
                self._burst_left = self._burst_size = count
                self._burst_start = 0.0
            for _ in range(count):
                self._send_one(self._waiting.popleft(), now, frames)
        if frames:
            self._connection.send(b"".join(frames))

    def _send_one(self, one: Append, now: float, frames: list[bytes]) -> None:
        one.sent = now
        one.attempts += 1
        self._token += 1
        self._in_flight[self._token] = [one]
        self._messages_in_flight += 1
        headers = b"NATS/1.0\r\nNats-Expected-Last-Subject-Sequence: %d\r\n\r\n" % one.expected
        frames.append(publish_frame(one.subject.encode(), b"%b.%d" % (self._inbox, self._token), one.payload, headers))

    def _take_group(self) -> list[Append]:
        group: list[Append] = []
        subjects: set[str] = set()
        size = 0
        while self._waiting and len(group) < MAX_GROUP and size < MAX_GROUP_BYTES:
            if self._waiting[0].subject in subjects:
                break
            one = self._waiting.popleft()
            subjects.add(one.subject)
            size += len(one.payload)
            group.append(one)
        return group

    def _send_group(self, group: list[Append], now: float, frames: list[bytes]) -> None:
        if len(group) == 1:
            self._send_one(group[0], now, frames)
            return
        self._token += 1
        self._in_flight[self._token] = group
        self._messages_in_flight += len(group)
        batch_id = uuid7().encode()
        for number, one in enumerate(group, 1):
            one.sent = now
            one.attempts += 1
            final = number == len(group)
            headers = (
                b"NATS/1.0\r\nNats-Expected-Last-Subject-Sequence: %d\r\n"
                b"Nats-Batch-Id: %b\r\nNats-Batch-Sequence: %d\r\n%b\r\n"
                % (one.expected, batch_id, number, b"Nats-Batch-Commit: 1\r\n" if final else b"")
            )
            reply = b"%b.%d" % (self._inbox, self._token) if final else b""
            frames.append(publish_frame(one.subject.encode(), reply, one.payload, headers))

    def _acknowledged(self, subject: bytes, _reply: bytes, payload: bytes, headers: bytes | None) -> None:
        group = self._in_flight.pop(int(subject[subject.rfind(b".") + 1 :]), None)
        if group is None:
            return
        self._messages_in_flight -= len(group)
        if self._waiting and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)
        if headers is not None and status_of(headers):
            self._settle(group, "the stream does not answer")
            return
        ack = _decode_ack(payload)
        if ack.error is not None:
            self._refused(group, ack.error)
            return
        if self.refusal:
            logger.info("the log takes commits again")
            self.refusal = ""
        self.highest = max(self.highest, ack.seq)
        if self._burst_left:
            self._measure()
        first = ack.seq - len(group) + 1
        for offset, one in enumerate(group):
            if not one.future.done():
                one.future.set_result(first + offset)

    def _measure(self) -> None:
        """Time the acknowledgements of a burst sent at once; the median of eight bursts tells the server's pace."""
        if not self._burst_start:
            self._burst_start = time.perf_counter()
        self._burst_left -= 1
        if not self._burst_left:
            self._burst_costs.append((time.perf_counter() - self._burst_start) / (self._burst_size - 1))
            if len(self._burst_costs) == self._burst_costs.maxlen and median(self._burst_costs) > SLOW_COMMIT_S:
                self.grouping = True

    def _refused(self, group: list[Append], error: _ApiError) -> None:
        if len(group) > 1:
            # one conflict rejects the whole batch: let each speak for itself
            frames: list[bytes] = []
            for one in group:
                self._send_one(one, time.perf_counter(), frames)
            self._connection.send(b"".join(frames))
            return
        one = group[0]
        if one.future.done():
            return
        if error.err_code == _IN_FLIGHT_CONFLICT or (error.err_code == _WRONG_LAST_SEQUENCE and one.attempts > 1):
            self._settle(group, error.description)
        elif error.err_code == _WRONG_LAST_SEQUENCE:
            tail = error.description.rsplit(":", 1)[-1].strip()
            one.future.set_exception(Conflict(one.subject, one.expected, int(tail) if tail.isdigit() else None))
        elif error.err_code == _MESSAGE_TOO_LARGE:
            one.future.set_exception(PayloadTooLarge(f"{one.subject}: {error.description}"))
        elif error.err_code in _FULL or error.code in (429, 503):
            self._refuse(f"the log is full or busy: {error.description}")
            one.future.set_exception(Unavailable(self.refusal))
        else:
            one.future.set_exception(LogError(f"{one.subject}: {error.description} ({error.err_code})"))

    def _refuse(self, why: str) -> None:
        if not self.refusal:
            logger.warning("%s; commands have to wait until the log takes commits", why)
        self.refusal = why

    def _lost_connection(self) -> None:
        """After a reconnect: acknowledgements of what was in flight will not come any more."""
        groups = list(self._in_flight.values())
        self._in_flight.clear()
        self._messages_in_flight = 0
        self._burst_left = 0
        for group in groups:
            self._settle(group, "the connection was lost")
        if self.verify is not None:
            self._verified.clear()
            if self._verifying is None or self._verifying.done():
                self._verifying = self._loop.create_task(self._look(self.verify))
        if self._waiting and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    async def _look(self, verify: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Make sure, after a reconnect, that this is still the same log; until then nothing is appended."""
        while not self._closed:
            try:
                await verify()
            except Replaced:
                return  # another log: nothing may be appended to it
            except LogError:
                await asyncio.sleep(0.1)
            else:
                self._verified.set()
                self._flush()
                return

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._timeout / 2))
            overdue = time.perf_counter() - self._timeout
            for token in [token for token, group in self._in_flight.items() if group[0].sent < overdue]:
                group = self._in_flight.pop(token)
                self._messages_in_flight -= len(group)
                self._refuse(f"no acknowledgement for {self._timeout:g} s; is the server's disk full?")
                self._settle(group, "no acknowledgement")
            if self._waiting and not self._scheduled:
                self._scheduled = True
                self._loop.call_soon(self._flush)
            lapsed = time.perf_counter() - self._deadline
            while self._waiting and self._waiting[0].started < lapsed:
                one = self._waiting.popleft()
                if not one.future.done():
                    one.future.set_exception(Unavailable(f"{one.subject}: not sent, the log did not keep up"))

    def _settle(self, group: list[Append], why: str) -> None:
        for one in group:
            if not one.future.done():
                task = self._loop.create_task(self._find_out(one, why))
                self._settling.add(task)
                task.add_done_callback(self._settling.discard)

    async def _find_out(self, one: Append, why: str) -> None:
        """Read back whether an append took effect; if not, send it again: its expected sequence makes that safe."""
        try:
            await self._settle_one(one, why)
        finally:
            if self._closed and not one.future.done():
                one.future.set_exception(UnknownOutcome("the log was closed before it answered"))

    async def _settle_one(self, one: Append, why: str) -> None:
        pause = 0.02
        give_up = one.started + self._deadline
        while not one.future.done():
            if not self._open:
                why = "the log can't be reached"
                if time.perf_counter() >= give_up:
                    one.future.set_exception(UnknownOutcome(f"{one.subject}: {why}; it may or may not have happened"))
                    return
                await asyncio.sleep(pause)
                pause = min(pause * 2, 0.5)
                continue
            self.read_backs += 1
            try:
                last = await self._last(one.subject)
            except LogError as error:
                why = str(error)
            else:
                if last is not None and last.payload == one.payload:
                    one.future.set_result(last.sequence)
                elif (last.sequence if last is not None else 0) != one.expected:
                    one.future.set_exception(Conflict(one.subject, one.expected, last.sequence if last else 0, True))
                elif time.perf_counter() < give_up and self._open:
                    frames: list[bytes] = []
                    self._send_one(one, time.perf_counter(), frames)
                    self._connection.send(b"".join(frames))
                    return
            if not one.future.done() and time.perf_counter() >= give_up:
                one.future.set_exception(UnknownOutcome(f"{one.subject}: {why}; it may or may not have happened"))
            if not one.future.done():
                await asyncio.sleep(pause)
                pause = min(pause * 2, 1.0)

    async def close(self) -> None:
        """Fail what is pending and stop."""
        if self._closed:
            return
        self._closed = True
        self._watch.cancel()
        if self._verifying is not None:
            self._verifying.cancel()
        for task in list(self._settling):
            task.cancel()
        self._connection.reconnections.remove(self._lost_connection)
        pending = [one for group in self._in_flight.values() for one in group]
        for one in [*pending, *self._waiting]:
            if not one.future.done():
                one.future.set_exception(UnknownOutcome("the log was closed before it answered"))
        self._in_flight.clear()
        self._waiting.clear()
        await self._stop_listening()
