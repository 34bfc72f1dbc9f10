"""One app in this process: real actors, a real projector, a log and a database in memory, and a clock to move."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from sqlalchemy import Engine, select

from kernel.actors.snapshots import NO_SNAPSHOTS
from kernel.app import App
from kernel.client import Client
from kernel.commands.admission import Admission
from kernel.commands.gateway import CommandGateway
from kernel.commands.replies import ReplyGuard
from kernel.errors import NotSettled, QueryTimeout, Unavailable
from kernel.governance.governor import Governor
from kernel.log import JetStreamLog, MemoryLog
from kernel.log.subjects import Subjects
from kernel.projector.live import Projector
from kernel.protocol import Receipt
from kernel.reactions.context import ReactorContext
from kernel.reactions.reactor import NO_PARTITIONS, PAUSED, RUNNING, Reactors
from kernel.runtime.clock import MovableClock
from kernel.settings import Settings
from kernel.testing.connection import LocalConnection
from kernel.testing.database import empty_database, reading_only
from kernel.transport.inboxes import ReplyFilter, inbox_prefix
from kernel.transport.outbox import Outbox
from kernel.transport.sender import CommandSender
from projections.checkpoints import reached
from projections.database import reads
from projections.queries import run_query
from projections.tables import dead_letter

logger = logging.getLogger("eskernel.testing")

P = ParamSpec("P")
T = TypeVar("T")
Settler = Callable[[], Awaitable[bool]]
"""Waits until a part of the app has nothing under way. Returns whether it had something."""
SPINS = 200
"""Turns of the event loop for which a wait looks again at once. Most waits are over then."""
LOOK_S = 0.001
AT_WORK = {RUNNING, NO_PARTITIONS, PAUSED}
"""States of policies and effects in which waiting for them may help, or that the test itself has brought about."""
CLOSE_S = 5.0
NAMED = 5
"""Failures that an error names one by one."""


class Inline(Executor):
    """Runs at once what threads run in a service: a test then has no threads, and one order of things."""

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function, and return its outcome."""
        done: Future[T] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


def inline(_purpose: str) -> Executor:
    """Return what runs statements on the event loop's own thread."""
    return Inline()


@dataclass(frozen=True, slots=True)
class Parts:
    """What runs in a `RunningApp`."""

    settings: Settings
    clock: MovableClock
    log: MemoryLog
    engine: Engine
    connection: LocalConnection
    gateway: CommandGateway
    admission: Admission
    projector: Projector
    reactors: Reactors


