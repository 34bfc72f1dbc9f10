"""From a request on NATS to a receipt: the asyncio side of the actors."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec

from aggregates import InvalidId, InvalidMessage
from aggregates.cell import Cell
from aggregates.commit import Decision, encode, timestamp
from aggregates.context import uuid7
from aggregates.messages import parse
from kernel.actors.histories import Histories
from kernel.actors.mailbox import Appended, Decide, Leave, Request, Unstorable
from kernel.actors.residents import Resident, Residents
from kernel.actors.system import Actors
from kernel.app import App
from kernel.errors import Conflict, LogError, Unavailable
from kernel.governance.governor import Governor, Refusal
from kernel.log.base import EventLog
from kernel.log.subjects import Address, Subjects
from kernel.protocol import MAX_COMMAND_ID, ErrorType, Receipt, decode_request, encode_error, encode_receipt
from kernel.telemetry.logging import about
from kernel.telemetry.metrics import (
    ALERTS,
    APPEND_SECONDS,
    APPENDS,
    COMMAND_SECONDS,
    COMMANDS,
    COMMANDS_PENDING,
    REFUSED,
    count_error_of,
    observe_all,
)
from kernel.telemetry.tracing import NO_TRACING, Tracer

logger = logging.getLogger("eskernel.commands")
RETRY_AFTER_S = 0.2
MOVED_RETRY_S = 0.05
"""After so long somebody else has the partition, or we have it again."""

Publish = Callable[[bytes, bytes, bytes], None]


class CommandGateway:
    """Takes requests, has actors decide them, appends, and answers. Implements the actors' `Gateway`.

    Args:
        publish: sends a payload to a subject; with a second subject, answers to it go there.
        limit: commands under way; more are refused as overloaded.
        holds: says whether this worker still holds a partition, as far as can be known without asking.
        per_aggregate: commands under way for one aggregate; more are refused for it alone.
        governor: what says how fast commands may come; as fast as they like without one.

    Attributes:
        appended, unappended: commits that the log took, and those that it could not take, since the beginning.
        slowest_append: seconds of the slowest since somebody set this to 0; a sample a turn.
    """

    def __init__(
        self,
        app: App,
        log: EventLog,
        subjects: Subjects,
        publish: Publish,
        limit: int,
        holds: Callable[[int], bool],
        per_aggregate: int = sys.maxsize,
        governor: Governor | None = None,
        tracing: Tracer = NO_TRACING,
    ) -> None:
        self._tracing = tracing
        self._app, self._log, self._subjects, self._publish, self._limit = app, log, subjects, publish, limit
        self.holds = holds
        self._per_aggregate = per_aggregate
        self._governor = governor or Governor(app)
        self.taking: set[int] = set()
        self._names = {
            declared.name: {event.cls: (event.name, event.version) for event in declared.events.values()}
            for declared in app.types.values()
        }
        self._inbox: list[tuple[bytes, bytes, bytes]] = []
        self._anywhere = subjects.commands().encode()
        self._pending = 0
        self._pending_in = [0] * subjects.partitions
        self._idle = asyncio.Event()
        self._draining = False
        self._drains = 0
        self._loop = asyncio.get_running_loop()
        self._told: list[tuple[Any, Any]] = []
        self._histories = Histories(log, self._tell)
        # since the metrics were last brought up to date: answers by aggregate, command, outcome; and their times
        self._outcomes: dict[tuple[str, str, str], int] = {}
        self._times: list[float] = []
        self._arrived = 0.0
        self.appended = self.unappended = self._counted = 0
        self.slowest_append = 0.0
        self._moment = ""
        self._begun = 0.0
        self.actors: Actors
        self.residents: Residents

    # requests

    def receive(self, subject: bytes, reply: bytes, payload: bytes, _headers: bytes | None) -> None:
        """Take a request from the connection; it is handled with all others that came at the same time."""
        if not self._inbox:
            self._loop.call_soon(self._handle_inbox)
        self._inbox.append((subject, reply, payload))

    def _handle_inbox(self) -> None:
        inbox, self._inbox = self._inbox, []
        self._arrived = time.perf_counter()
        by_address: dict[Address, list[Request]] = {}
        before = self._pending
        for subject, reply, payload in inbox:
            if self._draining:
                self._refuse(reply, "overloaded", "the service is stopping", "", RETRY_AFTER_S)
            elif self._pending >= self._limit:
                REFUSED.labels(limit="pending").inc()
                why = f"commands.pending: {self._pending} are under way in this worker"
                self._refuse(reply, "overloaded", why, "", RETRY_AFTER_S)
            else:
                try:
                    self._admit(subject, reply, payload, by_address)
                except Exception as error:  # one request must not take those beside it along
                    self.alert(f"admitting a request: {type(error).__name__}: {error}")
                    self._refuse(reply, "failed", f"{type(error).__name__}: {error}")
        if by_address and self._governor.limiting:
            by_address = self._govern(by_address)
        self._governor.taken += self._pending - before
        if by_address:
            self.deliver(by_address)

    def _admit(self, subject: bytes, reply: bytes, payload: bytes, by_address: dict[Address, list[Request]]) -> None:
        try:
            sent = decode_request(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self._refuse(reply, "malformed", f"not a command request: {error}")
            return
        if len(sent.command_id) > MAX_COMMAND_ID:
            self._refuse(reply, "malformed", f"command_id is longer than {MAX_COMMAND_ID} characters")
            return
        declared = self._app.types.get(sent.aggregate)
        if declared is None:
            known = ", ".join(sorted(self._app.types))
            self._refuse(
                reply, "unknown-aggregate", f"no aggregate {sent.aggregate!r}; there is {known}", sent.command_id
            )
            return
        command_class = declared.commands.get(sent.command)
        if command_class is None:
            known = ", ".join(sorted(declared.commands))
            problem = f"{sent.aggregate} has no command {sent.command!r}; it has {known}"
            self._refuse(reply, "unknown-command", problem, sent.command_id)
            return
        try:
            address = self._subjects.address(sent.aggregate, sent.id)
            if address.partition not in self.taking:
                self._pass_on(subject, reply, payload, address.partition, sent.command_id)
                return
            command: Any = parse(command_class, sent.data)
        except InvalidId as error:
            self._refuse(reply, "invalid-id", str(error), sent.command_id)
            return
        except InvalidMessage as error:
            self._refuse(reply, "invalid-command", str(error), sent.command_id)
            return
        if not sent.command_id:
            sent.command_id = uuid7()
        request = Request(sent, command, reply, self._arrived)
        if sent.traceparent is not None:
            request.span = self._tracing.command(sent, address)
        by_address.setdefault(address, []).append(request)
        self._pending += 1
        self._pending_in[address.partition] += 1

    def _pass_on(self, subject: bytes, reply: bytes, payload: bytes, partition: int, command_id: str) -> None:
        """A command for somebody else's partition: its sender didn't know whose, or it has just moved."""
        if subject == self._anywhere:
            # where nobody listens, the server tells the sender
            self._publish(self._subjects.commands(partition).encode(), payload, reply)
        else:
            self._refuse(reply, "unavailable", f"partition {partition} is moving", command_id, MOVED_RETRY_S)

    def _refuse(
        self, reply: bytes, type: ErrorType, message: str, command_id: str = "", retry_after: float | None = None
    ) -> None:
        answer = "", "", type
        self._outcomes[answer] = self._outcomes.get(answer, 0) + 1
        if reply:
            self._publish(reply, encode_error(type, message, command_id, retry_after), b"")

    def _govern(self, by_address: dict[Address, list[Request]]) -> dict[Address, list[Request]]:
        """Return what the limits let pass; where they don't reach for all, a few commands come before many."""
        passed = {}
        for address, requests in sorted(by_address.items(), key=lambda one: len(one[1])):
            admitted = []
            for request in requests:
                refusal = self._governor.admit(address.aggregate, address.id, request.command)
                if refusal is None:
                    admitted.append(request)
                else:
                    self._turn_away(address, request, refusal)
            if admitted:
                passed[address] = admitted
        return passed

    def _turn_away(self, address: Address, request: Request, refusal: Refusal) -> None:
        """Refuse a request that was admitted, and has not reached its actor."""
        self._done_with(address)
        REFUSED.labels(limit=refusal.limit).inc()
        if request.span is not None:
            request.span.end("overloaded", refusal.message)
        self._refuse(request.reply, "overloaded", refusal.message, request.sent.command_id, refusal.retry_after)

    def _too_many(self, resident: Resident) -> Refusal:
        address = resident.address
        why = f"{resident.commands} are under way for {address.aggregate} {address.id}"
        return Refusal("pending_per_aggregate", f"commands.pending_per_aggregate: {why}", RETRY_AFTER_S)

    def deliver(self, by_address: dict[Address, list[Request]]) -> None:
        """Give requests to the actors of their aggregates, waking those that sleep."""
        residents = self.residents.wake(by_address)
        messages = []
        for resident, requests in zip(residents, by_address.values(), strict=True):
            if (excess := resident.commands + len(requests) - self._per_aggregate) > 0:
                for request in requests[-excess:]:
                    self._turn_away(resident.address, request, self._too_many(resident))
                del requests[-excess:]
                if not requests:
                    continue
            resident.busy += len(requests)
            resident.commands += len(requests)
            messages.append((resident.actor, Decide(resident.address, requests)))
        self.actors.send(messages)

    # what the actors ask for

    def load(self, address: Address) -> None:
        self._histories.load(self._app.types[address.aggregate], address)

    def search(self, address: Address, request: Request) -> None:
        self._histories.search(address, request)

    def append(self, address: Address, cell: Cell[Any], version: int, decisions: list[Decision]) -> None:
        try:
            payload = encode(
                f"/{self._app.name}/{address.aggregate}",
                address.id,
                self._names[address.aggregate],
                decisions,
                version,
                self._now(),
            )
        except Exception as error:
            # whatever it is, a value nested too deep for instance, the actor waits for an answer
            self._tell(address, Appended(Unstorable(f"the events can't be stored: {error}")))
            return
        started = self._begun
        spans = self._tracing.appends(address, decisions)
        future = self._log.append(address.subject, cell.position, payload)

        def done(future: asyncio.Future[int]) -> None:
            error = future.exception()
            if error is None:
                if not self._told:
                    APPEND_SECONDS.observe(took := time.perf_counter() - started)
                    self.slowest_append = max(self.slowest_append, took)
                self.appended += 1
                for span in spans:
                    span.end("ok", stream_sequence=future.result())
                self._tell(address, Appended(future.result()))
                return
            if isinstance(error, Unavailable):
                self.unappended += 1
            outcome = "conflict" if isinstance(error, Conflict) else "failed"
            APPENDS.labels(outcome=outcome).inc()
            for span in spans:
                span.end(outcome, str(error))
            self._tell(address, Appended(error if isinstance(error, Exception) else LogError(str(error))))

        future.add_done_callback(done)

    def _now(self) -> str:
        """Return the moment of decision: one for all that is decided in the same turn of the loop."""
        if not self._moment:
            self._moment = timestamp()
            self._begun = time.perf_counter()
            self._loop.call_soon(self._forget_moment)
        return self._moment

    def _forget_moment(self) -> None:
        self._moment = ""

    def succeed(self, address: Address, request: Request, version: int, sequence: int, duplicate: bool) -> None:
        outcome = "duplicate" if duplicate else "ok"
        self._answered(address, request, outcome)
        if request.span is not None:
            request.span.end(outcome, version=version, stream_sequence=sequence)
        if request.reply:
            receipt = Receipt(version, sequence, address.partition, request.sent.command_id, duplicate)
            self._publish(request.reply, encode_receipt(receipt), b"")

    def fail(self, address: Address, request: Request, type: ErrorType, message: str) -> None:
        self._answered(address, request, type)
        if request.span is not None:
            request.span.end(type, message)
        if type in ("failed", "conflict"):
            self._say_failed(address, request, type, message)
        if request.reply:
            retry_after = RETRY_AFTER_S if type in ("unavailable", "overloaded") else None
            self._publish(request.reply, encode_error(type, message, request.sent.command_id, retry_after), b"")

    def _say_failed(self, address: Address, request: Request, type: ErrorType, message: str) -> None:
        sent = request.sent
        logger.warning(
            "%s %s: %s failed: %s", address.aggregate, address.id, sent.command, message,
            exc_info=request.error if type == "failed" else None,
            extra=about(
                address.aggregate, address.id, outcome=type, command=sent.command, command_id=sent.command_id,
                correlation_id=sent.correlation_id, causation_id=sent.causation_id, traceparent=sent.traceparent,
            ),
        )  # fmt: skip

    def alert(self, problem: str) -> None:
        ALERTS.inc()
        logger.error("bug in the kernel: %s", problem)

    # the rest

    def _answered(self, address: Address, request: Request, outcome: str) -> None:
        answer = address.aggregate, request.sent.command, outcome
        self._outcomes[answer] = self._outcomes.get(answer, 0) + 1
        self._times.append(time.perf_counter() - request.arrived)
        resident = self.residents.find(address.subject)
        if resident is not None:
            resident.busy -= 1
            resident.commands -= 1
        self._done_with(address)

    def _done_with(self, address: Address) -> None:
        self._pending -= 1
        self._pending_in[address.partition] -= 1
        if self._drains:
            self._idle.set()

    def _tell(self, address: Address, message: Any) -> None:
        """Send a message to a live aggregate, together with all others of this turn of the loop."""
        if not self._told:
            self._loop.call_soon(self._send_told)
        resident = self.residents.find(address.subject)
        assert resident is not None, "an aggregate with something under way is never passivated"
        self._told.append((resident.actor, message))

    def _send_told(self) -> None:
        told, self._told = self._told, []
        self.actors.send(told)

    @property
    def pending(self) -> int:
        """Commands received and not answered."""
        return self._pending

    def publish_metrics(self) -> None:
        """Bring the counters up to date; a job does it, so that a command pays nothing for them."""
        outcomes, self._outcomes = self._outcomes, {}
        for (aggregate, command, outcome), count in outcomes.items():
            COMMANDS.labels(aggregate=aggregate, command=command, outcome=outcome).inc(count)
            count_error_of(outcome, count)
        times, self._times = self._times, []
        observe_all(COMMAND_SECONDS, times)
        COMMANDS_PENDING.set(self._pending)
        APPENDS.labels(outcome="ok").inc(self.appended - self._counted)
        self._counted = self.appended

    async def drain(self, timeout: float) -> bool:
        """Take no more commands and wait for those under way; say whether all were answered in time."""
        self._draining = True
        return await self._drained(lambda: not self._pending, timeout)

    async def let_go(self, partitions: frozenset[int], timeout: float) -> bool:
        """Take no more commands for these partitions, wait for those under way, and forget their aggregates."""
        self.taking -= partitions
        drained = await self._drained(lambda: not any(self._pending_in[one] for one in partitions), timeout)
        self.forget(partitions)
        return drained

    def forget(self, partitions: frozenset[int]) -> None:
        """Take no more commands for these partitions and forget their aggregates' states: others may change them."""
        self.taking -= partitions
        leave = Leave()
        self.actors.send([(one.actor, leave) for one in self.residents.all() if one.address.partition in partitions])

    async def _drained(self, done: Callable[[], bool], timeout: float) -> bool:
        self._drains += 1
        try:
            async with asyncio.timeout(timeout):
                while not done():
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            return False
        finally:
            self._drains -= 1
        return True
