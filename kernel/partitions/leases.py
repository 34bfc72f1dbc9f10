"""Leases on partitions, in a JetStream KV bucket.

Each partition has a key in the bucket, and each worker has one too. The worker that creates a partition's key holds the
partition, as long as it renews the key against the last revision that it knows. The bucket deletes a key that is not
renewed in time. There is no coordinator: every worker counts the workers' keys, and acquires or gives back partitions
until it has its share.

Leases only save work. Correctness does not depend on them: an append has its expected sequence, and a batch its fence.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import orjson

from kernel.errors import Conflict, DatabaseMismatch, LogError, StreamMismatch
from kernel.log.appender import Appender
from kernel.log.base import Stored
from kernel.partitions.bucket import bucket_of, faults_of
from kernel.partitions.databases import Identity, check_database, describe_database
from kernel.partitions.members import FOLLOWER, WORKER, Member, Members, Program, describe, read_member
from kernel.transport.connection import NatsConnection
from kernel.transport.jetstream_api import NO_STREAM, ApiError, call_api, last_message

logger = logging.getLogger("eskernel.partitions")
_NAME_IN_USE = 10058
_CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_MARGIN = 0.9
"""Share of a lease's duration that its holder uses, because the clocks of two machines differ in speed."""


def clock() -> float:
    """Return the seconds of a monotonic clock that also counts while the machine is suspended."""
    return time.clock_gettime(_CLOCK)


@dataclass(slots=True)
class Lease:
    """One key that this worker holds.

    Attributes:
        revision: revision of the key, which the next renewal must find unchanged.
        deadline: until when the lease may be used, by `clock()`.
    """

    revision: int
    deadline: float


