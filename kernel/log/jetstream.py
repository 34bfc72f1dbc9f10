"""The event log on NATS JetStream."""

from __future__ import annotations

import asyncio
import base64
import logging
import re
import weakref
from typing import Any

import nats.errors
import orjson

from kernel.log.appender import Appender, GroupCommit
from kernel.log.base import LogError, LogReader, Replaced, Stored, StreamInfo, StreamMismatch, Unavailable
from kernel.log.reader import JetStreamReader
from kernel.log.wire import Wire, header_of, publish_frame, status_of
from kernel.subjects import Subjects

logger = logging.getLogger("eskernel")
FORMAT = 1
_DESCRIPTION = re.compile(r"eskernel format=(\d+) partitions=(\d+)")
_NOT_FOUND, _STREAM_NOT_FOUND = 10037, 10059
_API = "$JS.API"


class ApiError(LogError):
    """JetStream's API refused; carries its error code."""

    def __init__(self, subject: str, error: dict[str, Any]) -> None:
        super().__init__(f"{subject}: {error.get('description')} ({error.get('err_code')})")
        self.code = int(error.get("err_code", 0))


async def call_api(wire: Wire, subject: str, body: object, timeout: float = 5.0) -> dict[str, Any]:
    """Ask the JetStream API.

    Raises:
        ApiError: it answered with an error.
        Unavailable: it did not answer.
    """
    try:
        message = await wire.request(f"{_API}.{subject}", orjson.dumps(body) if body else b"", timeout=timeout)
    except nats.errors.NoRespondersError:
        raise Unavailable("JetStream is not enabled on this server, or not yet ready") from None
    except (nats.errors.Error, TimeoutError, OSError) as error:
        raise Unavailable(f"JetStream API {subject.split('.', maxsplit=1)[0]}: {error or 'no answer'}") from None
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        # before Python 3.12 wait_for swallows a cancellation that comes together with the answer
        raise asyncio.CancelledError
    answer: dict[str, Any] = orjson.loads(message.data)
    if "error" in answer:
        raise ApiError(subject, answer["error"])
    return answer


def server_version(wire: Wire) -> tuple[int, int]:
    """Return the connected server's major and minor version."""
    version = wire.connected_server_version
    return version.major, version.minor


