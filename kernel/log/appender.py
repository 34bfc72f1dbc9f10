"""Appending to JetStream: many commits in flight, each with its expected sequence, grouped where that is faster.

One commit goes out as one message whose acknowledgement carries a token. Where the server waits for the disk at every
message (`sync_interval: always`), commits that are ready at the same moment go out as one atomic batch (2.12+): one
wait for all of them. Where it does not, a batch costs the server more than its messages one by one. So the server's
pace is measured (`bursts`). Nothing waits to fill a batch: what piled up during the last batch is the next one.

Every append ends: acknowledged, refused, or settled by reading back (`settling`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from aggregates.context import uuid7
from kernel.errors import Conflict, LogError, PayloadTooLarge, Replaced, Unavailable, UnknownOutcome
from kernel.log.base import Appending, Stored
from kernel.log.bursts import BurstMeter
from kernel.log.repeats import Repeats
from kernel.log.settling import Append, Settler, closed
from kernel.settings.jetstream import GroupCommit
from kernel.transport.connection import NatsConnection, publish_frame, status_of

logger = logging.getLogger("eskernel.log")

MAX_IN_FLIGHT = 4_000
"""The server drops publications beyond 10,000."""
MAX_GROUP = 1_000
"""Messages in an atomic batch; the server's own limit."""
MAX_GROUP_BYTES = 4 * 1024 * 1024
MAX_GROUPS_IN_FLIGHT = 1
"""More groups would be smaller ones, and each costs the server milliseconds: with 2, 256 commands went slower."""
HEADERS = 512
"""Bytes of a message that are kept free for its headers."""
CONTROL_LINE = 128
"""Bytes of a control line that are kept free for what is not the subject: the inbox, the sizes."""
VERIFY_AGAIN_S, VERIFY_LATEST_S = 0.1, 1.0
UNHEARD_S = 2.0
"""Where no stream takes an append for so long it is refused. While a cluster elects a leader none does."""

_WRONG_LAST_SEQUENCE, _IN_FLIGHT_CONFLICT = 10071, 10164
_TOO_LARGE = {10054, 10097}
_FULL = {10023, 10047, 10077, 10122}


