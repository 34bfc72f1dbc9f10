"""The client: commands out, receipts back, and queries that include one's own writes."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec
import orjson
from sqlalchemy import Engine

from aggregates import Aggregate
from aggregates.aggregate import name_of
from aggregates.context import uuid7
from aggregates.messages import plain, spec_of
from kernel.app import App
from kernel.errors import (
    CommandError,
    CommandTimeout,
    NoDatabase,
    NotProjected,
    Overloaded,
    QueryTimeout,
    Unavailable,
)
from kernel.log import JetStreamLog, find_log
from kernel.log.history import A, LoadedAggregate, load_aggregate
from kernel.log.subjects import Subjects, subjects_of
from kernel.protocol import Receipt, decode_answer
from kernel.runtime.directory import worker_name
from kernel.runtime.running import find_running
from kernel.settings import Settings
from kernel.settings.sources import changed
from kernel.staleness import watch_projected
from kernel.telemetry.tracing import sender_context
from kernel.transport.connection import NatsConnection, status_of
from kernel.transport.dial import dial
from kernel.transport.jetstream_api import NOT_ENABLED, ApiError, NotPermitted
from kernel.transport.outbox import CERTAIN, Outbox
from projections.checkpoints import reached
from projections.database import open_database
from projections.queries import run_query

RESEND_S = 2.0
"""Without an answer for so long a command is sent again, with the same id."""
JITTER = 0.25
"""Share of the time to retry after that is added to it at random: clients refused together must not return together."""


class _Waiting(NamedTuple):
    """A request that has no answer yet.

    Attributes:
        until: when it is given up, by the event loop's clock; infinite if it has a timer of its own.
    """

    future: asyncio.Future[Receipt]
    subject: bytes
    until: float


def _expire(future: asyncio.Future[Receipt]) -> None:
    if not future.done():
        future.set_exception(TimeoutError())


class _Denied(CommandError):
    """The server does not let the client's user publish: to try again would not help."""


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
        self._waiting: dict[bytes, _Waiting] = {}
        self._watching = False
        self._token = 0
        self._inbox = connection.new_inbox().encode()
        self._outbox = Outbox(connection)
        self._loop = asyncio.get_running_loop()
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
        await connection.listen(f"{client._inbox.decode()}.*", client._answered)
        connection.reconnections.append(client._lost_connection)
        connection.denials.append(client._denied)
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

    async def execute(
        self,
        aggregate: type[Aggregate],
        aggregate_id: str,
        command: object,
        *,
        command_id: str | None = None,
        correlation_id: str | None = None,
        causation_id: str | None = None,
        traceparent: str | None = None,
        timeout: float = 15.0,
    ) -> Receipt:
        """Send a command and wait until it has taken effect.

        Without an answer it is sent again with the same id until the time-out, and takes effect once.

        Args:
            command_id: give one to repeat a command across clients or restarts; a new UUIDv7 otherwise.
            traceparent: W3C trace context that the command belongs to; the OpenTelemetry span that the caller is in,
                if there is one, otherwise.
            timeout: seconds.

        Raises:
            aggregates.Rejected: the aggregate refused.
            aggregates.InvalidId: the id can't be addressed.
            CommandError: anything else, with its type; `too-large`, and what JSON can't carry, before anything is
                sent.
            CommandTimeout: no answer; the command may or may not have taken effect (send it again with its id).
        """
        spec = spec_of(type(command))
        if spec is None or spec.kind != "command":
            raise TypeError(f"{command!r} is not a command; mark its class with @command")
        return await self.send(
            {
                "aggregate": name_of(aggregate),
                "id": aggregate_id,
                "command": spec.name,
                "data": command,
                "command_id": command_id or uuid7(),
                "correlation_id": correlation_id,
                "causation_id": causation_id,
                "traceparent": traceparent or self._context(),
            },
            timeout,
        )

    async def send(self, request: dict[str, Any], timeout: float = 15.0) -> Receipt:
        """Send a request in its wire form; see `execute`.

        A request that is larger than the server takes is refused here, before each attempt: the server would close the
        connection, and lose what others have under way on it.
        """
        address = self._subjects.address(request["aggregate"], request["id"])
        subject = self._subjects.commands(None if self._log is None else address.partition).encode()
        try:
            payload = orjson.dumps(request, default=plain)
        except TypeError as error:
            # an integer beyond 64 bits, a text that is not Unicode, an object that JSON can't represent
            raise CommandError("invalid-command", f"{request['command']} can't be sent: {error}") from None
        deadline = self._loop.time() + timeout
        attempt = 1
        pause = 0.05
        refused = ""
        while True:
            if len(payload) > CERTAIN and not self._connection.fits(subject, payload):
                raise self._too_large(request["command"], len(payload))
            try:
                return await self._request(subject, payload, min(RESEND_S, deadline - self._loop.time()))
            except (TimeoutError, ConnectionError, Overloaded) as error:
                if isinstance(error, Overloaded):
                    pause = (error.retry_after or pause) * random.uniform(1.0, 1.0 + JITTER)
                if self._loop.time() + pause >= deadline:
                    if isinstance(error, Overloaded):
                        raise
                    raise CommandTimeout(
                        f"no answer to {request['command']} for {request['aggregate']} {request['id']} within "
                        f"{timeout:g} s ({attempt} attempts); its id is {request['command_id']}{refused}"
                    ) from None
                if not isinstance(error, TimeoutError):
                    await asyncio.sleep(pause)
                    pause = min(pause * 1.5, 1.0)
            except CommandError as error:
                passes = error.type in ("unavailable", "unknown-outcome") and not isinstance(error, _Denied)
                if not passes or self._loop.time() + pause >= deadline:
                    raise
                refused = f"; an attempt before the last one was refused: {error}"
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, 1.0)
            attempt += 1

    def _too_large(self, command: str, size: int) -> CommandError:
        most = self._connection.max_payload
        return CommandError(
            "too-large", f"the request {command} has {size} bytes; the server takes {most} (max_payload)"
        )

    def _lost_connection(self) -> None:
        """After a reconnect: what was under way is sent again, unless this server takes less and refuses it."""
        for waiting in self._waiting.values():
            if not waiting.future.done():
                waiting.future.set_exception(ConnectionError("the connection was lost"))

    def _denied(self, subject: str) -> None:
        for waiting in self._waiting.values():
            if waiting.subject.decode() == subject and not waiting.future.done():
                why = f"the user of this connection may not publish to {subject}: see its permissions"
                waiting.future.set_exception(_Denied("unavailable", why))

    async def _request(self, subject: bytes, payload: bytes, timeout: float) -> Receipt:
        self._token += 1
        token = b"%d" % self._token
        future: asyncio.Future[Receipt] = self._loop.create_future()
        handle: asyncio.TimerHandle | None = None
        until = math.inf
        if timeout < RESEND_S:
            handle = self._loop.call_later(max(timeout, 0.001), _expire, future)
        else:
            # one timer for all of them: most commands are answered long before
            until = self._loop.time() + RESEND_S
            if not self._watching:
                self._watching = True
                self._loop.call_at(until, self._expire_oldest)
        self._waiting[token] = _Waiting(future, subject, until)
        self._outbox.publish(subject, payload, reply=b"%b.%b" % (self._inbox, token))
        try:
            return await future
        finally:
            if handle is not None:
                handle.cancel()
            self._waiting.pop(token, None)

    def _expire_oldest(self) -> None:
        """Give up the requests whose time is over, and look again when the next one's will be."""
        now = self._loop.time()
        for waiting in self._waiting.values():
            if waiting.until <= now:
                _expire(waiting.future)
            elif waiting.until < math.inf:
                self._loop.call_at(waiting.until, self._expire_oldest)
                return
        self._watching = False

    def _answered(self, subject: bytes, _reply: bytes, payload: bytes, headers: bytes | None) -> None:
        waiting = self._waiting.get(subject[subject.rfind(b".") + 1 :])
        if waiting is None or waiting.future.done():
            return
        future = waiting.future
        if status_of(headers) == 503:
            future.set_exception(ConnectionError("no worker accepts commands for this app at the moment"))
            return
        try:
            receipt = decode_answer(payload)
        except msgspec.MsgspecError as error:
            future.set_exception(CommandError("malformed", f"the service's answer cannot be decoded: {error}"))
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(receipt)

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
        pause = 0.002
        waiting: list[str] = []
        watching: asyncio.Future[NotProjected] | None = None

        def read_positions() -> dict[str, int]:
            if not names:
                return {}
            with engine.connect() as connection:
                return reached(connection, receipt.partition, names)

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