class RunningApp(Client):
    """An app that `running` has started, and a client of it.

    `execute`, `send`, `load` and `query` are those of a `Client`, with the same errors.

    Attributes:
        log: the log, a `kernel.log.MemoryLog`.
        clock: gives events their time, and handlers `context.now`. It begins at the present time, and stands still
            until it is moved with `advance`.
        settlers: what `settled` waits for, one after the other, until none of them had anything under way.
        parts: what runs.
    """

    def __init__(self, app: App, parts: Parts) -> None:
        # a client asks of the log nothing but what every log has
        log = cast(JetStreamLog, parts.log)
        super().__init__(app, parts.connection, log, parts.engine, parts.log.subjects, tracing=False)
        self.parts, self.clock = parts, parts.clock
        self.settlers: list[Settler] = [self._answered, self._projected, self._reacted]
        self._reading = reading_only(parts.engine)
        self._under_way = self._told = 0
        self._ended = False

    async def send(self, request: dict[str, Any], timeout: float = 15.0) -> Receipt:
        """Send a request in its wire form; see `execute`."""
        if self._ended:
            raise Unavailable(f"{self.app.name} has ended: execute commands within `async with running(app)`")
        self._under_way += 1
        try:
            return await super().send(request, timeout)
        finally:
            self._under_way -= 1

    async def query(
        self,
        sql: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        after: Receipt | Sequence[Receipt] | None = None,
        projections: Sequence[str] = (),
        timeout: float = 10.0,
    ) -> list[dict[str, Any]]:
        """Query the projection database; see `Client.query`."""
        if self._ended:
            raise Unavailable(f"{self.app.name} has ended: its tables were in memory")
        names = [self.app.projection(name).name for name in projections] or [p.name for p in self.app.projections]
        for receipt in [after] if isinstance(after, Receipt) else after or []:
            await self._wait_for(receipt, names, timeout)
        return run_query(self._reading, sql, parameters)

    async def _wait_for(self, receipt: Receipt, names: Sequence[str], timeout: float) -> None:
        behind = list(names)
        keyed = [declared.name for declared in self.app.projections if declared.keyed]

        def includes() -> bool:
            if not self._has_written(receipt.sequence):
                return False
            with reads(self.parts.engine).connect() as connection:
                stands = reached(connection, receipt.partition, names, keyed)
            behind[:] = [name for name in names if stands.get(name, 0) < receipt.sequence]
            return not behind

        try:
            async with asyncio.timeout(timeout):
                await _wait_until(includes)
        except TimeoutError:
            state = self.parts.projector.state
            raise QueryTimeout(
                f"waited {timeout:g} s for sequence {receipt.sequence} of partition {receipt.partition}: "
                f"{', '.join(behind)} (projection: {state})"
            ) from None

    async def settled(self, timeout: float = 10.0) -> None:
        """Wait until nothing is under way.

        Every command is answered, every event is projected, and what policies and effects owe for it is done. No timer
        is due.

        Args:
            timeout: seconds.

        Raises:
            NotSettled: since the last call, events could not be folded or reacted to; or something stands still; or the
                time is over.
        """
        try:
            async with asyncio.timeout(timeout):
                moved = True
                while moved:
                    await asyncio.sleep(0)  # tasks that were just made have not begun
                    moved = any([await settle() for settle in self.settlers])
        except TimeoutError:
            raise NotSettled(
                f"after {timeout:g} s {self._under_way} commands have no answer, and projection is at "
                f"{self.parts.projector.position}: {self.parts.projector.state}"
            ) from None
        self._tell_failures()

    async def _answered(self) -> bool:
        pending = self.parts.gateway.pending
        return await _wait_until(lambda: not self._under_way and not pending.total)

    async def _projected(self) -> bool:
        last = (await self.parts.log.info()).last

        def written() -> bool:
            projector = self.parts.projector
            if projector.trouble:
                raise NotSettled(f"projection stands still: {projector.trouble}")
            return self._has_written(last)

        return await _wait_until(written)

    async def _reacted(self) -> bool:
        reactors, turns = self.parts.reactors, 0
        while not await reactors.is_settled():
            if stuck := [each for each in reactors.report() if each["state"] not in AT_WORK]:
                why = ", ".join(f"{each['name']} is {each['state']}" for each in stuck)
                raise NotSettled(f"what reacts to events stands still: {why}")
            await _turn(turns)
            turns += 1
        return turns > 0

    def _has_written(self, sequence: int) -> bool:
        return not self.app.projections or self.parts.projector.progress.has_written(sequence)

    def _tell_failures(self) -> None:
        """Raise `NotSettled` for events that are dead letters, and of which no call has told."""
        letter = dead_letter.c
        failed = select(dead_letter).where(letter.id > self._told, letter.attempts > 0).order_by(letter.id)
        with reads(self.parts.engine).connect() as connection:
            found = connection.execute(failed).all()
        if found:
            self._told = found[-1].id
            told = [f"{row.projection}: event {row.sequence} of {row.aggregate} {row.aggregate_id}: {row.error}"
                    for row in found[:NAMED]]  # fmt: skip
            more = [f"and {len(found) - NAMED} more"] if len(found) > NAMED else []
            raise NotSettled("\n".join(["some events could not be folded, or reacted to", *told, *more]))
        if self.parts.projector.pauses.paused:
            raise NotSettled(f"projection stands still: {self.parts.projector.pauses.describe()}")

    async def close(self) -> None:
        """Answer what is under way, and take nothing any more; leaving the `async with` block does so."""
        self._ended = True
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._answered()
        except TimeoutError:
            logger.warning("%d commands were not answered in time", self._under_way)
        await self.parts.reactors.stop(CLOSE_S)
        await self.parts.admission.stop(CLOSE_S)
        await self.parts.projector.stop(CLOSE_S)


