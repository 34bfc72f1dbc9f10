"""The asyncio side of the actors: it loads and appends for them, and answers their senders."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from typing import Any

from aggregates.cell import Cell
from aggregates.commit import Decision, encode, timestamp
from kernel.actors.histories import Histories
from kernel.actors.mailbox import Appended, Leave, Request, Unstorable
from kernel.actors.residents import Residents
from kernel.actors.snapshots import SnapshotKeeper
from kernel.actors.system import Actors
from kernel.app import App
from kernel.commands.answers import RETRY_AFTER_S, Answers, PendingCommands
from kernel.errors import Conflict, Unavailable
from kernel.log.base import Appending, EventLog
from kernel.log.subjects import Address
from kernel.protocol import ErrorType, Receipt
from kernel.runtime.clock import SYSTEM_CLOCK, Clock
from kernel.settings import Passivation
from kernel.telemetry.logging import about
from kernel.telemetry.metrics import APPEND_SECONDS, APPENDS, BUGS
from kernel.telemetry.tracing import NO_TRACING, Tracer
from kernel.transport.outbox import Outbox

logger = logging.getLogger("eskernel.commands")


class CommandGateway:
    """Has the live aggregates of one worker decide commands. Implements the actors' `Gateway`.

    Args:
        holds: says whether this worker still holds a partition, as far as can be known without asking.
        passivation: which aggregates stay live.
        snapshots: of aggregates.
        clock: says when a command is decided.

    Attributes:
        snapshot: takes a snapshot of a cell if one is due.
        actors, residents: the actor system, and the aggregates that are live in it.
        pending: commands admitted and not answered.
        answers: where answers go.
        appended, unappended: commits that the log took, and commits that it could not take, since the start.
        slowest_append: seconds of the slowest append since this was last set to 0; a sample a turn.
    """

    def __init__(
        self,
        app: App,
        log: EventLog,
        outbox: Outbox,
        holds: Callable[[int], bool],
        passivation: Passivation,
        snapshots: SnapshotKeeper,
        tracing: Tracer = NO_TRACING,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._app, self._log, self._tracing = app, log, tracing
        self.holds, self.now = holds, clock.now
        self.actors = Actors(self)
        self.residents = Residents(self.actors, passivation.count, passivation.idle, passivation.memory)
        self.pending = PendingCommands(log.subjects.partitions)
        self.answers = Answers(outbox, self.pending)
        self.appended = self.unappended = 0
        self.slowest_append = self._longest_append = 0.0
        self._histories = Histories(log, self._send, snapshots)
        self._snapshots, self.snapshot = snapshots, snapshots.offer
        self._loop = asyncio.get_running_loop()
        self._queued: list[tuple[Any, Any]] = []
        self._counted = 0
        self._closed = False
        self._moment = ""
        self._begun = 0.0

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
                decisions,
                version,
                self._now(),
            )
        except Exception as error:
            # whatever it is, a value nested too deep for instance, the actor waits for an answer
            self._send(address, Appended(Unstorable(f"the events can't be stored: {error}")))
            return
        started = self._begun
        spans = self._tracing.appends(address, decisions)
        future = self._log.append(address.subject, cell.position, payload, cell.links)

        def done(future: Appending) -> None:
            error = future.exception()
            if error is None:
                if not self._queued:
                    APPEND_SECONDS.observe(took := time.perf_counter() - started)
                    self.slowest_append = max(self.slowest_append, took)
                    self._longest_append = max(self._longest_append, took)
                self.appended += 1
                for span in spans:
                    span.end("ok", stream_sequence=future.result())
                self._send(address, Appended(future.result(), payload))
                return
            if isinstance(error, Unavailable):
                self.unappended += 1
            outcome = "conflict" if isinstance(error, Conflict) else "failed"
            APPENDS.labels(outcome=outcome).inc()
            for span in spans:
                span.end(outcome, str(error))
            self._send(address, Appended(error))

        future.add_done_callback(done)

    def _now(self) -> str:
        """Return the moment of decision: one for all that is decided in the same turn of the loop."""
        if not self._moment:
            self._moment = timestamp(self.now())
            self._begun = time.perf_counter()
            self._loop.call_soon(self._forget_moment)
        return self._moment

    def _forget_moment(self) -> None:
        self._moment = ""

    def succeed(self, address: Address, request: Request, version: int, sequence: int, duplicate: bool) -> None:
        if duplicate and request.sent.returning == "events" and request.returned is None:

            def answer(problem: str) -> None:
                if problem:
                    self.fail(address, request, "unavailable", problem)
                else:
                    self.succeed(address, request, version, sequence, True)

            self._histories.collect_events(address, request, sequence, answer)
            return
        outcome = "duplicate" if duplicate else "ok"
        self._end(address, request, outcome)
        if request.span is not None:
            request.span.end(outcome, version=version, stream_sequence=sequence)
        if request.reply:
            receipt = Receipt(version, sequence, address.partition, request.sent.command_id, duplicate)
            self.answers.send_receipt(request.reply, receipt, request.returned)

    def refuse_version(self, address: Address, request: Request, version: int) -> None:
        message = f"{address.aggregate} {address.id} has version {version}, and not {request.sent.if_version}"
        self._end(address, request, "conflict")
        if request.span is not None:
            request.span.end("conflict", message)
        self.answers.send_error(request.reply, "conflict", message, request.sent.command_id, version=version)

    def fail(self, address: Address, request: Request, type: ErrorType, message: str) -> None:
        self._end(address, request, type)
        if request.span is not None:
            request.span.end(type, message)
        if type in ("failed", "invalid-event", "conflict"):
            self._log_failure(address, request, type, message)
        retry_after = RETRY_AFTER_S if type in ("unavailable", "overloaded") else None
        self.answers.send_error(request.reply, type, message, request.sent.command_id, retry_after)

    def report_bug(self, problem: str) -> None:
        BUGS.inc()
        logger.error("bug in the kernel: %s", problem)

    def _end(self, address: Address, request: Request, outcome: str) -> None:
        self.answers.count_answered(address.aggregate, request.sent.command, outcome, request.arrived)
        resident = self.residents.find(address.subject)
        if resident is not None:
            resident.busy -= 1
            resident.commands -= 1
        self.pending.end(address.partition)

    def _log_failure(self, address: Address, request: Request, type: ErrorType, message: str) -> None:
        sent = request.sent
        logger.warning(
            "%s %s: %s failed: %s", address.aggregate, address.id, sent.command, message,
            exc_info=request.error if type == "failed" else None,
            extra=about(
                address.aggregate, address.id, outcome=type, command=sent.command, command_id=sent.command_id,
                correlation_id=sent.correlation_id, causation_id=sent.causation_id, traceparent=sent.traceparent,
                actor=sent.actor, tenant=sent.tenant,
            ),
        )  # fmt: skip

    # what the actors are sent

    def _send(self, address: Address, message: object) -> None:
        """Send a message to a live aggregate, together with all others of this turn of the loop."""
        if not self._queued:
            self._loop.call_soon(self._send_queued)
        resident = self.residents.find(address.subject)
        assert resident is not None, "an aggregate with something under way is never passivated"
        self._queued.append((resident.actor, message))

    def _send_queued(self) -> None:
        queued, self._queued = self._queued, []
        if not self._closed:
            self.actors.send(queued)

    def measure_load(self) -> tuple[int, float]:
        """Return the commands under way, and the seconds of the slowest append since the last call."""
        longest, self._longest_append = self._longest_append, 0.0
        return self.pending.total, longest

    def read_ahead(self, partitions: frozenset[int]) -> None:
        """Read what aggregates of partitions that were taken will be loaded from."""
        self._histories.ahead.begin(partitions)

    async def stop_reading(self) -> None:
        """Read nothing ahead any more."""
        await self._histories.ahead.stop()

    def forget(self, partitions: Collection[int]) -> None:
        """Forget the states of these partitions' aggregates: other workers may change them."""
        if self._closed:
            return
        self._histories.ahead.forget(partitions)
        self._snapshots.forget()
        leave = Leave()
        self.actors.send(
            [(resident.actor, leave) for resident in self.residents.all() if resident.address.partition in partitions]
        )

    def publish_metrics(self) -> None:
        """Bring the counters up to date; a job does it, so that a command pays nothing for them."""
        self.answers.publish_metrics()
        APPENDS.labels(outcome="ok").inc(self.appended - self._counted)
        self._counted = self.appended

    def close(self) -> None:
        """Shut the actor system down. What still comes for its actors is dropped."""
        self._closed = True
        self._histories.ahead.close()
        self._snapshots.forget()
        self.actors.close()