class _ApiError(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Ack(msgspec.Struct):
    seq: int = 0
    count: int = 0
    error: _ApiError | None = None


_decode_ack = msgspec.json.Decoder(_Ack).decode
Verify = Callable[[], Coroutine[Any, Any, object]]


async def trust() -> None:
    """Take the stream for the same after a reconnect."""


class Appender:
    """Sends appends over one connection and ends every one of them.

    Attributes:
        grouping: whether commits go out in atomic batches at present.
        refusal: why the log takes nothing at the moment, or nothing.
        refused_at: when an append was last refused for that, by the performance counter.
        acknowledged: messages that the log has acknowledged.
        highest: highest stream sequence acknowledged.

    Args:
        last: reads a subject's last commit from the leader.
        verify: called after each reconnect, before anything is sent: raises where this is another log.
        atomic: whether the server takes atomic batches.
        timeout: seconds to wait for an acknowledgement before reading back what happened.
        deadline: seconds after which an append whose outcome cannot be found out ends as unknown.
        max_in_flight: messages sent and not acknowledged.
    """

    def __init__(
        self,
        connection: NatsConnection,
        last: Callable[[str], Coroutine[Any, Any, Stored | None]],
        *,
        verify: Verify = trust,
        atomic: bool = False,
        group_commit: GroupCommit = "auto",
        timeout: float = 5.0,
        deadline: float = 30.0,
        max_in_flight: int = MAX_IN_FLIGHT,
    ) -> None:
        self._connection, self._verify = connection, verify
        self._settler = Settler(self, last, deadline)
        self._bursts = BurstMeter()
        self._atomic = atomic and group_commit != "never"
        self.grouping = self._atomic and group_commit == "always"
        self._timeout, self._deadline, self._max_in_flight = timeout, deadline, max_in_flight
        self._waiting: deque[Append] = deque()
        self._in_flight: dict[int, list[Append]] = {}
        self._messages_in_flight = 0
        self._token = 0
        self._flushing = False
        self._closed = False
        self.refusal = ""
        self.refused_at = self._unheard_since = 0.0
        self.acknowledged = self._met = 0
        self.highest = 0
        self._repeats = Repeats()
        self._note_limits()
        self._verified = True
        self._reconnects = 0
        self._verifying: set[asyncio.Task[None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Subscribe to the acknowledgements and watch over the time-outs."""
        self._inbox = self._connection.new_inbox().encode()
        self._loop = asyncio.get_running_loop()
        self._stop_listening = await self._connection.listen(f"{self._inbox.decode()}.*", self._acknowledged)
        self._connection.reconnections.append(self._lost_connection)
        self._connection.denials.append(self._denied)
        self._spawn(self._expire(), self._tasks)

    def _spawn(self, work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
        task = self._loop.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def append(self, subject: str, expected: int, payload: bytes, links: bytes = b"") -> Appending:
        """See `EventLog.append`."""
        future = Appending()
        if self._closed:
            future.set_exception(Unavailable("the log is closed"))
        elif len(payload) > self._most or len(subject) > self._longest_subject:
            future.set_exception(self._too_large(subject, payload))
        else:
            self._waiting.append(Append(subject, expected, payload, links, future))
            self._schedule_flush()
        return future

    def _note_limits(self) -> None:
        self._most = self._connection.max_payload - HEADERS
        self._longest_subject = self._connection.max_control_line - CONTROL_LINE

    def _fits(self, append: Append) -> bool:
        """Return whether the server takes a commit, and end it if it does not: the server's limits can change."""
        if len(append.payload) <= self._most and len(append.subject) <= self._longest_subject:
            return True
        append.fail(self._too_large(append.subject, append.payload))
        return False

    def _too_large(self, subject: str, payload: bytes) -> PayloadTooLarge:
        if len(payload) > self._most:
            return PayloadTooLarge(
                f"{subject}: a commit of {len(payload)} bytes; the server takes {self._most} (max_payload less "
                f"{HEADERS} for headers)"
            )
        return PayloadTooLarge(
            f"{subject[:80]}...: a subject of {len(subject)} bytes; the server takes {self._longest_subject} "
            f"(max_control_line less {CONTROL_LINE})"
        )

    @property
    def max_payload(self) -> int:
        """Most bytes of a commit: the server's limit less room for the headers."""
        return self._most

    @property
    def is_open(self) -> bool:
        """Whether commits may go out: what is written while disconnected would go out to a log not verified."""
        return self._verified and self._connection.is_connected

    @property
    def pressure(self) -> tuple[int, int]:
        """Commits waiting to be sent, and messages in flight."""
        return len(self._waiting), self._messages_in_flight

    @property
    def waiting_for(self) -> float:
        """Seconds since the oldest append was asked for that has no answer."""
        first = next(iter(self._in_flight.values()), None)
        oldest = min(
            first[0].started if first else math.inf,
            self._waiting[0].started if self._waiting else math.inf,
            self._settler.oldest,
        )
        return max(0.0, time.perf_counter() - oldest)

    @property
    def settled(self) -> int:
        """Appends that were acknowledged, found in the log, or met another commit: it changes while the log works."""
        return self.acknowledged + self._met

    @property
    def read_backs(self) -> int:
        """How often the log was read to find out what happened to an append."""
        return self._settler.read_backs

    # out

    def _schedule_flush(self) -> None:
        """Send what waits at the end of this turn of the loop."""
        if self._waiting and not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if not self._waiting or not self.is_open:
            return
        now = time.perf_counter()
        frames: list[bytes] = []
        if self.grouping:
            while self._waiting and len(self._in_flight) < MAX_GROUPS_IN_FLIGHT:
                self._send_group(self._take_group(), now, frames)
        else:
            room = self._max_in_flight - self._messages_in_flight
            count = min(room, len(self._waiting))
            if self._atomic and not self._in_flight:
                self._bursts.begin(count)
            for _ in range(count):
                self._send_one(self._waiting.popleft(), now, frames)
        if frames:
            self._connection.send(b"".join(frames))

    def send_again(self, append: Append) -> None:
        """Send a commit once more."""
        if not self._fits(append):
            return
        frames: list[bytes] = []
        self._send_one(append, time.perf_counter(), frames)
        self._connection.send(b"".join(frames))

    def _send_one(self, append: Append, now: float, frames: list[bytes]) -> None:
        append.sent = now
        append.attempts += 1
        self._token += 1
        self._in_flight[self._token] = [append]
        self._messages_in_flight += 1
        headers = b"NATS/1.0\r\n%b\r\n" % append.headers
        reply = b"%b.%d" % (self._inbox, self._token)
        frames.append(publish_frame(append.subject.encode(), append.payload, reply=reply, headers=headers))

    def _take_group(self) -> list[Append]:
        group: list[Append] = []
        subjects: set[str] = set()
        size = 0
        while self._waiting and len(group) < MAX_GROUP and size < MAX_GROUP_BYTES:
            if self._waiting[0].subject in subjects:
                break
            append = self._waiting.popleft()
            subjects.add(append.subject)
            size += len(append.payload)
            group.append(append)
        return group

    def _send_group(self, group: list[Append], now: float, frames: list[bytes]) -> None:
        if len(group) == 1:
            self._send_one(group[0], now, frames)
            return
        self._token += 1
        self._in_flight[self._token] = group
        self._messages_in_flight += len(group)
        batch_id = uuid7().encode()
        for number, append in enumerate(group, 1):
            append.sent = now
            append.attempts += 1
            final = number == len(group)
            headers = b"NATS/1.0\r\n%bNats-Batch-Id: %b\r\nNats-Batch-Sequence: %d\r\n%b\r\n" % (
                append.headers,
                batch_id,
                number,
                b"Nats-Batch-Commit: 1\r\n" if final else b"",
            )
            reply = b"%b.%d" % (self._inbox, self._token) if final else b""
            frames.append(publish_frame(append.subject.encode(), append.payload, reply=reply, headers=headers))

    # back

    def _acknowledged(self, subject: bytes, _reply: bytes, payload: bytes, headers: bytes | None) -> None:
        group = self._in_flight.pop(int(subject[subject.rfind(b".") + 1 :]), None)
        if group is None:
            return
        self._messages_in_flight -= len(group)
        self._schedule_flush()
        if headers is not None and status_of(headers):
            self._unheard(group)
            return
        ack = _decode_ack(payload)
        if ack.error is not None:
            self._refused(group, ack.error)
            return
        if self.refusal:
            self.take_back_refusal()
        self.acknowledged += 1
        self.highest = max(self.highest, ack.seq)
        if self._bursts.left:
            self._bursts.acknowledge()
            self.grouping = self.grouping or self._bursts.slow
        first = ack.seq - len(group) + 1
        for offset, append in enumerate(group):
            if not append.future.done():
                append.future.set_result(first + offset)

    def _unheard(self, group: list[Append]) -> None:
        """Nothing has taken these commits: no stream has their subjects, or it has no leader at present."""
        subject = group[0].subject
        self._refuse(f"no stream takes {subject}: it is gone, its subjects were changed, or it has no leader")
        self._unheard_since = self._unheard_since or self.refused_at
        for append in group:
            if append.uncertain:
                self._settler.settle([append], self.refusal)
            elif self.refused_at - self._unheard_since < UNHEARD_S:
                self._settler.try_again(append)
            else:
                append.fail(Unavailable(self.refusal))

    def _denied(self, subject: str) -> None:
        """The server does not let this user publish to a subject; it does not answer such a message."""
        for group in self._in_flight.values():
            for append in group:
                if append.subject == subject and not append.future.done():
                    self._refuse(f"the user of this connection may not publish to {subject}: see its permissions")
                    append.fail(UnknownOutcome(self.refusal) if append.uncertain else Unavailable(self.refusal))

    def _refused(self, group: list[Append], error: _ApiError) -> None:
        if len(group) > 1:
            # one conflict rejects the whole batch: its members are sent one by one
            frames: list[bytes] = []
            for append in group:
                if not append.future.done() and self._fits(append):
                    self._send_one(append, time.perf_counter(), frames)
            self._connection.send(b"".join(frames))
            return
        append = group[0]
        if error.err_code == _IN_FLIGHT_CONFLICT or (error.err_code == _WRONG_LAST_SEQUENCE and append.attempts > 1):
            self._settler.settle(group, error.description)
        elif error.err_code == _WRONG_LAST_SEQUENCE:
            self._met += 1
            tail = error.description.rsplit(":", 1)[-1].strip()
            append.fail(Conflict(append.subject, append.expected, int(tail) if tail.isdigit() else None))
        elif error.err_code in _TOO_LARGE:
            append.fail(
                PayloadTooLarge(f"{append.subject}: a commit of {len(append.payload)} bytes: {error.description}")
            )
        else:
            full = error.err_code in _FULL or error.code in (429, 503)
            self._refuse(
                f"the log is full or busy: {error.description}"
                if full
                else f"the log refuses commits: {error.description} ({error.err_code})"
            )
            append.fail(Unavailable(self.refusal))

    def _refuse(self, why: str) -> None:
        """Note that the log takes nothing, and why."""
        self.refused_at = time.perf_counter()
        if not self.refusal and (more := self._repeats.due("refused")) is not None:
            logger.warning("%s; commands have to wait until the log takes commits%s", why, more)
        self.refusal = why

    def take_back_refusal(self) -> None:
        """Take the log for one that takes commits: it does, or it was not asked for a long time."""
        if self._repeats.due("taken") is not None:
            logger.info("the log takes commits again")
        self.refusal = ""
        self._unheard_since = 0.0

    def note_settled(self, sequence: int) -> None:
        """Note that a commit was found in the log, or another one in its place."""
        self._met += 1
        self.highest = max(self.highest, sequence)

    # time-outs and reconnects

    def _lost_connection(self) -> None:
        """After a reconnect: acknowledgements of what was in flight will not come any more."""
        groups = list(self._in_flight.values())
        self._in_flight.clear()
        self._messages_in_flight = 0
        self._bursts.abort()
        self._note_limits()
        self._waiting = deque(append for append in self._waiting if self._fits(append))
        for group in groups:
            self._settler.settle(group, "the connection was lost")
        self._reconnects += 1
        self._verified = False
        if not self._verifying:
            self._spawn(self._verify_log(), self._verifying)

    async def _verify_log(self) -> None:
        """Make sure that this is still the same log; until then nothing is appended."""
        pause = VERIFY_AGAIN_S
        while not self._verified:
            reconnects = self._reconnects
            try:
                await self._verify()
            except Replaced:
                return  # another log: nothing may be appended to it
            except Exception as error:
                if not isinstance(error, LogError) and (more := self._repeats.due("verify")) is not None:
                    logger.exception("the log could not be verified after a reconnect; trying again%s", more)
                await asyncio.sleep(pause)
                pause = min(2 * pause, VERIFY_LATEST_S)
            else:
                # an answer from before another reconnect says nothing of the server behind it
                self._verified = reconnects == self._reconnects
        self._flush()

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._timeout / 2))
            overdue = time.perf_counter() - self._timeout
            for token in [token for token, group in self._in_flight.items() if group[0].sent < overdue]:
                group = self._in_flight.pop(token)
                self._messages_in_flight -= len(group)
                if all(append.future.done() for append in group):
                    continue
                self._refuse(f"no acknowledgement for {self._timeout:g} s: the server is slow, or its disk is full")
                self._settler.settle(group, "no acknowledgement")
            self._schedule_flush()
            lapsed = time.perf_counter() - self._deadline
            while self._waiting and self._waiting[0].started < lapsed:
                append = self._waiting.popleft()
                append.fail(Unavailable(f"{append.subject}: not sent, the log did not keep up"))

    async def close(self) -> None:
        """Fail what is pending and stop."""
        if self._closed:
            return
        self._closed = True
        for task in [*self._tasks, *self._verifying]:
            task.cancel()
        self._settler.close()
        self._connection.reconnections.remove(self._lost_connection)
        self._connection.denials.remove(self._denied)
        for append in [*self._waiting, *(append for group in self._in_flight.values() for append in group)]:
            append.fail(closed())
        self._in_flight.clear()
        self._waiting.clear()
        await self._stop_listening()
