"""Who works on which partition: leases in a JetStream KV bucket.

Each partition has a key, and each worker one of its own. Whoever creates a partition's key holds the partition, for as
long as it goes on renewing the key against the revision that it knows; the bucket forgets a key that nobody renews.
There is no coordinator: every worker counts the workers' keys and takes or gives back until it has its share.

Leases save work, no more: an append carries its expected sequence and a batch its fence, whoever holds what.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import orjson

from kernel.errors import Conflict, LogError
from kernel.log.appender import Appender
from kernel.log.base import Stored
from kernel.transport.connection import NatsConnection
from kernel.transport.jetstream_api import NO_MESSAGE, NO_STREAM, ApiError, call_api

logger = logging.getLogger("eskernel.partitions")
_NAME_IN_USE = 10058
_CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_MARGIN = 0.9
"""Of a lease's time that its holder counts on: clocks of two machines don't run equally fast."""


def clock() -> float:
    """Return seconds of a clock that nobody sets, and that goes on while the machine is suspended."""
    return time.clock_gettime(_CLOCK)


@dataclass(slots=True)
class Lease:
    """One key that this worker holds.

    Attributes:
        revision: of the key, which the next renewal must find unchanged.
        deadline: when to stop counting on it, by `clock()`.
    """

    revision: int
    deadline: float


@dataclass(frozen=True, slots=True)
class Members:
    """What the bucket says: the workers, sorted, and the partitions that somebody holds."""

    workers: tuple[str, ...]
    held: frozenset[int]


class Leases:
    """The leases of one worker.

    Args:
        app: name of the app's stream, after which the bucket is named: two streams of one app share nothing.
        worker: this worker's name, unlike any other's, now and before: letters, digits, `-`.
        ttl: seconds after which the bucket forgets a key that was not renewed.
    """

    def __init__(
        self, connection: NatsConnection, app: str, worker: str, partitions: int, *, ttl: float, replicas: int = 1
    ) -> None:
        self._connection = connection
        self.worker, self.partitions, self.ttl = worker, partitions, ttl
        self._replicas = replicas
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
        """Make the bucket, if nobody has.

        Raises:
            LogError: it can't be made.
        """
        await self._appender.start()
        self._started = True
        await self._create_bucket()
        self._connection.reconnections.append(self._reconnected)

    async def bury(self, dead: Collection[str]) -> None:
        """Delete the keys of workers that are dead for sure. What can't be deleted runs out by itself."""
        try:
            keys = await self._keys()
            found = await asyncio.gather(*(self._last(f"$KV.{self._bucket}.{key}") for key in keys))
        except LogError as error:
            logger.info("the leases of dead workers run out by themselves: %s", error)
            return
        theirs = [Lease(one.sequence, 0.0) for one in found if one is not None and _writer_of(one.payload) in dead]
        await asyncio.gather(*(self._delete(lease) for lease in theirs))
        logger.info("deleted %d leases of workers that are dead: %s", len(theirs), ", ".join(dead))

    async def join(self) -> None:
        """Become one of the workers: from now on the others leave us our share."""
        self._joined = True
        await self.renew()

    def _reconnected(self) -> None:
        """A server that started anew has forgotten the bucket: make it before the renewals look for it."""
        self._making = asyncio.ensure_future(self._make_again())

    async def _make_again(self) -> None:
        try:
            await self._create_bucket()
        except LogError as error:
            logger.info("leases: %s", error)

    async def _create_bucket(self) -> None:
        config = {
            "name": self._stream,
            "subjects": [f"$KV.{self._bucket}.>"],
            "max_msgs_per_subject": 1,
            "max_age": int(self.ttl * 1e9),
            "duplicate_window": int(min(self.ttl, 120.0) * 1e9),
            # a server that loses them has lost its connections too: everybody starts anew
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
        age = answer["config"].get("max_age", 0) / 1e9
        if age != self.ttl:
            logger.info("leases last %g s: that is how the bucket %s was made", age, self._bucket)
            self.ttl = age or self.ttl

    # what is held

    def holds(self, partition: int) -> bool:
        """Say whether this worker may still act for the partition. Costs next to nothing: it is asked all the time."""
        lease = self._held.get(partition)
        return lease is not None and lease.deadline > clock()

    @property
    def held(self) -> frozenset[int]:
        """The partitions held, as far as is known without asking."""
        now = clock()
        return frozenset(partition for partition, lease in self._held.items() if lease.deadline > now)

    # keeping

    async def renew(self) -> list[int]:
        """Renew every lease; return the partitions lost since the last time.

        A lease whose renewal got no answer is kept until its deadline.
        """
        # one at a time: two renewals of a key would be in each other's way
        async with self._writing:
            mine, partitions = self._me, list(self._held)
            _, *kept = await asyncio.gather(self._renew_membership(mine), *(self._renew(one) for one in partitions))
            lost = [one for one, still in zip(partitions, kept, strict=True) if not still]
            for partition in lost:
                del self._held[partition]
            if mine is not None and self._me is None:
                # the bucket has forgotten us, perhaps all of us: the others are not gone for not being there yet
                self._unsettled = clock() + self.ttl
                await self._renew_membership(None)
        if lost:
            logger.warning("lost %d of %d leases", len(lost), len(partitions))
        return lost

    async def _renew_membership(self, mine: Lease | None) -> None:
        if not self._joined:
            return
        before = clock()
        try:
            revision = await self._put(f"w.{self.worker}", mine.revision if mine else 0)
        except Conflict:
            self._me = None
        except LogError as error:
            logger.warning("leases: %s", error)
        else:
            self._me = Lease(revision, before + self.ttl * _MARGIN)

    async def _renew(self, partition: int) -> bool:
        """Renew one lease; say whether it can still be counted on."""
        lease = self._held[partition]
        # the bucket counts from when it stores the renewal, which is later than this moment
        before = clock()
        try:
            revision = await self._put(f"p.{partition}", lease.revision)
        except Conflict:
            return False
        except LogError:
            return lease.deadline > clock()  # nobody knows
        self._held[partition] = Lease(revision, before + self.ttl * _MARGIN)
        return True

    async def members(self) -> Members:
        """Return who is there and what is held, by anybody.

        Raises:
            LogError: the bucket doesn't answer.
        """
        try:
            keys = await self._keys()
        except ApiError as error:
            if error.code == NO_STREAM:
                logger.warning("the leases' bucket is gone (a server started anew?); making it again")
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
        )

    async def _keys(self) -> list[str]:
        answer = await call_api(
            self._connection, f"STREAM.INFO.{self._stream}", {"subjects_filter": f"$KV.{self._bucket}.>"}
        )
        return [subject.split(".", 2)[2] for subject in answer["state"].get("subjects") or {}]

    def share(self, members: Members) -> int:
        """Return how many partitions this worker should have: as even as can be, and everybody counts the same."""
        if self.worker not in members.workers:
            return 0
        each, left = divmod(self.partitions, len(members.workers))
        return each + (members.workers.index(self.worker) < left)

    def surplus(self, members: Members) -> list[int]:
        """Return partitions to give back, so that others get their share."""
        if self.worker not in members.workers:
            return []
        return sorted(self._held)[self.share(members) :]

    async def acquire(self, members: Members) -> list[int]:
        """Take free partitions up to this worker's share; return those that were got."""
        wanted = self.share(members) - len(self._held)
        free = [one for one in range(self.partitions) if one not in members.held and one not in self._held]
        if wanted <= 0 or not free:
            return []
        # each worker begins somewhere else: they seldom reach for the same key
        start = members.workers.index(self.worker) * len(free) // len(members.workers)
        chosen = (free[start:] + free[:start])[:wanted]
        got = await asyncio.gather(*(self._take(partition) for partition in chosen))
        return [partition for partition, taken in zip(chosen, got, strict=True) if taken]

    async def _take(self, partition: int) -> bool:
        before = clock()
        try:
            revision = await self._put(f"p.{partition}", 0)
        except LogError:
            return False  # somebody was faster, or nobody knows: then it runs out by itself
        self._held[partition] = Lease(revision, before + self.ttl * _MARGIN)
        return True

    async def release(self, partitions: Iterable[int]) -> None:
        """Give partitions back at once, rather than let them run out."""
        async with self._writing:
            leases = [lease for one in partitions if (lease := self._held.pop(one, None)) is not None]
            await asyncio.gather(*(self._delete(lease) for lease in leases))

    async def _delete(self, lease: Lease) -> None:
        try:
            # by its revision: what somebody else has put there since is not touched
            await call_api(
                self._connection, f"STREAM.MSG.DELETE.{self._stream}", {"seq": lease.revision, "no_erase": True}, 2.0
            )
        except LogError as error:
            logger.info("a lease runs out by itself: %s", error)

    @asynccontextmanager
    async def alone(self, what: str) -> AsyncIterator[None]:
        """Hold a lease that one worker at a time has, waiting for it; it is renewed for as long as it takes.

        Raises:
            LogError: the bucket doesn't answer.
        """
        key, revision = f"l.{what}", 0
        while not revision:
            try:
                revision = await self._put(key, 0)
            except Conflict:
                await asyncio.sleep(0.05)
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
                logger.warning("lease %s ran out: this process was held up for longer; taking it again", key)
                lease.revision = 0  # unless somebody else has it by now
            except LogError as error:
                logger.warning("lease %s: %s", key, error)

    async def close(self) -> None:
        """Give back everything and leave."""
        if not self._started:
            return
        self._started = False
        if self._reconnected in self._connection.reconnections:
            self._connection.reconnections.remove(self._reconnected)
        if self._connection.is_connected:
            await self.release(list(self._held))
            if self._me is not None:
                await self._delete(self._me)
        self._me, self._joined = None, False
        self._held.clear()
        await self._appender.close()

    async def _put(self, key: str, expected: int) -> int:
        self._renewals += 1
        # no two values are alike: that is how the appender recognises its own after a lost answer
        value = orjson.dumps({"worker": self.worker, "renewal": self._renewals})
        return await self._appender.append(f"$KV.{self._bucket}.{key}", expected, value)

    async def _last(self, subject: str) -> Stored | None:
        try:
            answer = await call_api(self._connection, f"STREAM.MSG.GET.{self._stream}", {"last_by_subj": subject}, 1.0)
        except ApiError as error:
            if error.code == NO_MESSAGE:
                return None
            raise
        message = answer["message"]
        return Stored(message["seq"], message["subject"], base64.b64decode(message.get("data", "")))


def _writer_of(value: bytes) -> str:
    try:
        return str(orjson.loads(value)["worker"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""  # somebody else's hand


def bucket_of(app: str) -> str:
    """Return the name of the bucket that holds an app's leases."""
    return f"{app}-leases"
