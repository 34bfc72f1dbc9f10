"""Single messages of a stream, asked for with JetStream's Direct Get, many at once and without consumers."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec
import orjson

from kernel.errors import Unavailable
from kernel.log.base import Stored
from kernel.log.window import Window
from kernel.transport.connection import NatsConnection, header_of, publish_frame, status_of
from kernel.transport.jetstream_api import NO_MESSAGE, NO_STREAM

BEFORE = b"Eskernel-Before"
"""Header of a commit: how far each commit before it is from the next one, in stream sequences, beginning with the
distance between the expected commit and the one before that."""
_SEQUENCE = b"\r\nNats-Sequence: "
_EXPECTED = b"Nats-Expected-Last-Subject-Sequence"
MAX_BATCH, MAX_BATCH_BYTES = 1_000, 16 << 20
SEARCH_COST = 64
"""A search is counted as so many messages: most of them cost the server more, and it says so by its time."""
ATTEMPTS = 2
"""How often something is asked for that gets no answer."""


class Link(NamedTuple):
    """A commit with its headers, which say where the commits of its subject before it are."""

    stored: Stored
    headers: bytes

    def before(self) -> tuple[int, ...] | None:
        """Return the stream sequences of the commits before it, the nearest first.

        It is None if the commit does not say so, and empty if there are none.
        """
        expected = header_of(self.headers, _EXPECTED)
        if expected is None or not expected.isdigit():
            return None
        place = int(expected)
        if not place:
            return ()
        if place >= self.stored.sequence:
            return None  # of the stream that this one was copied from
        before = [place]
        for distance in (header_of(self.headers, BEFORE) or b"").split():
            place -= int(distance) if distance.isdigit() else place
            if not 0 < place < before[-1]:
                return None
            before.append(place)
        return tuple(before)


class _Lost(Exception):
    """The connection was lost before a request was answered."""


class _Wanted(Protocol):
    """What is waited for. Each answer is given to `take`, which ends the future after the last one."""

    future: asyncio.Future[Any]

    def take(self, payload: bytes, headers: bytes | None) -> None: ...


W = TypeVar("W", bound=_Wanted)


class _Links:
    """Commits of a subject that were asked for by their sequences; None if one is not there, or is another one's."""

    def __init__(self, subject: str, count: int) -> None:
        self.future: asyncio.Future[list[Link] | None] = asyncio.get_running_loop().create_future()
        self._count, self._found = count, list[Link]()
        self._subject, self._line = subject, b"\r\nNats-Subject: %b\r\n" % subject.encode()

    def take(self, payload: bytes, headers: bytes | None) -> None:
        status = status_of(headers)
        if status == 404:
            self.future.set_result(None)
        elif status or headers is None:
            self.future.set_exception(_unexpected(headers))
        elif self._line not in headers:
            self.future.set_result(None)
        else:
            self._found.append(Link(Stored(_sequence_of(headers), self._subject, payload), headers))
            if len(self._found) == self._count:
                self.future.set_result(self._found)


class _Batch:
    """Commits of one subject in order; the future gets how many are left behind them."""

    def __init__(self, subject: str) -> None:
        self.future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.found: list[Stored] = []
        self._subject = subject

    def take(self, payload: bytes, headers: bytes | None) -> None:
        status = status_of(headers)
        if status == 204:
            self.future.set_result(int(header_of(headers or b"", b"Nats-Num-Pending") or 0))
        elif status == 404:
            self.future.set_result(0)
        elif status or headers is None:
            self.future.set_exception(_unexpected(headers))
        else:
            self.found.append(Stored(_sequence_of(headers), self._subject, payload))


class _Message(msgspec.Struct):
    seq: int
    subject: str
    data: str = ""
    hdrs: str = ""


class _Error(msgspec.Struct):
    err_code: int = 0
    description: str = ""


class _Answer(msgspec.Struct):
    message: _Message | None = None
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Answer).decode


class _Last:
    """A subject's last commit, from the stream's leader."""

    def __init__(self) -> None:
        self.future: asyncio.Future[Link | None] = asyncio.get_running_loop().create_future()

    def take(self, payload: bytes, headers: bytes | None) -> None:
        if status_of(headers):
            self.future.set_exception(_unexpected(headers))
            return
        answer = _decode(payload)
        if (message := answer.message) is not None:
            stored = Stored(message.seq, message.subject, base64.b64decode(message.data))
            self.future.set_result(Link(stored, base64.b64decode(message.hdrs)))
        elif answer.error is not None and answer.error.err_code == NO_MESSAGE:
            self.future.set_result(None)
        else:
            why = answer.error or _Error()
            gone = "; the stream is gone" if why.err_code == NO_STREAM else ""
            self.future.set_exception(Unavailable(f"the log can't be read: {why.description}{gone}"))


