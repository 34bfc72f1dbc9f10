"""Sending commands: requests that are repeated until there is an answer, over one inbox."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import orjson

from aggregates import Rejected
from aggregates.messages import plain
from kernel.errors import CommandError, CommandTimeout, Overloaded
from kernel.protocol import Receipt, decode_answer
from kernel.transport.connection import NatsConnection, status_of
from kernel.transport.outbox import CERTAIN, Outbox

RESEND_S = 2.0
"""Without an answer for so long a command is sent again, with the same id."""
COPIES = 16
"""Earlier copies of a command whose answers are waited for: none is on its way for so many attempts."""
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


_Copies = dict[bytes, "asyncio.Future[Receipt]"]
"""Requests that were sent and given up, by token, and the answers that may yet come."""


class _Lost(ConnectionError):
    """The connection was lost while a request was under way."""


async def _find_receipt(copies: _Copies) -> Receipt | None:
    """Wait a while for the answers to earlier copies of a command; return the receipt if one has taken effect."""
    done, _ = await asyncio.wait(copies.values(), timeout=RESEND_S)
    return next((future.result() for future in done if not future.exception()), None)


class _Denied(CommandError):
    """The server does not let the user of the connection publish: to try again would not help."""


class CommandSender:
    """Sends commands in their wire form, any number at once, and waits for their answers.

    Args:
        subject_of: returns the subject of the commands for an aggregate, by its type and id.
        inbox: a subject of its own, for the answers; one below the connection's prefix otherwise.
    """

    def __init__(self, connection: NatsConnection, subject_of: Callable[[str, str], bytes], inbox: str = "") -> None:
        self._connection, self._subject_of = connection, subject_of
        self._inbox = (inbox or connection.new_inbox()).encode()
        self._outbox = Outbox(connection)
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[bytes, _Waiting] = {}
        self._late: _Copies = {}
        self._watching = False
        self._token = 0

    async def listen(self) -> Callable[[], Any]:
        """Take answers; call this once, before anything is sent. What it returns ends that."""
        stop = await self._connection.listen(f"{self._inbox.decode()}.*", self._answered)
        self._connection.reconnections.append(self._lost_connection)
        self._connection.denials.append(self._denied)
        return stop

    async def send(self, request: dict[str, Any], timeout: float = 15.0) -> Receipt:
        """Send a request in its wire form until there is an answer, and return the receipt.

        A request that is larger than the server takes is refused here, before each attempt: the server would close the
        connection, and lose what others have under way on it.

        Args:
            timeout: seconds; infinite to wait until the app takes the command.

        Raises:
            aggregates.Rejected: the aggregate refused.
            aggregates.InvalidId: the id can't be addressed.
            CommandError: anything else, with its type; `too-large`, and what JSON can't carry, before anything is
                sent.
            CommandTimeout: no answer in time.
        """
        subject = self._subject_of(request["aggregate"], request["id"])
        try:
            payload = orjson.dumps(request, default=plain)
        except TypeError as error:
            # an integer beyond 64 bits, a text that is not Unicode, an object that JSON can't represent
            raise CommandError("invalid-command", f"{request['command']} can't be sent: {error}") from None
        copies: _Copies = {}
        try:
            return await self._send(request, subject, payload, timeout, copies)
        except (Rejected, CommandError):
            # a copy that was sent before may be decided after this one, and take effect
            if copies and (receipt := await _find_receipt(copies)) is not None:
                return receipt
            raise
        finally:
            for token, answer in copies.items():
                self._late.pop(token, None)
                if answer.done():
                    answer.exception()  # what nobody asks for would be logged

    async def _send(
        self, request: dict[str, Any], subject: bytes, payload: bytes, timeout: float, copies: _Copies
    ) -> Receipt:
        deadline = self._loop.time() + timeout
        attempt = 1
        pause = 0.05
        refused = ""
        while True:
            if len(payload) > CERTAIN and not self._connection.fits(subject, payload):
                raise self._too_large(request["command"], len(payload))
            try:
                return await self._request(subject, payload, min(RESEND_S, deadline - self._loop.time()), copies)
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
                waiting.future.set_exception(_Lost("the connection was lost"))

    def _denied(self, subject: str) -> None:
        for waiting in self._waiting.values():
            if waiting.subject.decode() == subject and not waiting.future.done():
                why = f"the user of this connection may not publish to {subject}: see its permissions"
                waiting.future.set_exception(_Denied("unavailable", why))

    async def _request(self, subject: bytes, payload: bytes, timeout: float, copies: _Copies) -> Receipt:
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
        except (TimeoutError, _Lost):
            # the request may be on its way for a while yet
            copies[token] = self._late[token] = self._loop.create_future()
            if len(copies) > COPIES:
                oldest = next(iter(copies))
                del copies[oldest], self._late[oldest]
            raise
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
        token = subject[subject.rfind(b".") + 1 :]
        waiting = self._waiting.get(token)
        future = waiting.future if waiting is not None else self._late.get(token)
        if future is None or future.done():
            return
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
