"""The promises of every event log: everything, or a partition, is read in stream order."""

from __future__ import annotations

import asyncio

from kernel.log import Stored
from tests.kernel.log.logs import PARTITIONS, Log, drain, fill, subject_of


async def test_everything_is_read_in_stream_order(log: Log) -> None:
    made = await fill(log, 500, ids=50)
    reader = await log.read(0)
    assert await drain(reader, 500) == made
    await reader.close()


async def test_a_partition_has_its_own_commits_and_all_of_them(log: Log) -> None:
    made = await fill(log, 200, ids=40)
    seen = 0
    for partition in range(PARTITIONS):
        own = [stored for stored in made if log.subjects.parse(stored.subject).partition == partition]
        reader = await log.read(0, partition)
        assert await drain(reader, len(own)) == own
        assert (await reader.next(10, timeout=0.1)).commits == []
        await reader.close()
        seen += len(own)
    assert seen == len(made)


async def test_reading_goes_on_behind_a_sequence(log: Log) -> None:
    made = await fill(log, 60, ids=12)
    reader = await log.read(made[24].sequence)
    assert await drain(reader, 35) == made[25:]
    await reader.close()
    partition = log.subjects.parse(made[0].subject).partition
    own = [stored for stored in made if log.subjects.parse(stored.subject).partition == partition]
    reader = await log.read(own[1].sequence, partition)
    assert await drain(reader, len(own) - 2) == own[2:]
    await reader.close()


async def test_reading_from_the_end_gives_what_comes_then(log: Log) -> None:
    made = await fill(log, 20)
    reader = await log.read(made[-1].sequence)
    assert (await reader.next(10, timeout=0.1)).commits == []
    sequence = await log.append(subject_of(log, "new"), 0, b"new")
    assert await drain(reader, 1) == [Stored(sequence, subject_of(log, "new"), b"new")]
    await reader.close()


async def test_a_batch_keeps_to_its_limit(log: Log) -> None:
    made = await fill(log, 50)
    reader = await log.read(0)
    found: list[Stored] = []
    while len(found) < 50:
        batch = await reader.next(7, timeout=20)
        assert 1 <= len(batch.commits) <= 7
        found += batch.commits
    assert found == made
    await reader.close()


async def test_a_batch_tells_how_many_wait_behind_it(log: Log) -> None:
    await fill(log, 50)
    reader = await log.read(0)
    left = 50
    while left:
        batch = await reader.next(7, timeout=20)
        left -= len(batch.commits)
        assert batch.pending == left
    await reader.close()


async def test_a_reader_waits_for_new_commits(log: Log) -> None:
    reader = await log.read(0)
    waiting = asyncio.create_task(reader.next(10, timeout=30))
    await log.info()
    assert not waiting.done()
    sequence = await log.append(subject_of(log), 0, b"new")
    assert (await waiting).commits == [Stored(sequence, subject_of(log), b"new")]
    await reader.close()


async def test_a_reader_with_nothing_to_read_returns_an_empty_batch(log: Log) -> None:
    reader = await log.read(0)
    assert await reader.next(10, timeout=0.05) == ([], 0, 0.0)
    made = await fill(log, 5)
    assert await drain(reader, 5) == made
    assert await reader.next(10, timeout=0.05) == ([], 0, 0.0)
    await reader.close()


async def test_a_reader_whose_wait_is_cancelled_stops_and_loses_nothing(log: Log) -> None:
    reader = await log.read(0)
    for _ in range(20):
        waiting = asyncio.create_task(reader.next(10))
        # its answer arrives at the same time as the reader's own
        await log.info()
        waiting.cancel()
        done, _ = await asyncio.wait({waiting}, timeout=5)
        assert done, "the cancellation was swallowed"
        await reader.close()
        reader = await log.read(0)
    made = await fill(log, 20)
    found: list[Stored] = []
    while len(found) < 20:
        waiting = asyncio.create_task(reader.next(4))
        await log.info()
        if waiting.cancel():
            await asyncio.wait({waiting}, timeout=5)
        found += (await reader.next(4, 20) if waiting.cancelled() else waiting.result()).commits
        assert found == made[: len(found)]
        assert found
    await reader.close()


async def test_two_readers_are_independent(log: Log) -> None:
    made = await fill(log, 40)
    ahead, behind = await log.read(0), await log.read(0)
    assert await drain(ahead, 40) == made
    assert await drain(behind, 40, limit=6) == made
    await ahead.close()
    more = await log.append(subject_of(log, "more"), 0, b"more")
    assert [stored.sequence for stored in await drain(behind, 1)] == [more]
    await behind.close()
    await behind.close()


async def test_the_log_knows_its_size(log: Log) -> None:
    empty = await log.info()
    assert (empty.partitions, empty.last, empty.commits) == (PARTITIONS, 0, 0)
    made = await fill(log, 25)
    full = await log.info()
    assert (full.first, full.last, full.commits) == (made[0].sequence, made[-1].sequence, 25)
    assert full.created == empty.created
    assert full.durability


async def test_commits_are_counted_by_the_name_of_their_aggregate(log: Log) -> None:
    assert await log.count_commits(()) == {}
    for aggregate, name, commits in (("Account", "alice", 2), ("Account", "a.b", 1), ("Loan", "alice", 3)):
        last = 0
        for number in range(commits):
            subject = log.subjects.address(aggregate, name).subject
            last = await log.append(subject, last, b"%s %d" % (subject.encode(), number))
    right = log.subjects.partition("Nobody", "alice")
    wrong = (right + 1) % PARTITIONS
    await log.append(f"{log.subjects.prefix}.evt.{wrong}.Nobody.alice", 0, b"no subject of ours")
    await log.append(f"{log.subjects.prefix}.evt.{right}.Nobody.alice.b", 0, b"nor this")
    for known in ((), ("Account", "Loan")):
        assert await log.count_commits(known) == {"Account": (3, 2), "Loan": (3, 1)}