class DirectGets:
    """Requests for messages of one stream, and their answers. Any number may be under way."""

    def __init__(self, connection: NatsConnection, stream: str) -> None:
        self._connection = connection
        self._direct = f"{connection.api}.DIRECT.GET.{stream}".encode()
        self._leader = f"{connection.api}.STREAM.MSG.GET.{stream}".encode()
        self._wanted: dict[bytes, _Wanted] = {}
        self._token = 0
        self._window = Window()

    async def start(self) -> None:
        """Subscribe to answers."""
        inbox = self._connection.new_inbox()
        self._inbox = inbox.encode()
        self._stop_listening = await self._connection.listen(f"{inbox}.*", self._answered)
        self._connection.reconnections.append(self._lost_connection)

    async def close(self) -> None:
        """Take no more answers."""
        if self._lost_connection in self._connection.reconnections:
            self._connection.reconnections.remove(self._lost_connection)
        await self._stop_listening()

    async def last(self, subject: str) -> Link | None:
        """Return a subject's last commit, as the stream's leader has it, or None.

        Raises:
            Unavailable: the leader did not answer, or refused.
        """
        request = orjson.dumps({"last_by_subj": subject})
        wanted = await self._ask(self._leader, [request], _Last, subject)
        return wanted.future.result()

    async def by_sequence(self, subject: str, sequences: Sequence[int]) -> list[Link] | None:
        """Return commits of a subject by their sequences, in any order; None if one is missing, or not the subject's.

        A replica that answers may not have a new commit yet.

        Raises:
            Unavailable: there was no answer.
        """
        requests = [b'{"seq":%d}' % sequence for sequence in sequences]
        wanted = await self._ask(self._direct, requests, lambda: _Links(subject, len(requests)), subject)
        return wanted.future.result()

    async def newest(self, subject: str) -> Stored | None:
        """Return a subject's last message as some replica has it, or None.

        Raises:
            Unavailable: there was no answer.
        """
        request = orjson.dumps({"last_by_subj": subject})
        wanted = await self._ask(self._direct, [request], lambda: _Links(subject, 1), subject)
        links = wanted.future.result()
        return links[0].stored if links else None

    async def batch(self, subject: str, after: int) -> tuple[list[Stored], int]:
        """Return up to 1,000 commits of a subject, and how many are left behind them. It is a search for the server.

        Raises:
            Unavailable: there was no answer.
        """
        request = orjson.dumps(
            {"seq": after + 1, "next_by_subj": subject, "batch": MAX_BATCH, "max_bytes": MAX_BATCH_BYTES}
        )
        wanted = await self._ask(self._direct, [request], lambda: _Batch(subject), subject, SEARCH_COST)
        return wanted.found, wanted.future.result()

    async def _ask(
        self, api: bytes, requests: Sequence[bytes], make: Callable[[], W], subject: str, cost: int = 0
    ) -> W:
        """Send requests, once more if there is no answer, and return what was waited for, ended.

        Args:
            cost: in messages, by default as many as there are requests.
        """
        attempts = 0
        while attempts < ATTEMPTS:
            self._token += 1
            token = b"%d" % self._token
            reply = b"%b.%b" % (self._inbox, token)
            async with self._window.room(cost or len(requests)):
                wanted = self._wanted[token] = make()
                self._connection.send(b"".join(publish_frame(api, request, reply=reply) for request in requests))
                try:
                    async with asyncio.timeout(self._connection.request_timeout):
                        await wanted.future
                except TimeoutError:
                    attempts += 1
                except _Lost:
                    pass
                else:
                    return wanted
                finally:
                    del self._wanted[token]
        raise Unavailable(f"reading {subject}: no answer from the stream")

    def _lost_connection(self) -> None:
        """After a reconnect: answers to what was asked before will not come."""
        for wanted in self._wanted.values():
            if not wanted.future.done():
                wanted.future.set_exception(_Lost())

    def _answered(self, subject: bytes, _reply: bytes, payload: bytes, headers: bytes | None) -> None:
        wanted = self._wanted.get(subject[subject.rfind(b".") + 1 :])
        if wanted is not None and not wanted.future.done():
            wanted.take(payload, headers)


def _unexpected(headers: bytes | None) -> Unavailable:
    status = (headers or b"")[9:60].decode(errors="replace").strip()
    return Unavailable(f"the log can't be read: the server answered {status or 'without a status'}")


def _sequence_of(headers: bytes) -> int:
    start = headers.find(_SEQUENCE) + len(_SEQUENCE)
    return int(headers[start : headers.find(b"\r", start)])
