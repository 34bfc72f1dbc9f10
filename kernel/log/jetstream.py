"""The event log on NATS JetStream."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from kernel.errors import LogError, Replaced, StreamMismatch, Unavailable
from kernel.log.appender import Appender, trust
from kernel.log.base import Appending, Count, LogReader, Stored, StreamInfo
from kernel.log.certainty import RESTORE, digest_of, gone, make_sure, patience
from kernel.log.chain import follow
from kernel.log.direct_get import DirectGets, Link
from kernel.log.reader import JetStreamReader, gentle_reader
from kernel.log.subjects import Subjects
from kernel.settings import Consumer, Settings
from kernel.transport.connection import NatsConnection
from kernel.transport.jetstream_api import NO_MESSAGE, NO_STREAM, ApiError, call_api, last_message, server_version

logger = logging.getLogger("eskernel.log")
FORMAT = 1
BEHIND_S = 0.05
"""Seconds between two questions to a replica that is behind its leader."""
FEW_SUBJECTS = 10_000
"""A server lists and sorts so many subjects in a few milliseconds."""
_DESCRIPTION = re.compile(r"eskernel format=(\d+) partitions=(\d+)")


class JetStreamLog:
    """One app's stream. Made by `open_log` (which looks after the stream) or `find_log` (which does not).

    Args:
        stream: what the server says about the stream: its configuration, and when it was created.
        worker: for the names of consumers.
        on_replaced: called with the reason where the stream turns out to be another one. Without it the log is for
            reading, and is not compared after a reconnect.

    Attributes:
        created: when the stream was created, as its leader said last.
        patience: for how many seconds a doubt about the stream must last before it is believed.
        consumers: how many consumers its readers have created.
    """

    def __init__(
        self,
        connection: NatsConnection,
        subjects: Subjects,
        stream: dict[str, Any],
        settings: Settings,
        worker: str = "",
        on_replaced: Callable[[str], None] | None = None,
    ) -> None:
        config = stream["config"]
        self.subjects = subjects
        self.stream: str = config["name"]
        self.created = str(stream["created"])
        self._mark = (0, "")
        self._looking: asyncio.Future[StreamInfo] | None = None
        self.patience = patience(int(config.get("num_replicas") or 1))
        self._on_replaced = on_replaced
        self._acknowledged = 0
        self._obstacle = ("", 0)
        self.consumers = 0
        self._connection = connection
        self._live = settings.consumer
        # a rebuild acknowledges nothing, and reads as fast as it can
        self._plain = settings.consumer.model_copy(
            update={"ack_policy": "none", "max_ack_pending": 0, "replay_policy": "instant"}
        )
        self._worker = worker or secrets.token_hex(4)
        self._checked = settings.stream.existing != "skip"
        self._may_lose = settings.stream.may_lose_events
        jetstream = settings.jetstream
        self._direct = bool(config.get("allow_direct"))
        # both came to nats-server with a version; before, the server would ignore the fields
        self._batch_get = self._direct and server_version(connection) >= (2, 11)
        self.appender = Appender(
            connection,
            self.last,
            verify=self.verify if on_replaced is not None else trust,
            atomic=bool(config.get("allow_atomic")) and server_version(connection) >= (2, 12),
            group_commit=jetstream.group_commit,
            timeout=jetstream.publish_timeout,
            deadline=jetstream.publish_deadline,
            max_in_flight=jetstream.max_in_flight,
        )
        self._gets = DirectGets(connection, self.stream)
        self._readers: weakref.WeakSet[JetStreamReader] = weakref.WeakSet()

    async def start(self) -> None:
        """Subscribe to answers."""
        await self.appender.start()
        await self._gets.start()

    @property
    def max_payload(self) -> int:
        return self.appender.max_payload

    def append(self, subject: str, expected: int, payload: bytes, links: bytes = b"") -> Appending:
        return self.appender.append(subject, expected, payload, links)

    async def last(self, subject: str) -> Stored | None:
        found = await last_message(self._connection, self.stream, subject)
        return None if found is None else Stored(*found)

    async def read_subject(self, subject: str, after: int = 0, known: Sequence[Stored] = ()) -> list[Stored]:
        last = await self._gets.last(subject)
        if last is None or last.stored.sequence <= after:
            return []
        if known and known[-1].sequence < last.stored.sequence:
            return [*known, *await self._read_back(subject, last, known[-1].sequence)]
        if known and known[-1] == last.stored:
            return list(known)
        return await self._read_back(subject, last, after)

    async def _read_back(self, subject: str, last: Link, after: int) -> list[Stored]:
        found, below = [last.stored], last.stored.sequence
        if self._direct:
            found, below = await follow(self._gets, subject, last, after)
        if below:
            found = await self._search(subject, after, below) + found
        return found

    async def _search(self, subject: str, after: int, below: int) -> list[Stored]:
        """Return the subject's commits between two stream sequences, of which the second is a commit of its."""
        if not self._batch_get:
            return await self._read_by_consumer(subject, after, below)
        found: list[Stored] = []
        give_up = time.monotonic() + self._connection.request_timeout
        while True:
            batch, waiting = await self._gets.batch(subject, found[-1].sequence if found else after)
            found += batch
            if found and found[-1].sequence >= below:
                return [stored for stored in found if stored.sequence < below]
            if not waiting:  # a replica answered that is behind the leader
                if time.monotonic() > give_up:
                    raise Unavailable(f"reading {subject}: the server's replica is behind its leader")
                await asyncio.sleep(BEHIND_S)

    async def _read_by_consumer(self, subject: str, after: int, below: int) -> list[Stored]:
        reader = await self._reader(after, subject, self._plain)
        try:
            found: list[Stored] = []
            while not found or found[-1].sequence < below:
                batch = await reader.next(10_000, timeout=self._connection.request_timeout)
                if not batch.commits:
                    raise Unavailable(f"reading {subject}: no answer from the stream")
                found.extend(batch.commits)
            return [stored for stored in found if stored.sequence < below]
        finally:
            await reader.close()

    async def read(
        self, after: int, partition: int | None = None, *, live: bool = False, gentle: bool = False
    ) -> LogReader:
        subject = None if partition is None else self.subjects.events(partition)
        settings = self._live if live else self._plain
        return await self._reader(after, subject, gentle_reader(settings) if gentle else settings)

    async def _reader(self, after: int, subject: str | None, settings: Consumer) -> JetStreamReader:
        reader = JetStreamReader(
            self._connection, self._call, self.stream, after, subject, settings, self._worker, self._note_acknowledged,
            self._note_consumer,
        )  # fmt: skip
        self._readers.add(reader)
        return reader

    async def _call(self, subject: str, body: object) -> dict[str, Any]:
        try:
            return await call_api(self._connection, subject, body)
        except ApiError as error:
            if error.code == NO_STREAM and self._on_replaced is not None:
                self._suspect()
            raise

    def _suspect(self) -> None:
        """Have the stream looked at now, and not only when its next check is due."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(self.verify())
            self._looking.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def info(self) -> StreamInfo:
        try:
            answer = await self._call(f"STREAM.INFO.{self.stream}", None)
        except ApiError as error:
            if error.code == NO_STREAM:
                raise gone(f"the stream {self.stream!r} is gone from the server") from None
            raise
        state, config = answer["state"], answer["config"]
        self._obstacle = find_obstacle(config, state, self.subjects.events()), self.appender.acknowledged
        first, last, commits = (int(state[name]) for name in ("first_seq", "last_seq", "messages"))
        if self._checked:
            check_keeps_everything(config, self._may_lose)
        if last - first + 1 > commits or (last and not commits):
            # messages are missing, perhaps the newest: a projection must not wait for them
            found = await self.last(self.subjects.events()) if commits else None
            last = found.sequence if found is not None else 0
        return StreamInfo(
            created=str(answer["created"]),
            partitions=partitions_of(config),
            first=first,
            last=last,
            commits=commits,
            durability=_durability(config),
        )

    def _note_consumer(self) -> None:
        self.consumers += 1

    @property
    def obstacle(self) -> str:
        """Why the stream can take no commits, as it was when last asked about; empty if it can, or has since."""
        found, acknowledged = self._obstacle
        return found if self.appender.acknowledged == acknowledged else ""

    async def explain_silence(self) -> str:
        """Return why the readers get nothing, as far as the server says it; empty if it does not."""
        for reader in list(self._readers):
            if reader.trouble:
                return f"the server ends the consumer: {reader.trouble}"
            if not reader.consumer:
                continue
            try:
                found = await self._call(f"CONSUMER.INFO.{self.stream}.{reader.consumer}", None)
            except LogError as error:
                return f"the consumer {reader.consumer}: {error}"
            if found.get("paused"):
                until = found["config"].get("pause_until", "")
                return f"the consumer {reader.consumer} is paused until {until}; resume it (nats consumer resume)"
        return f"the last error of the connection: {self._connection.trouble}" if self._connection.trouble else ""

    async def explain_refusal(self) -> str:
        """Return why the server takes no commits, as far as stream and account say it; empty if they do not."""
        if self.obstacle:
            return self.obstacle
        try:
            account = await self._call("INFO", None)
        except LogError:
            return ""
        most, used = account.get("limits", {}).get("max_storage", -1), account.get("storage", 0)
        if most >= 0 and used + OVERHEAD > most:
            return f"the account's storage is full: {used} of {most} bytes"
        return ""

    async def count_commits(self, known: Collection[str]) -> dict[str, Count]:
        # for a filter that many subjects match, the server lists and sorts all of them for each page
        counted: Counter[str] = Counter()
        aggregates: Counter[str] = Counter()
        state = (await self._call(f"STREAM.INFO.{self.stream}", None))["state"]
        small = state.get("num_subjects", 0) <= FEW_SUBJECTS
        for partition in [None] if small else range(self.subjects.partitions):
            listed, total = 0, 1
            while listed < total:
                request = {"subjects_filter": self.subjects.events(partition), "offset": listed}
                answer = await self._call(f"STREAM.INFO.{self.stream}", request)
                page: dict[str, int] = answer["state"].get("subjects") or {}
                for subject, commits in page.items():
                    if aggregate := self.subjects.aggregate_of(subject, known):
                        counted[aggregate] += commits
                        aggregates[aggregate] += 1
                listed += len(page)
                total = int(answer.get("total", 0)) if page else 0
        return {name: Count(commits, aggregates[name]) for name, commits in counted.items()}

    def _note_acknowledged(self, sequence: int) -> None:
        self._acknowledged = max(self._acknowledged, sequence)

    async def digest(self, sequence: int) -> str:
        """Return the digest of the commit with this stream sequence, as the leader has it; empty if there is none."""
        try:
            answer = await self._call(f"STREAM.MSG.GET.{self.stream}", {"seq": sequence})
        except ApiError as error:
            if error.code == NO_MESSAGE:
                return ""
            raise
        return digest_of(answer["message"])

    async def verify(self) -> StreamInfo:
        """Make sure that the stream is the one that was opened, and has not lost its end.

        Raises:
            Replaced: it is not, or it has; `on_replaced` was called.
            LogError: that could not be found out.
        """
        # as it is before asking: all of it grows meanwhile
        known, mark = max(self._acknowledged, self.appender.highest), self._mark
        try:
            info = await make_sure(lambda: self._compare(known, *mark), self.patience)
        except Replaced as error:
            if self._on_replaced is not None:
                self._on_replaced(str(error))
            raise
        await self.mark(info)
        return info

    async def mark(self, info: StreamInfo) -> None:
        """Remember the last commit, and when the stream was created, to know the stream by later."""
        if info.last > self._mark[0] and (digest := await self.digest(info.last)):
            self._mark = info.last, digest
        self.created = info.created

    async def _compare(self, known: int, sequence: int, digest: str) -> StreamInfo:
        info = await self.info()
        again = f", or created again (at {info.created}, before at {self.created})"
        again = again if info.created != self.created else ""
        if info.last < known:
            raise Replaced(
                f"the log ends at {info.last}, and had {known} commits before: it was truncated, or restored from an "
                f"older backup{again}; {RESTORE}"
            )
        found = await self.digest(sequence) if sequence else ""
        if found not in ("", digest):
            raise Replaced(
                f"commit {sequence} of the log is another one than before: the log was restored from an older backup "
                f"and has gone on, or is another one{again}; {RESTORE}"
            )
        # each server of a cluster has its own time for a stream that was restored: a new leader shows another one
        if info.created != self.created and not found:
            raise Replaced(
                f"the stream was created at {info.created}, the one at start at {self.created}: it was made again; "
                f"{RESTORE}"
            )
        return info

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        await self.appender.close()
        for reader in list(self._readers):
            await reader.close()
        await self._gets.close()


OVERHEAD = 512
"""Bytes of the smallest commit, as a server counts them, roughly: less room than that is none."""


def find_obstacle(config: dict[str, Any], state: dict[str, Any], events: str) -> str:
    """Return why a stream can take no commits, in a sentence, or nothing.

    Args:
        events: the subject filter of the app's events.
    """
    name = config["name"]
    if config.get("sealed"):
        return f"stream {name!r} is sealed: it takes no commits any more"
    subjects = config.get("subjects") or []
    if not any(_covers(subject, events) for subject in subjects):
        return f"stream {name!r} has the subjects {subjects}, and does not take {events}; set them back"
    if config.get("no_ack"):
        return f"stream {name!r} has no_ack: it acknowledges no commit; set it back"
    if config.get("discard") == "new":
        most_bytes, most = config.get("max_bytes", -1), config.get("max_msgs", -1)
        if 0 < most_bytes < state["bytes"] + OVERHEAD:
            return f"stream {name!r} is full: {state['bytes']} of {most_bytes} bytes; raise stream.max_bytes"
        if 0 < most <= state["messages"]:
            return f"stream {name!r} is full: {most} messages; raise stream.max_messages"
    return ""


def _covers(filter: str, subject: str) -> bool:
    """Return whether a subject filter takes everything that another one takes."""
    mine, others = filter.split("."), subject.split(".")
    for place, word in enumerate(mine):
        if word == ">":
            return len(others) > place
        if place == len(others) or others[place] == ">" or word not in ("*", others[place]):
            return False
    return len(mine) == len(others)


_LOSING = ("max_age",)
_NOT_ITS_OWN = ("max_msgs_per_subject", "sealed", "mirror", "sources", "subject_transform")


def check_keeps_everything(config: dict[str, Any], may_lose: bool = False) -> None:
    """Raise `StreamMismatch` if a stream is set to lose events, or holds those of another.

    Args:
        may_lose: that was asked for twice: only the latter is refused.
    """
    names = _NOT_ITS_OWN if may_lose else _LOSING + _NOT_ITS_OWN
    wrong = [name for name in names if config.get(name) and config[name] not in (-1, 0)]
    if config.get("discard") != "new" and not may_lose:
        wrong.append("discard")
    if wrong:
        details = ", ".join(f"{name} is {config[name]!r}" for name in wrong)
        raise StreamMismatch(f"stream {config['name']!r} would lose events, or is not its own: {details}")


def partitions_of(config: dict[str, Any]) -> int:
    """Return the partition count that a stream was made with. Raises `StreamMismatch` if we have not made it."""
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
