"""The client: commands out, receipts back, and queries that include one's own writes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

from sqlalchemy import Engine

from aggregates import Aggregate, InvalidMessage
from aggregates.aggregate import name_of
from aggregates.errors import NewerEvent
from aggregates.state_codec import decode_state
from kernel.app import App
from kernel.errors import NoDatabase, NotDeclared, NotProjected, NotReturned, QueryTimeout, Unavailable
from kernel.log import JetStreamLog, find_log
from kernel.log.history import A, LoadedAggregate, load_aggregate
from kernel.log.subjects import Subjects, subjects_of
from kernel.protocol import (
    Answered,
    CommandMessage,
    CommandOptions,
    Receipt,
    ReceiptWithEvents,
    ReceiptWithState,
    Returning,
)
from kernel.runtime.directory import worker_name
from kernel.runtime.running import find_running
from kernel.settings import Settings
from kernel.settings.sources import changed
from kernel.staleness import watch_projected
from kernel.telemetry.tracing import sender_context
from kernel.transport.connection import NatsConnection
from kernel.transport.dial import dial
from kernel.transport.importing import Outcome, send_many
from kernel.transport.jetstream_api import NOT_ENABLED, ApiError, NotPermitted
from kernel.transport.sender import CommandSender
from projections.checkpoints import reached
from projections.database import open_database
from projections.queries import run_query


class Client:
    """Talks to a running app. Use it as an async context manager, from `Client.connect`.

    Any number of commands may be under way at once: each `execute` is independent of the others.
    """

    def __init__(
        self,
        app: App,
        connection: NatsConnection,
        log: JetStreamLog | None,
        engine: Engine | None,
        subjects: Subjects,
        *,
        tracing: bool = True,
    ) -> None:
        self.app, self._log, self._subjects = app, log, subjects
        self._context = sender_context(tracing)
        self._connection, self._engine = connection, engine
        self._sender = CommandSender(connection, self._subject_of)
        self._names = {
            command: (name, declared.name)
            for declared in app.types.values()
            for name, command in declared.commands.items()
        }

    @classmethod
    async def connect(
        cls,
        app: App,
        settings: Settings | None = None,
        *,
        nats: str | None = None,
        database: str | None = None,
        data: Path | None = None,
    ) -> Self:
        """Connect to an app's service.

        Args:
            settings: how to connect. Without servers in them, the service running on the data directory is looked up,
                and connected to as it is itself.
            nats: `connection.servers`, in place of what the settings say.
            database: `database.url` likewise; needed for `query`.
            data: the service's data directory likewise.

        Raises:
            NotRunning: nothing to look up.
            ConnectionFailed: NATS does not answer.
            Unavailable: the app's stream does not exist, or the user may not subscribe to his inbox.
        """
        settings = settings or Settings()
        if nats is not None:
            settings = changed(settings, {"connection.servers": nats})
        elif settings.embedded:
            settings = find_running(data or settings.data, app.name).as_settings()
        database = database or settings.database.url
        connection = await dial(settings, app=app.name, role="client", name=f"eskernel client {app.name}")
        log = None
        try:
            log = await find_log(connection, app.name, settings, worker=f"client-{worker_name()}")
        except NotPermitted:
            if connection.explain_silence():
                await connection.close()
                raise
            # a user who only sends commands needs no JetStream: the service finds the partition
        except ApiError as error:
            if error.code != NOT_ENABLED:  # the account may import the subject of the commands from another one
                await connection.close()
                raise
        except BaseException:
            await connection.close()
            raise
        subjects = subjects_of(app.name, settings) if log is None else log.subjects
        engine = open_database(database, read_only=True, **settings.database.options()) if database else None
        client = cls(app, connection, log, engine, subjects, tracing=settings.tracing.enabled)
        await client._sender.listen()
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def connection(self) -> NatsConnection:
        """The connection."""
        return self._connection

    @property
    def log(self) -> JetStreamLog:
        """The app's log.

        Raises:
            Unavailable: the user of the connection may not use JetStream.
        """
        if self._log is None:
            raise Unavailable(
                f"the user of this connection may not read the log of {self.app.name!r}; use a connection with the "
                "permissions of an operator"
            )
        return self._log

    async def close(self) -> None:
        """Disconnect."""
        if self._log is not None:
            await self._log.close()
        await self._connection.close()
        if self._engine is not None:
            self._engine.dispose()

    @overload
    async def execute(
        self,
        aggregate: type[Aggregate],
        aggregate_id: str,
        command: object,
        *,
        returning: None = None,
        timeout: float = 15.0,
        **options: Unpack[CommandOptions],
    ) -> Receipt: ...
    @overload
    async def execute(
        self,
        aggregate: type[Aggregate],
        aggregate_id: str,
        command: object,
        *,
        returning: Literal["events"],
        timeout: float = 15.0,
        **options: Unpack[CommandOptions],
    ) -> ReceiptWithEvents: ...
    @overload
    async def execute(
        self,
        aggregate: type[A],
        aggregate_id: str,
        command: object,
        *,
        returning: Literal["state"],
        timeout: float = 15.0,
        **options: Unpack[CommandOptions],
    ) -> ReceiptWithState[A]: ...
    async def execute(
        self,
        aggregate: type[Aggregate],
        aggregate_id: str,
        command: object,
        *,
        returning: Returning | None = None,
        timeout: float = 15.0,
        **options: Unpack[CommandOptions],
    ) -> Receipt:
        """Send a command and wait until it has taken effect.

        Without an answer it is sent again with the same id until the time-out, and takes effect once.

        Args:
            returning: what the receipt shall hold: the events that the command led to, or the aggregate's state after
                it. A repeated command returns its first events, or the present state.
            timeout: seconds.
            options: what is said of the command: `command_id`, `if_version`, `actor`, `tenant`, `metadata`,
                `occurred_at`, `correlation_id`, `causation_id`, `traceparent`; see `CommandOptions`.

        Raises:
            aggregates.Rejected: the aggregate refused.
            aggregates.InvalidId: the id can't be addressed.
            VersionConflict: the aggregate has another version than `if_version`; nothing was appended.
            CommandError: anything else, with its type; `too-large`, and what JSON can't carry, before anything is
                sent.
            CommandTimeout: no answer; the command may or may not have taken effect (send it again with its id).
            NotReturned: the command took effect, and what it shall return can't be had.
        """
        message = CommandMessage(aggregate, aggregate_id, command, **options)
        if returning is None:
            return await self._execute(message, timeout)
        message.request["returning"] = returning
        return self._typed(aggregate, returning, await self._execute(message, timeout))

    async def _execute(self, message: CommandMessage, timeout: float) -> Receipt:
        request = message.request
        if "traceparent" not in request and (traceparent := self._context()) is not None:
            request["traceparent"] = traceparent
        return await self.send(request, timeout)

    def _typed(self, aggregate: type[Aggregate], returning: Returning, receipt: Receipt) -> Receipt:
        plain = receipt.version, receipt.sequence, receipt.partition, receipt.command_id, receipt.duplicate
        problem = "the service is older than this program"
        if isinstance(receipt, Answered):
            returned, problem = receipt.returned, receipt.returned.omitted
            try:
                if returning == "events" and returned.events is not None:
                    types = self.app.type_of(aggregate)
                    events = [types.stored_event(e.type).decode(e.data, e.dataversion) for e in returned.events]
                    return ReceiptWithEvents(*plain, tuple(events))
                if returned.state:
                    return ReceiptWithState(*plain, state=decode_state(aggregate, returned.state))
            except (InvalidMessage, NewerEvent, NotDeclared) as error:
                problem = str(error)
        raise NotReturned(
            f"the command {receipt.command_id} took effect, {name_of(aggregate)} has version {receipt.version}; its "
            f"{returning} can't be returned: {problem}",
            Receipt(*plain),
        )

    async def send(self, request: dict[str, Any], timeout: float = 15.0) -> Receipt:
        """Send a request in its wire form; see `execute`."""
        return await self._sender.send(request, timeout)

    def execute_many(
        self,
        commands: Iterable[CommandMessage] | AsyncIterable[CommandMessage],
        *,
        in_flight: int = 256,
        timeout: float = 60.0,
        progress: Callable[[int], None] | None = None,
        raise_errors: bool = False,
    ) -> AsyncGenerator[Outcome, None]:
        """Send many commands, as an import does, and yield what became of each, in the order of the commands.

        Those of one aggregate are sent one after the other, each when the one before it has its answer; those of
        different aggregates side by side. A command that fails ends nothing: the next ones are sent, also of its own
        aggregate, unless `raise_errors` is set. Commands are read as fast as they can be sent and their outcomes are
        taken. When the loop over the outcomes ends early, no more is sent, and what has no answer yet may or may not
        take effect.

        Args:
            in_flight: commands without an answer, at most. Up to four times as many are read ahead, or wait for the
                outcomes before theirs.
            timeout: seconds for each command.
            progress: called with the number of commands that have an outcome, at most ten times a second, and at the
                end.
            raise_errors: raise the error of a command in place of yielding it, and send no more.

        Raises:
            ValueError: `in_flight` is less than 1.
            EskernelError: with `raise_errors`, as `execute` does.
        """

        def send(message: CommandMessage) -> Awaitable[Receipt]:
            return self._execute(message, timeout)

        if in_flight < 1:
            raise ValueError(f"in_flight={in_flight}: at least one command has to be in flight")
        return send_many(send, commands, in_flight, progress, raise_errors=raise_errors)

    def _subject_of(self, aggregate: str, aggregate_id: str) -> bytes:
        address = self._subjects.address(aggregate, aggregate_id)
        return self._subjects.commands(None if self._log is None else address.partition).encode()

    async def load(
        self, aggregate: type[A], aggregate_id: str, *, at: int | datetime | None = None
    ) -> LoadedAggregate[A]:
        """Return an aggregate's state, now or in the past, folded from the log.

        Args:
            at: sequence of the last event, or a time (UTC if it has no zone).

        Raises:
            NotDeclared: the app has no such aggregate.
            aggregates.InvalidId: the id can't be addressed.
            UnreadableHistory: the program can't read the events.
            ValueError: `at` is negative.
            Unavailable: the log can't be read.
        """
        return await load_aggregate(self.log, self.app.type_of(aggregate), aggregate_id, at)

    async def query(
        self,
        sql: str,
        parameters: Mapping[str, Any] | None = None,
        *,
        after: Receipt | Sequence[Receipt] | None = None,
        projections: Sequence[str] = (),
        timeout: float = 10.0,
    ) -> list[dict[str, Any]]:
        """Query the projection database.

        Args:
            sql: one statement that only reads; parameters are written `:name`.
            after: wait until these receipts are included.
            projections: wait for these projections only; for all of the app's otherwise.

        Raises:
            QueryTimeout: the projections did not get there in time.
            NotProjected: no running program keeps a projection up to date that readers see, or it is not built yet.
            projections.QueryRefused: the text is not one statement that only reads.
            NoDatabase: the client was connected without a database.
            NotDeclared: the app has no projection of this name.
        """
        engine = self._database()
        # the database may have projections of other versions of the app, which no worker keeps up to date
        names = [self.app.projection(name).name for name in projections] or [p.name for p in self.app.projections]
        for receipt in [after] if isinstance(after, Receipt) else after or []:
            await self._include(engine, receipt, names, timeout)

        return await asyncio.to_thread(run_query, engine, sql, parameters)

    async def _include(self, engine: Engine, receipt: Receipt, names: Sequence[str], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        keyed = [declared.name for declared in self.app.projections if declared.keyed]
        pause = 0.002
        waiting: list[str] = []
        watching: asyncio.Future[NotProjected] | None = None

        def read_positions() -> dict[str, int]:
            if not names:
                return {}
            with engine.connect() as connection:
                return reached(connection, receipt.partition, names, keyed)

        try:
            while True:
                stands = await asyncio.to_thread(read_positions)
                missing = [name for name in names if name not in stands]
                behind = {name: at for name, at in stands.items() if at < receipt.sequence}
                waiting[:] = [*behind, *missing]
                if not waiting:
                    return
                if watching is None:
                    # beside the waiting: an answer of the workers may take longer than what is waited for
                    watch = watch_projected(self._connection, self._subjects, engine, waiting, deadline)
                    watching = asyncio.ensure_future(watch)
                elif watching.done():
                    raise watching.result()
                if time.monotonic() + pause > deadline:
                    where = ", ".join([f"{name} at {at}" for name, at in behind.items()]
                                      + [f"{name} is not built" for name in missing])  # fmt: skip
                    raise QueryTimeout(
                        f"waited {timeout:g} s for sequence {receipt.sequence} of partition {receipt.partition}: "
                        f"{where}"
                    )
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, 0.1)
        finally:
            if watching is not None:
                watching.cancel()

    def _database(self) -> Engine:
        if self._engine is None:
            raise NoDatabase("this client has no database; give Client.connect(..., database=URL)")
        return self._engine