class Leases:
    """The leases of one worker.

    Args:
        app: name of the app's stream, from which the bucket's name is derived: two streams of one app share nothing.
        worker: this worker's name, unique for all time: letters, digits and `-`.
        ttl: lease duration in seconds: the bucket deletes a key that is not renewed for this long.
        program: what this worker's program declares.
        follows: this worker takes no commands, and holds no partitions: it only projects.
        on_mismatch: called with a reason when this worker comes back after its lease expired, and meanwhile another
            worker has brought another database.

    Attributes:
        database: the database that this worker projects into; None if it projects into none.
    """

    def __init__(
        self,
        connection: NatsConnection,
        app: str,
        worker: str,
        partitions: int,
        *,
        ttl: float,
        replicas: int = 1,
        program: Program | None = None,
        follows: bool = False,
        on_mismatch: Callable[[str], None] = logger.error,
    ) -> None:
        self._connection = connection
        self.worker, self.partitions, self.ttl = worker, partitions, ttl
        self._replicas, self._on_mismatch = replicas, on_mismatch
        self._program, self._follows = program or Program(), follows
        self.database: Identity | None = None
        self._bucket = bucket_of(app)
        self._stream = f"KV_{self._bucket}"
        self._appender = Appender(connection, self._last, atomic=False, timeout=ttl / 3, deadline=ttl)
        self._me: Lease | None = None
        self._held: dict[int, Lease] = {}
        self._renewals = 0
        self._seen: tuple[str, ...] = ()
        self._unsettled = 0.0
        self._started = self._joined = False
        self._writing = asyncio.Lock()

    async def start(self) -> None:
        """Create the bucket, if it does not exist.

        Raises:
            LogError: the bucket can't be created.
            StreamMismatch: a bucket of this name exists, and can't hold leases.
        """
        await self._appender.start()
        self._started = True
        await self._create_bucket()
        self._connection.reconnections.append(self._reconnected)

    async def bury(self, dead: Collection[str]) -> None:
        """Delete the keys of workers that are certainly dead. A key that can't be deleted expires."""
        try:
            keys = await self._keys()
            found = await asyncio.gather(*(self._last(f"$KV.{self._bucket}.{key}") for key in keys))
        except LogError as error:
            logger.info("the leases of dead workers can't be deleted, and will expire: %s", error)
            return
        theirs = [Lease(key.sequence, 0.0) for key in found if key is not None and _writer_of(key.payload) in dead]
        await asyncio.gather(*(self._delete(lease) for lease in theirs))
        logger.info("deleted %d leases of workers that are dead: %s", len(theirs), ", ".join(dead))

    async def join(self) -> None:
        """Join the workers: from now on the other workers leave this worker its share.

        Raises:
            DatabaseMismatch: another worker has joined at the same moment, with another database.
        """
        self._joined = True
        await self.renew()
        if self.database is not None:
            await check_database(self._connection, self._bucket, self.database, worker=self.worker)

    async def check_database(self, database: Identity) -> None:
        """Make sure that the live workers project into this database.

        The key of a worker that has died says nothing any more, and is waited for until it expires.

        Raises:
            DatabaseMismatch: a live worker projects into another database.
        """
        await check_database(self._connection, self._bucket, database, worker=self.worker, wait=self.ttl / 6)

    async def _check_again(self, database: Identity) -> None:
        try:
            await self.check_database(database)
        except DatabaseMismatch as error:
            self._on_mismatch(str(error))
        except LogError as error:
            logger.warning("the databases of the other workers can't be compared: %s", error)

    def _reconnected(self) -> None:
        """Create the bucket again before the next renewal: a restarted server has lost it."""
        self._making = asyncio.ensure_future(self._make_again())

    async def _make_again(self) -> None:
        try:
            await self._create_bucket()
        except LogError as error:
            logger.warning("leases: %s", error)

    async def _create_bucket(self) -> None:
        config = {
            "name": self._stream,
            "subjects": [f"$KV.{self._bucket}.>"],
            "max_msgs_per_subject": 1,
            "max_age": int(self.ttl * 1e9),
            "duplicate_window": int(min(self.ttl, 120.0) * 1e9),
            # a server that loses the bucket has lost its connections too: all workers start again
            "storage": "memory",
            "num_replicas": self._replicas,
            "discard": "new",
            "allow_direct": True,
            "allow_rollup_hdrs": True,
        }
        try:
            answer = await call_api(self._connection, f"STREAM.CREATE.{self._stream}", config)
        except ApiError as error:
            if error.code != _NAME_IN_USE:
                raise
            answer = await call_api(self._connection, f"STREAM.INFO.{self._stream}", None)
        found = answer["config"]
        if faults := faults_of(found, f"$KV.{self._bucket}.>"):
            raise StreamMismatch(
                f"the bucket {self._bucket} exists, and can't hold leases, because it has {', '.join(faults)}. Another "
                f"program has made it: delete it (`nats kv del {self._bucket}`), and the service makes its own"
            )
        age = found["max_age"] / 1e9
        if age != self.ttl:
            logger.info("leases last %g s, as the existing bucket %s defines", age, self._bucket)
            self.ttl = age

    # what is held

    def holds(self, partition: int) -> bool:
        """Return whether this worker may still act for the partition. It is called often, and is cheap."""
        lease = self._held.get(partition)
        return lease is not None and lease.deadline > clock()

    @property
    def held(self) -> frozenset[int]:
        """The partitions that this worker holds, as far as it knows without a request."""
        now = clock()
        return frozenset(partition for partition, lease in self._held.items() if lease.deadline > now)

    # keeping

    async def renew(self) -> list[int]:
        """Renew every lease, and return the partitions lost since the last renewal.

        A lease whose renewal gets no answer is kept until its deadline.
        """
        # one renewal at a time: two renewals of a key would conflict
        async with self._writing:
            mine, partitions = self._me, list(self._held)
            renewals = (self._renew(partition) for partition in partitions)
            _, *kept = await asyncio.gather(self._renew_membership(mine), *renewals)
            lost = [partition for partition, still in zip(partitions, kept, strict=True) if not still]
            for partition in lost:
                del self._held[partition]
            if mine is not None and self._me is None:
                # the bucket has lost this worker's key, perhaps all keys: the other workers may still join again
                self._unsettled = clock() + self.ttl
                await self._renew_membership(None)
                if self.database is not None:
                    self._checking = asyncio.ensure_future(self._check_again(self.database))
        if lost:
            logger.warning("lost %d of %d leases", len(lost), len(partitions))
        return lost

    async def _renew_membership(self, mine: Lease | None) -> None:
        if not self._joined:
            return
        before = clock()
        try:
            revision = await self._put(f"{self._kind}.{self.worker}", mine.revision if mine else 0, describe(self.me))
        except Conflict:
            self._me = None
        except LogError as error:
            logger.warning("leases: %s", error)
        else:
            self._me = Lease(revision, before + self.ttl * _MARGIN)

    async def _renew(self, partition: int) -> bool:
        """Renew one lease, and return whether it is still valid."""
        lease = self._held[partition]
        # the lease begins when the bucket stores the renewal, which is later than this moment
        before = clock()
        try:
            revision = await self._put(f"p.{partition}", lease.revision)
        except Conflict:
            return False
        except LogError:
            return lease.deadline > clock()  # the outcome is unknown
        self._held[partition] = Lease(revision, before + self.ttl * _MARGIN)
        return True

    @property
    def _kind(self) -> str:
        return FOLLOWER if self._follows else WORKER

    @property
    def me(self) -> Member:
        """What the others read of this worker."""
        return Member(self.worker, self._program, frozenset(self._held), self._follows)

    async def announce(self) -> None:
        """Let the others read what this worker holds now, and not at the next renewal."""
        async with self._writing:
            if self._joined and self._me is not None:
                await self._renew_membership(self._me)

    async def members(self) -> Members:
        """Return the workers and the partitions that they hold.

        Raises:
            LogError: the server doesn't answer.
        """
        try:
            keys = await self._keys()
        except ApiError as error:
            if error.code == NO_STREAM:
                logger.warning("the lease bucket does not exist any more (a restarted server?); creating it again")
                await self._create_bucket()
                return Members((), frozenset())
            raise
        workers = {key[2:] for key in keys if key.startswith("w.")}
        if clock() < self._unsettled:
            workers.update(self._seen)
        else:
            self._seen = tuple(workers)
        return Members(
            tuple(sorted(workers)),
            frozenset(int(key[2:]) for key in keys if key.startswith("p.") and key[2:].isdigit()),
            await self._read_others(keys),
        )

    async def _read_others(self, keys: Collection[str]) -> tuple[Member, ...]:
        mine = f"{self._kind}.{self.worker}"
        others = sorted(key for key in keys if key[:2] in (f"{WORKER}.", f"{FOLLOWER}.") and key != mine)
        found = await asyncio.gather(*(self._last(f"$KV.{self._bucket}.{key}") for key in others))
        read = [read_member(key, stored.payload) for key, stored in zip(others, found, strict=True) if stored]
        return tuple(member for member in read if member is not None)

    async def _keys(self) -> list[str]:
        # a bucket without a leader does not answer: a long wait would outlast the election of the next one
        answer = await call_api(
            self._connection, f"STREAM.INFO.{self._stream}", {"subjects_filter": f"$KV.{self._bucket}.>"}, self.ttl / 3
        )
        return [subject.split(".", 2)[2] for subject in answer["state"].get("subjects") or {}]

    def share(self, members: Members) -> int:
        """Return the number of partitions that this worker should hold. All workers compute the same even shares."""
        if self.worker not in members.workers:
            return 0
        each, left = divmod(self.partitions, len(members.workers))
        return each + (members.workers.index(self.worker) < left)

    def surplus(self, members: Members) -> list[int]:
        """Return the partitions to give back, so that other workers get their share."""
        if self.worker not in members.workers:
            return []
        return sorted(self._held)[self.share(members) :]

    async def acquire(self, members: Members) -> list[int]:
        """Acquire free partitions up to this worker's share, and return the acquired ones."""
        wanted = self.share(members) - len(self._held)
        taken = members.held | self._held.keys()
        free = [partition for partition in range(self.partitions) if partition not in taken]
        if wanted <= 0 or not free:
            return []
        # each worker begins at another place, so that two workers seldom try the same key
        start = members.workers.index(self.worker) * len(free) // len(members.workers)
        chosen = (free[start:] + free[:start])[:wanted]
        results = await asyncio.gather(*(self._take(partition) for partition in chosen))
        return [partition for partition, acquired in zip(chosen, results, strict=True) if acquired]

    async def _take(self, partition: int) -> bool:
        before = clock()
        try:
            revision = await self._put(f"p.{partition}", 0)
        except LogError:
            return False  # another worker was faster, or the outcome is unknown: then the key expires
        self._held[partition] = Lease(revision, before + self.ttl * _MARGIN)
        return True

    async def release(self, partitions: Iterable[int]) -> None:
        """Give partitions back at once, instead of letting their leases expire."""
        async with self._writing:
            leases = [self._held.pop(partition, None) for partition in partitions]
            await asyncio.gather(*(self._delete(lease) for lease in leases if lease is not None))

    async def _delete(self, lease: Lease) -> None:
        try:
            # by revision: a key that another worker has written since is not deleted
            await call_api(
                self._connection, f"STREAM.MSG.DELETE.{self._stream}", {"seq": lease.revision, "no_erase": True}, 2.0
            )
        except LogError as error:
            logger.info("a lease can't be deleted, and will expire: %s", error)

    @asynccontextmanager
    async def alone(self, what: str, pause: float = 0.05, patience: float = math.inf) -> AsyncIterator[None]:
        """Wait for a lease that one worker at a time holds, and renew it until the block ends.

        Args:
            what: name of the lease.
            pause: seconds between two tries.
            patience: seconds after which nothing is tried any more.

        Raises:
            LogError: the server doesn't answer.
            TimeoutError: another one has held it for all that time.
        """
        key, revision, began = f"l.{what}", 0, clock()
        while not revision:
            try:
                revision = await self._put(key, 0)
            except Conflict:
                if clock() - began >= patience:
                    raise TimeoutError(f"another process holds the lease {what}") from None
                await asyncio.sleep(pause)
        lease = Lease(revision, 0.0)
        renewing = asyncio.ensure_future(self._keep(key, lease))
        try:
            yield
        finally:
            renewing.cancel()
            await asyncio.wait({renewing})
            if lease.revision:
                await self._delete(lease)

    async def _keep(self, key: str, lease: Lease) -> None:
        while True:
            await asyncio.sleep(self.ttl / 3)
            try:
                lease.revision = await self._put(key, lease.revision)
            except Conflict:
                logger.warning("lease %s has expired because this process was delayed; acquiring it again", key)
                lease.revision = 0  # the next renewal creates the key, unless another worker has it by then
            except LogError as error:
                logger.warning("lease %s: %s", key, error)

    async def close(self) -> None:
        """Give back all partitions, and leave the workers."""
        if not self._started:
            return
        self._started = False
        if self._reconnected in self._connection.reconnections:
            self._connection.reconnections.remove(self._reconnected)
        try:
            if self._connection.is_connected:
                await self.release(list(self._held))
                if self._me is not None:
                    await self._delete(self._me)
        finally:
            self._me, self._joined = None, False
            self._held.clear()
            await self._appender.close()

    async def _put(self, key: str, expected: int, more: dict[str, Any] | None = None) -> int:
        self._renewals += 1
        # every value is unique, so that the appender recognises its own value after a lost answer
        said = describe_database(self.database)
        value = orjson.dumps({"worker": self.worker, "renewal": self._renewals, **said, **(more or {})})
        return await self._appender.append(f"$KV.{self._bucket}.{key}", expected, value)

    async def _last(self, subject: str) -> Stored | None:
        message = await last_message(self._connection, self._stream, subject, timeout=1.0)
        return None if message is None else Stored(*message)


def _writer_of(value: bytes) -> str:
    try:
        return str(orjson.loads(value)["worker"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""  # another program has written the key