class Running(Protocol):
    """The type of the fixture `running`."""

    def __call__(
        self, app: App, settings: Settings | None = None, *, now: datetime | None = None, database: str | None = None
    ) -> AbstractAsyncContextManager[RunningApp]:
        """Run a whole app; see `kernel.testing.running`."""


async def _wait_until(condition: Callable[[], bool]) -> bool:
    """Wait until a condition holds. Return whether it did not at first."""
    turns = 0
    while not condition():
        await _turn(turns)
        turns += 1
    return turns > 0


async def _turn(number: int) -> None:
    """Give way to what is waited for, for the time of this number."""
    await asyncio.sleep(0 if number < SPINS else LOOK_S)


async def _hold() -> None:
    """Nobody else can claim the partitions."""


def _seconds(clock: MovableClock) -> float:
    """Return the Unix time, rounded up: what is due at this very microsecond is due."""
    return math.nextafter(clock.now().timestamp(), math.inf)


def _subject_of(subjects: Subjects, aggregate: str, aggregate_id: str) -> bytes:
    return subjects.commands(subjects.partition(aggregate, aggregate_id)).encode()


@asynccontextmanager
async def running(
    app: App, settings: Settings | None = None, *, now: datetime | None = None, database: str | None = None
) -> AsyncIterator[RunningApp]:
    """Run a whole app in this process, without servers, files and threads, until the block ends.

    Commands go the way that they go in a service, and so do events: through admission, actors, the projector and its
    statements, policies and effects. The log is in memory, and so is the database. Everything runs on the event loop of
    the caller.

    Args:
        settings: the defaults unless given; those of servers, data directory, snapshots and jobs have no effect.
        now: where the clock begins (UTC if it has no zone); the present time by default.
        database: URL of a database to run on, as for `projections.projected`; SQLite in memory by default.

    Raises:
        SchemaError: the database can't be used, or refuses what the app declares.
        SettingsError: the limits don't fit the app.
    """
    settings = settings or Settings()
    log = MemoryLog(settings.stream.subject_prefix or app.name, settings.stream.partitions)
    created = (await log.info()).created
    async with AsyncExitStack() as closing:
        closing.push_async_callback(log.close)
        engine = closing.enter_context(empty_database(app, database, created, log.subjects.partitions))
        yield await _start(app, settings, MovableClock(now), log, engine, closing)


async def _start(
    app: App, settings: Settings, clock: MovableClock, log: MemoryLog, engine: Engine, closing: AsyncExitStack
) -> RunningApp:
    partitions = frozenset(range(log.subjects.partitions))
    connection = LocalConnection(inbox_prefix(app.name, settings, "client"))
    closing.push_async_callback(connection.close)
    outbox, governor = Outbox(connection), Governor(app, settings.rates)
    gateway = CommandGateway(app, log, outbox, partitions.__contains__, settings.passivation, NO_SNAPSHOTS, clock=clock)
    closing.callback(gateway.close)
    guard = ReplyGuard(ReplyFilter.of(app.name, settings))
    admission = Admission(app, log.subjects, outbox, gateway, governor, settings.commands, guard)
    admission.assign(partitions)
    await connection.listen(log.subjects.commands(), admission.receive)
    await connection.listen(log.subjects.commands("*"), admission.receive)
    projector = Projector(app, log, engine, gateway.residents, gateway.holds, settings, governor.live, threads=inline)
    closing.push_async_callback(projector.close)
    projector.assign(partitions)
    sender = CommandSender(connection, partial(_subject_of, log.subjects))
    await sender.listen()
    context = ReactorContext(app, log, engine, settings, sender.send, partial(_seconds, clock), Inline())
    reactors = Reactors(context, gateway.holds)
    clock.moved.append(reactors.wake)
    parts = Parts(settings, clock, log, engine, connection, gateway, admission, projector, reactors)
    kernel = RunningApp(app, parts)
    closing.push_async_callback(kernel.close)
    await kernel._sender.listen()
    closing.push_async_callback(reactors.close)
    reactors.assign(partitions)
    reactors.start(_hold)
    if app.projections:
        projector.start(_hold)
        await _wait_until(lambda: projector.progress.begun or bool(projector.trouble))
    return kernel
