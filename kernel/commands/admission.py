"""From a request on NATS to its aggregate's actor: decoded, checked, and let in as far as the limits allow."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec

from aggregates import InvalidId, InvalidMessage
from aggregates.context import uuid7
from aggregates.messages import parse
from kernel.actors.mailbox import Decide, Request
from kernel.actors.residents import Resident
from kernel.app import App
from kernel.commands.answers import RETRY_AFTER_S
from kernel.commands.gateway import CommandGateway
from kernel.commands.replies import ReplyGuard
from kernel.governance.governor import Governor, Refusal
from kernel.log.subjects import Address, Subjects
from kernel.protocol import MAX_COMMAND_ID, CommandRequest, ErrorType, decode_request, find_oversized, origin_of
from kernel.settings import Commands
from kernel.telemetry.metrics import REFUSED
from kernel.telemetry.tracing import NO_TRACING, Tracer
from kernel.transport.outbox import Outbox

MOVED_RETRY_S = 0.05
"""After so long another worker has the partition, or this one has it again."""

SHOWN = 80
"""Characters of an unknown name that an error repeats."""

ByAddress = dict[Address, list[Request]]


class _Refused(Exception):
    """A request that cannot become a command of an aggregate."""

    def __init__(self, type: ErrorType, message: str, command_id: str = "") -> None:
        super().__init__(message)
        self.type, self.command_id = type, command_id


class Admission:
    """Takes requests from the connection and passes them to the aggregates' actors.

    All requests that came with one read of the socket are handled together.

    Args:
        governor: says how fast commands may come.
        limits: how many commands may be under way.
        guard: says to which reply subjects the service answers.

    Attributes:
        deploying: other workers run another program, which may know what this one doesn't.
    """

    def __init__(
        self,
        app: App,
        subjects: Subjects,
        outbox: Outbox,
        gateway: CommandGateway,
        governor: Governor,
        limits: Commands,
        guard: ReplyGuard,
        tracing: Tracer = NO_TRACING,
    ) -> None:
        self._app, self._subjects, self._outbox, self._gateway = app, subjects, outbox, gateway
        self._governor, self._tracing = governor, tracing
        self._pending, self._answers = gateway.pending, gateway.answers
        self._most, self._most_per_aggregate = limits.pending, limits.pending_per_aggregate
        self._guard, self._allows = guard, guard.allows
        self._anywhere = subjects.commands().encode()
        self._partitions: frozenset[int] = frozenset()
        self._stopping = self.deploying = False
        self._inbox: list[tuple[bytes, bytes, bytes]] = []
        self._arrived = 0.0
        self._loop = asyncio.get_running_loop()

    def receive(self, subject: bytes, reply: bytes, payload: bytes, _headers: bytes | None) -> None:
        """Take a request from the connection; it is handled with all others that came at the same time."""
        if reply and not self._allows(reply):
            # nobody could be told the outcome
            self._guard.refuse(subject, reply)
            return
        if not self._inbox:
            self._loop.call_soon(self._handle_inbox)
        self._inbox.append((subject, reply, payload))

    def _handle_inbox(self) -> None:
        inbox, self._inbox = self._inbox, []
        self._arrived = time.perf_counter()
        by_address: ByAddress = {}
        before = self._pending.total
        for subject, reply, payload in inbox:
            if self._stopping:
                self._refuse(reply, "overloaded", "the service is stopping", "", RETRY_AFTER_S)
            elif self._pending.total >= self._most:
                REFUSED.labels(limit="pending").inc()
                why = f"commands.pending: {self._pending.total} are under way in this worker"
                self._refuse(reply, "overloaded", why, "", RETRY_AFTER_S)
            else:
                try:
                    self._admit(subject, reply, payload, by_address)
                except _Refused as refused:
                    self._refuse(reply, refused.type, str(refused), refused.command_id)
                except Exception as error:  # one request must not take those beside it along
                    self._gateway.report_bug(f"admitting a request: {type(error).__name__}: {error}")
                    self._refuse(reply, "failed", f"{type(error).__name__}: {error}")
        if by_address and self._governor.limiting:
            by_address = self._govern(by_address)
        self._governor.taken += self._pending.total - before
        if by_address:
            self.deliver(by_address)

    # one request

    def _admit(self, subject: bytes, reply: bytes, payload: bytes, by_address: ByAddress) -> None:
        sent = self._decode(payload)
        command_class = self._find_class(sent)
        try:
            address = self._subjects.address(sent.aggregate, sent.id)
            if address.partition not in self._partitions:
                self._pass_on(subject, reply, payload, address.partition, sent.command_id)
                return
            command: Any = parse(command_class, sent.data)
        except InvalidId as error:
            raise _Refused("invalid-id", str(error), sent.command_id) from None
        except InvalidMessage as error:
            raise _Refused("invalid-command", str(error), sent.command_id) from None
        if not sent.command_id:
            sent.command_id = uuid7()
        request = Request(sent, command, reply, self._arrived)
        try:
            request.origin = origin_of(sent, self._gateway.now)
        except ValueError as error:
            raise _Refused("invalid-command", str(error), sent.command_id) from None
        if sent.traceparent is not None:
            request.span = self._tracing.command(sent, address)
        by_address.setdefault(address, []).append(request)
        self._pending.add(address.partition)

    def _decode(self, payload: bytes) -> CommandRequest:
        try:
            sent = decode_request(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            if "out of range" in str(error):  # a number of hundreds of digits
                raise _Refused("invalid-command", f"{error}; integers are from -2^63 to 2^63 - 1") from None
            raise _Refused("malformed", f"not a command request: {error}") from None
        if oversized := find_oversized(sent, payload):
            raise _Refused("invalid-command", oversized, sent.command_id[:MAX_COMMAND_ID])
        return sent

    def _find_class(self, sent: CommandRequest) -> type:
        declared = self._app.types.get(sent.aggregate)
        if declared is None:
            known = ", ".join(sorted(self._app.types))
            raise self._unknown("unknown-aggregate", f"no aggregate {sent.aggregate[:SHOWN]!r}; there is {known}", sent)
        command_class = declared.commands.get(sent.command)
        if command_class is None:
            known = ", ".join(sorted(declared.commands))
            problem = f"{sent.aggregate} has no command {sent.command[:SHOWN]!r}; it has {known}"
            raise self._unknown("unknown-command", problem, sent)
        return command_class

    def _unknown(self, kind: ErrorType, problem: str, sent: CommandRequest) -> _Refused:
        """Return the refusal of what this program doesn't know: for good, or until a deployment is over."""
        if not self.deploying:
            return _Refused(kind, problem, sent.command_id)
        return _Refused("unavailable", f"{problem}; workers of another program run beside this one", sent.command_id)

    def _pass_on(self, subject: bytes, reply: bytes, payload: bytes, partition: int, command_id: str) -> None:
        """Pass on a command for another worker's partition: its sender did not know whose, or it has just moved."""
        if subject == self._anywhere:
            # where no worker listens, the server answers the sender
            if not self._outbox.publish(self._subjects.commands(partition).encode(), payload, reply=reply):
                why = f"the request has {len(payload)} bytes; the server does not let it pass on to its partition"
                self._refuse(reply, "too-large", why, command_id)
        else:
            self._refuse(reply, "unavailable", f"partition {partition} is moving", command_id, MOVED_RETRY_S)

    def _refuse(
        self, reply: bytes, type: ErrorType, message: str, command_id: str = "", retry_after: float | None = None
    ) -> None:
        """Refuse a request that was not admitted."""
        self._answers.count_refused(type)
        self._answers.send_error(reply, type, message, command_id, retry_after)

    # limits

    def _govern(self, by_address: ByAddress) -> ByAddress:
        """Return what the limits let pass; where they do not suffice for all, a few commands come before many."""
        passed = {}
        for address, requests in sorted(by_address.items(), key=lambda item: len(item[1])):
            admitted = []
            for request in requests:
                tenant = request.origin.tenant
                refusal = self._governor.admit(address.aggregate, address.id, request.command, tenant)
                if refusal is None:
                    admitted.append(request)
                else:
                    self._turn_away(address, request, refusal)
            if admitted:
                passed[address] = admitted
        return passed

    def _turn_away(self, address: Address, request: Request, refusal: Refusal) -> None:
        """Refuse a request that was admitted, and has not reached its actor."""
        self._pending.end(address.partition)
        REFUSED.labels(limit=refusal.limit).inc()
        if request.span is not None:
            request.span.end("overloaded", refusal.message)
        self._refuse(request.reply, "overloaded", refusal.message, request.sent.command_id, refusal.retry_after)

    def _too_many(self, resident: Resident) -> Refusal:
        address = resident.address
        why = f"{resident.commands} are under way for {address.aggregate} {address.id}"
        return Refusal("pending_per_aggregate", f"commands.pending_per_aggregate: {why}", RETRY_AFTER_S)

    def deliver(self, by_address: ByAddress) -> None:
        """Give admitted requests to the actors of their aggregates, activating aggregates that are not live."""
        residents = self._gateway.residents.wake(by_address)
        messages = []
        for resident, requests in zip(residents, by_address.values(), strict=True):
            if (excess := resident.commands + len(requests) - self._most_per_aggregate) > 0:
                for request in requests[-excess:]:
                    self._turn_away(resident.address, request, self._too_many(resident))
                del requests[-excess:]
                if not requests:
                    continue
            resident.busy += len(requests)
            resident.commands += len(requests)
            messages.append((resident.actor, Decide(resident.address, requests)))
        self._gateway.actors.send(messages)

    # partitions

    def assign(self, partitions: frozenset[int]) -> None:
        """Take commands for these partitions too."""
        self._partitions |= partitions
        self._gateway.read_ahead(partitions)

    async def revoke(self, partitions: frozenset[int], timeout: float) -> bool:
        """Take no more commands for these partitions, wait for those under way, and forget their aggregates.

        Return whether all were answered within `timeout` seconds.
        """
        self._partitions -= partitions
        drained = await self._pending.drained(timeout, partitions)
        self._gateway.forget(partitions)
        return drained

    def lose(self, partitions: frozenset[int]) -> None:
        """Take no more commands for these partitions and forget their aggregates at once: they are another worker's."""
        self._partitions -= partitions
        self._gateway.forget(partitions)

    async def stop(self, timeout: float) -> bool:
        """Take no more commands at all; return whether those under way were answered within `timeout` seconds."""
        self._stopping = True
        return await self._pending.drained(timeout)

    def close(self) -> None:
        """Refuse what still comes: the actors are about to end."""
        self._stopping = True