class JetStreamLog:
    """One app's stream. Made by `open_log` (which creates it) or `find_log` (which does not)."""

    def __init__(self, wire: Wire, app: str, partitions: int, group_commit: GroupCommit = "auto") -> None:
        self.subjects = Subjects(app, partitions)
        self.stream = app
        self._wire = wire
        # both came to nats-server with a version; before, the server would ignore the fields
        self._batch_get = server_version(wire) >= (2, 11)
        self.appender = Appender(wire, self.last, atomic=server_version(wire) >= (2, 12), group_commit=group_commit)
        self._gets: dict[bytes, tuple[list[Stored], asyncio.Future[int]]] = {}
        self._get_token = 0
        self._readers: weakref.WeakSet[JetStreamReader] = weakref.WeakSet()

    async def start(self) -> None:
        """Subscribe to answers."""
        await self.appender.start()
        self._inbox = self._wire.new_inbox()
        self._stop_listening = await self._wire.listen(f"{self._inbox}.*", self._got)

    @property
    def max_payload(self) -> int:
        return self.appender.max_payload

    def append(self, subject: str, expected: int, payload: bytes) -> asyncio.Future[int]:
        return self.appender.append(subject, expected, payload)

    async def last(self, subject: str) -> Stored | None:
        try:
            answer = await self._ask(f"STREAM.MSG.GET.{self.stream}", {"last_by_subj": subject})
        except ApiError as error:
            if error.code == _NOT_FOUND:
                return None
            raise
        message = answer["message"]
        return Stored(message["seq"], message["subject"], base64.b64decode(message.get("data", "")))

    async def read_subject(self, subject: str, after: int = 0) -> list[Stored]:
        if not self._batch_get:
            return await self._read_by_consumer(subject, after)
        found: list[Stored] = []
        while True:
            waiting = await self._get_batch(subject, found[-1].sequence if found else after, found)
            if not waiting:
                return found

    async def _get_batch(self, subject: str, after: int, into: list[Stored]) -> int:
        """Fetch up to 1,000 commits in one round trip; return how many are still there behind them."""
        for _attempt in range(3):
            self._get_token += 1
            token = b"%d" % self._get_token
            before = len(into)
            future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            self._gets[token] = (into, future)
            request = orjson.dumps({"seq": after + 1, "next_by_subj": subject, "batch": 1000, "max_bytes": 16 << 20})
            self._wire.send(
                publish_frame(
                    f"{_API}.DIRECT.GET.{self.stream}".encode(), b"%b.%b" % (self._inbox.encode(), token), request
                )
            )
            try:
                async with asyncio.timeout(2.0):
                    return await future
            except TimeoutError:
                del into[before:]
            finally:
                self._gets.pop(token, None)
        raise Unavailable(f"reading {subject}: no answer from the stream")

    def _got(self, subject: bytes, _reply: bytes, payload: bytes, headers: bytes | None) -> None:
        entry = self._gets.get(subject[subject.rfind(b".") + 1 :])
        if entry is None or entry[1].done():
            return
        found, future = entry
        status = status_of(headers)
        assert headers is not None
        if not status:
            sequence, stored_as = header_of(headers, b"Nats-Sequence"), header_of(headers, b"Nats-Subject")
            assert sequence is not None and stored_as is not None
            found.append(Stored(int(sequence), stored_as.decode(), payload))
        elif status == 204:
            # the count is of what is left behind this batch
            future.set_result(int(header_of(headers, b"Nats-Num-Pending") or 0))
        elif status == 404:
            future.set_result(0)
        else:
            future.set_exception(Unavailable(f"direct get answered {headers[9:60].decode(errors='replace').strip()}"))

    async def _read_by_consumer(self, subject: str, after: int) -> list[Stored]:
        last = await self.last(subject)
        if last is None or last.sequence <= after:
            return []
        reader = await self._reader(after, subject)
        try:
            found: list[Stored] = []
            while not found or found[-1].sequence < last.sequence:
                batch = await reader.next(10_000, timeout=5.0)
                if not batch.commits:
                    raise Unavailable(f"reading {subject}: no answer from the stream")
                found.extend(batch.commits)
            return found
        finally:
            await reader.close()

    async def read(self, after: int, partition: int | None = None) -> LogReader:
        return await self._reader(after, None if partition is None else self.subjects.events(partition))

    async def _reader(self, after: int, subject: str | None) -> JetStreamReader:
        reader = JetStreamReader(self._wire, self._ask, _API, self.stream, after, subject)
        self._readers.add(reader)
        return reader

    async def _ask(self, subject: str, body: object) -> dict[str, Any]:
        return await call_api(self._wire, subject, body)

    async def info(self) -> StreamInfo:
        try:
            answer = await self._ask(f"STREAM.INFO.{self.stream}", None)
        except ApiError as error:
            if error.code == _STREAM_NOT_FOUND:
                raise Replaced(f"the stream {self.stream!r} is gone from the server") from None
            raise
        state, config = answer["state"], answer["config"]
        first, last, commits = (int(state[name]) for name in ("first_seq", "last_seq", "messages"))
        if last - first + 1 > commits > 0:
            # messages are missing, the newest perhaps: nobody should wait for those
            found = await self.last(self.subjects.events())
            last = found.sequence if found is not None else 0
        return StreamInfo(
            created=str(answer["created"]),
            partitions=_partitions(config),
            first=first,
            last=last,
            commits=commits,
            durability=_durability(config),
        )

    async def close(self) -> None:
        await self.appender.close()
        for reader in list(self._readers):
            await reader.close()
        await self._stop_listening()


def _partitions(config: dict[str, Any]) -> int:
    found = _DESCRIPTION.match(config.get("description") or "")
    if found is None or int(found[1]) != FORMAT:
        raise StreamMismatch(
            f"stream {config['name']!r} exists and was not made by this version of eskernel "
            f"(its description is {config.get('description')!r}); choose another app name, or move the stream away"
        )
    return int(found[2])


