"""Leases on a real server: holders, shares, renewal and expiry."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kernel.errors import StreamMismatch, Unavailable
from kernel.partitions.leases import Leases, Members, clock
from kernel.transport.connection import NatsConnection
from kernel.transport.dial import connect
from kernel.transport.jetstream_api import call_api

Wait = Callable[..., Coroutine[Any, Any, Any]]
PARTITIONS = 8


@pytest.fixture
async def connection(nats_url: str) -> AsyncIterator[NatsConnection]:
    connected = await connect(nats_url, name="leases")
    yield connected
    await connected.close()


@asynccontextmanager
async def worker(connection: NatsConnection, app: str, name: str, ttl: float = 5.0) -> AsyncIterator[Leases]:
    leases = Leases(connection, app, name, PARTITIONS, ttl=ttl)
    await leases.start()
    await leases.join()
    try:
        yield leases
    finally:
        await leases.close()


async def acquire(leases: Leases) -> list[int]:
    return await leases.acquire(await leases.members())


async def test_the_first_worker_takes_everything(connection: NatsConnection, app_name: str) -> None:
    async with worker(connection, app_name, "a") as a:
        assert sorted(await acquire(a)) == list(range(PARTITIONS))
        assert a.held == frozenset(range(PARTITIONS))
        assert all(a.holds(partition) for partition in range(PARTITIONS))
        assert not a.holds(PARTITIONS)


async def test_a_partition_has_one_holder_however_many_reach_for_it(connection: NatsConnection, app_name: str) -> None:
    async with worker(connection, app_name, "a") as a, worker(connection, app_name, "b") as b:
        everything = Members(("a",), frozenset()), Members(("b",), frozenset())
        got = await asyncio.gather(a.acquire(everything[0]), b.acquire(everything[1]))
        assert sorted(got[0] + got[1]) == list(range(PARTITIONS))


async def test_shares_are_even_and_surplus_is_given_back(connection: NatsConnection, app_name: str) -> None:
    async with worker(connection, app_name, "a") as a:
        await acquire(a)
        async with worker(connection, app_name, "b") as b, worker(connection, app_name, "c") as c:
            members = await a.members()
            assert members.workers == ("a", "b", "c")
            assert sum(leases.share(members) for leases in (a, b, c)) == PARTITIONS
            assert {leases.share(members) for leases in (a, b, c)} == {2, 3}
            assert await acquire(b) == []
            await a.release(a.surplus(members))
            assert len(await acquire(b)) + len(await acquire(c)) == PARTITIONS - len(a.held)
            assert a.surplus(await a.members()) == []


async def test_a_bucket_that_has_no_leader_and_gives_no_answer_is_asked_again_before_a_lease_runs_out(
    connection: NatsConnection, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with worker(connection, app_name, "a", ttl=1.5) as a:
        silence = await connection.subscribe(f"{app_name}.silence.>")
        with monkeypatch.context() as patch:
            patch.setattr(connection, "api", f"{app_name}.silence")
            async with asyncio.timeout(a.ttl):
                with pytest.raises(Unavailable):
                    await a.members()
        await silence.unsubscribe()
        assert (await a.members()).workers == ("a",)


async def test_a_lease_that_is_renewed_stays_and_one_that_is_not_runs_out(
    connection: NatsConnection, app_name: str, wait_until: Wait
) -> None:
    async with worker(connection, app_name, "a", ttl=1.5) as a, worker(connection, app_name, "b", ttl=1.5) as b:
        await a.acquire(Members(("a",), frozenset()))
        started = clock()
        while clock() - started < 3.5:
            assert await a.renew() == []
            assert await b.acquire(Members(("b",), frozenset())) == []
            await asyncio.sleep(0.1)
        # from now on a is silent, as if it were frozen
        got: list[int] = []

        async def taken() -> bool:
            got.extend(await b.acquire(Members(("b",), frozenset())))
            return len(got) == PARTITIONS

        await wait_until(taken)
        assert not a.held, "it must not count on a lease longer than the bucket keeps it"
        assert sorted(await a.renew()) == list(range(PARTITIONS))
        assert b.held == frozenset(range(PARTITIONS))


async def test_the_deadline_counts_from_before_the_request(
    connection: NatsConnection, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with worker(connection, app_name, "a", ttl=2.0) as a:
        await a.acquire(Members(("a",), frozenset()))
        put = a._put

        async def slow(key: str, expected: int, more: dict[str, Any] | None = None) -> int:
            revision = await put(key, expected, more)
            await asyncio.sleep(1.0)  # the answer is late: the bucket has counted from the request
            return revision

        monkeypatch.setattr(a, "_put", slow)
        asked = clock()
        await a.renew()
        assert clock() > asked + 1.0
        assert all(lease.deadline <= asked + 2.0 for lease in a._held.values())


async def test_a_lease_that_another_worker_has_taken_is_not_released(
    connection: NatsConnection, app_name: str, wait_until: Wait
) -> None:
    async with worker(connection, app_name, "a", ttl=0.5) as a, worker(connection, app_name, "b", ttl=0.5) as b:
        await a.acquire(Members(("a",), frozenset()))

        async def taken() -> bool:
            return bool(await b.acquire(Members(("b",), frozenset())))

        await wait_until(taken)
        theirs = b.held
        await a.release(range(PARTITIONS))
        assert theirs <= (await b.members()).held


async def test_leaving_gives_everything_back_at_once(connection: NatsConnection, app_name: str) -> None:
    async with worker(connection, app_name, "a", ttl=60.0) as a:
        await acquire(a)
    async with worker(connection, app_name, "b", ttl=60.0) as b:
        assert (await b.members()).workers == ("b",)
        assert len(await acquire(b)) == PARTITIONS


async def test_a_bucket_that_is_gone_is_made_again_without_a_rush(connection: NatsConnection, app_name: str) -> None:
    async with worker(connection, app_name, "a") as a, worker(connection, app_name, "b") as b:
        await acquire(a)
        await acquire(b)
        await a.members()
        await call_api(connection, f"STREAM.DELETE.KV_{app_name}-leases", None)
        await a.members()
        assert sorted(await a.renew()) == [0, 1, 2, 3]
        # b has not registered again yet, but a must not take its share
        assert len(await acquire(a)) == PARTITIONS // 2


async def test_the_dead_lose_everything_at_once_and_the_living_nothing(
    connection: NatsConnection, app_name: str
) -> None:
    async with worker(connection, app_name, "a", ttl=600.0) as a, worker(connection, app_name, "b", ttl=600.0) as b:
        await a.acquire(Members(("a", "b"), frozenset()))
        await b.acquire(Members(("b",), a.held))
        theirs = a.held
        async with b.alone("living"):
            await a._put("l.start", 0)  # as if it had died while it held the lease
            await connection.publish(f"$KV.{app_name}-leases.p.by-hand", b"not ours")
            await b.bury(["a", "never-there"])
            left = await b.members()
            assert left.workers == ("b",)
            assert left.held == b.held
            assert len(b.held) == PARTITIONS - len(theirs)
            assert set(await b._keys()) == {"w.b", "l.living", "p.by-hand"} | {f"p.{partition}" for partition in b.held}
        assert await b.renew() == []
        assert len(await b.acquire(left)) == len(theirs)
        async with b.alone("start"):
            pass
        assert sorted(await a.renew()) == sorted(theirs), "who was taken for dead notices"


async def test_one_at_a_time_is_alone(connection: NatsConnection, app_name: str) -> None:
    async with worker(connection, app_name, "a", ttl=0.6) as a, worker(connection, app_name, "b", ttl=0.6) as b:
        inside: list[str] = []

        async def work(leases: Leases) -> None:
            async with leases.alone("start"):
                inside.append(leases.worker)
                assert len(inside) == 1
                await asyncio.sleep(0.8)  # longer than the duration of a lease
                inside.remove(leases.worker)

        await asyncio.gather(work(a), work(b))


async def test_a_lease_that_ran_out_while_it_was_needed_is_taken_again(
    connection: NatsConnection, app_name: str, wait_until: Wait
) -> None:
    async with worker(connection, app_name, "a", ttl=0.6) as a:

        async def there() -> bool:
            return "l.start" in await a._keys()

        async with a.alone("start"):
            last = await a._last(f"$KV.{app_name}-leases.l.start")
            assert last is not None
            # as the bucket does when the event loop was held up for longer than a lease
            await call_api(
                connection, f"STREAM.MSG.DELETE.KV_{app_name}-leases", {"seq": last.sequence, "no_erase": True}
            )
            assert not await there()
            await wait_until(there)
        assert not await there()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"max_age": 0}, "no time to live"),
        ({"max_msgs_per_subject": 5}, "a history"),
        ({"max_msgs_per_subject": -1}, "a history"),
        ({"deny_delete": True}, "keys that can't be deleted"),
        ({"subjects": ["other.>"]}, "another subject"),
        ({"retention": "interest"}, "messages that their readers remove"),
        ({"max_age": 0, "deny_delete": True}, "never expire, keys that"),
    ],
)
async def test_a_bucket_of_another_program_is_refused_with_the_remedy(
    connection: NatsConnection, app_name: str, changed: dict[str, Any], says: str
) -> None:
    bucket = f"KV_{app_name}-leases"
    ours = {"subjects": [f"$KV.{app_name}-leases.>"], "max_age": 10**9, "max_msgs_per_subject": 1}
    ours |= {"duplicate_window": 10**9}
    subjects = [f"{app_name}.other.>"] if "subjects" in changed else ours["subjects"]
    await call_api(connection, f"STREAM.CREATE.{bucket}", {"name": bucket, **ours, **changed, "subjects": subjects})
    leases = Leases(connection, app_name, "a", PARTITIONS, ttl=5.0)
    with pytest.raises(StreamMismatch, match=says) as refused:
        await leases.start()
    assert f"delete it (`nats kv del {app_name}-leases`)" in str(refused.value)
    await leases.close()
    await call_api(connection, f"STREAM.DELETE.{bucket}", None)
    async with worker(connection, app_name, "a") as a:
        assert a.ttl == 5.0


async def test_the_bucket_of_an_earlier_start_is_used_with_its_own_duration(
    connection: NatsConnection, app_name: str
) -> None:
    async with worker(connection, app_name, "a", ttl=7.0):
        pass
    async with worker(connection, app_name, "b", ttl=3.0) as b:
        assert b.ttl == 7.0


def test_any_members_share_everything_evenly() -> None:
    seed = int(os.environ.get("TEST_SEED", random.randrange(1 << 30)))
    print(f"TEST_SEED={seed}")
    chance = random.Random(seed)
    names = [f"w{n}" for n in range(chance.randrange(1, 40))]
    partitions = chance.randrange(1, 300)
    members = Members(tuple(sorted(names)), frozenset())
    shares = [Leases(NatsConnection(), "x", name, partitions, ttl=1.0).share(members) for name in names]
    assert sum(shares) == partitions
    assert max(shares) - min(shares) <= 1