def _durability(config: dict[str, Any]) -> str:
    if config.get("storage") == "memory":
        return "events are in the server's memory only and end with it"
    replicas = int(config.get("num_replicas") or 1)
    if replicas > 1:
        return f"acknowledged events are on a majority of {replicas} servers, and survive the loss of a minority"
    return (
        "acknowledged events survive a crash of the server's process; a power cut may lose as much as the server's "
        "sync_interval (2 minutes unless set; `always` loses nothing)"
    )


def _config(subjects: Subjects, wire: Wire, replicas: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "name": subjects.app,
        "description": f"eskernel format={FORMAT} partitions={subjects.partitions}",
        "subjects": [subjects.events()],
        "retention": "limits",
        "discard": "new",
        "storage": "file",
        "num_replicas": replicas,
        "allow_direct": True,
        "deny_delete": True,
        "deny_purge": True,
    }
    if server_version(wire) >= (2, 12):
        config["allow_atomic"] = True
    return config


_LOSING = ("max_age", "max_msgs_per_subject", "sealed", "mirror", "sources", "subject_transform")
OLDEST = (2, 10)
"""Oldest server that the tests run on."""


async def open_log(
    wire: Wire,
    app: str,
    *,
    partitions: int = 64,
    replicas: int = 1,
    group_commit: GroupCommit = "auto",
    create: bool = True,
) -> JetStreamLog:
    """Return the app's log, creating its stream if there is none.

    An existing stream keeps the partition count that it was made with.

    Args:
        create: make a stream where there is none.

    Raises:
        Replaced: there is none, and there should be.
        StreamMismatch: a stream of that name exists and an event store can't be built on it.
        Unavailable: the server doesn't answer, or JetStream is not enabled.
    """
    if server_version(wire) < OLDEST:
        told, least = (".".join(map(str, pair)) for pair in (server_version(wire), OLDEST))
        raise StreamMismatch(f"nats-server {told} is too old; {least} or newer is needed")
    wanted = _config(Subjects(app, partitions), wire, replicas)
    try:
        answer = await call_api(wire, f"STREAM.INFO.{app}", None)
    except ApiError as error:
        if error.code != _STREAM_NOT_FOUND:
            raise
        if not create:
            # an empty one in its place would be in the way of a restore
            raise Replaced(
                f"the stream {app!r} is gone, and the database was folded from it: restore the stream, or start with "
                "an empty database"
            ) from None
        answer = await call_api(wire, f"STREAM.CREATE.{app}", wanted)
    config = answer["config"]
    found = _partitions(config)
    # read back: older servers drop fields that they don't know without a word
    needed = ("subjects", "retention", "discard", "storage", "allow_direct")
    if different := [name for name in needed if config.get(name) != wanted[name]]:
        details = "; ".join(f"{name} is {config.get(name)!r}, needed {wanted[name]!r}" for name in different)
        raise StreamMismatch(f"stream {app!r} can't carry an event log: {details}")
    if losing := [name for name in _LOSING if config.get(name) and config[name] not in (-1, 0)]:
        details = ", ".join(f"{name} is {config[name]!r}" for name in losing)
        raise StreamMismatch(f"stream {app!r} would lose events, or is not its own: {details}")
    if int(config.get("num_replicas") or 1) < replicas:
        logger.warning(
            "the stream %s has %s replicas, not %d: `nats stream edit %s --replicas %d` changes that",
            app, config.get("num_replicas"), replicas, app, replicas,
        )  # fmt: skip
    state = answer.get("state") or {}
    if missing := int(state.get("last_seq", 0)) - int(state.get("messages", 0)):
        logger.warning("%d messages of the stream %s are missing: deleted, or lost by the server", missing, app)
    log = JetStreamLog(wire, app, found, group_commit if config.get("allow_atomic") else "never")
    await log.start()
    return log


async def find_log(wire: Wire, app: str) -> JetStreamLog:
    """Return the log of an app whose stream exists.

    Raises:
        Unavailable: there is no such stream, or the server doesn't answer.
    """
    try:
        answer = await call_api(wire, f"STREAM.INFO.{app}", None)
    except ApiError as error:
        if error.code == _STREAM_NOT_FOUND:
            raise Unavailable(f"there is no stream {app!r} on this server; has the service been started?") from None
        raise
    log = JetStreamLog(
        wire, app, _partitions(answer["config"]), "auto" if answer["config"].get("allow_atomic") else "never"
    )
    await log.start()
    return log
