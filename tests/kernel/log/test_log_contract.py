"""The promises of every event log, on the memory log and on JetStream of two server versions: appending, subjects."""

from __future__ import annotations

import asyncio

import pytest

from aggregates import InvalidId
from kernel.errors import Conflict, PayloadTooLarge, Unavailable
from kernel.log import MemoryLog, Stored
from tests.kernel.log.logs import PARTITIONS, Log, drain, fill, subject_of

STRANGE_IDS = [
    "plain",
    "Plain",
    "with space",
    " ",
    "dot.ted",
    "dot%2Eted",
    ".",
    "..",
    "*",
    ">",
    "a.*",
    "a.>",
    "a/b",
    "a\\b",
    "100%",
    "100%25",
    "%",
    "~",
    "tilde~",
    "$JS.API.INFO",
    "Zürich",
    "東京",
    "🛩️",
    "quote'\"",
    "x" * 255,
]
REFUSED_IDS = ["", "x" * 256, "x" * 10_240, "é" * 100, "a\nb", "a\r\nPUB x 0", "\x00", "tab\t", "\x7f", "\ud800"]


# appending


async def test_an_append_with_the_right_expected_sequence_is_stored(log: Log) -> None:
    subject = subject_of(log)
    first = await log.append(subject, 0, b"first")
    second = await log.append(subject, first, b"second")
    assert 0 < first < second
    assert await log.read_subject(subject) == [Stored(first, subject, b"first"), Stored(second, subject, b"second")]
    assert await log.last(subject) == Stored(second, subject, b"second")


async def test_an_append_with_a_stale_expected_sequence_conflicts_and_tells_the_actual_one(log: Log) -> None:
    subject = subject_of(log)
    first = await log.append(subject, 0, b"first")
    second = await log.append(subject, first, b"second")
    for stale in (0, first):
        with pytest.raises(Conflict) as conflict:
            await log.append(subject, stale, b"late %d" % stale)
        assert conflict.value.actual == second
        assert subject in str(conflict.value)
    assert [stored.payload for stored in await log.read_subject(subject)] == [b"first", b"second"]


async def test_an_append_that_expects_a_commit_of_an_empty_subject_conflicts(log: Log) -> None:
    subject, other = subject_of(log, "1"), subject_of(log, "2")
    sequence = await log.append(subject, 0, b"first")
    with pytest.raises(Conflict) as conflict:
        await log.append(other, sequence, b"first of another")
    assert conflict.value.actual == 0
    assert await log.read_subject(other) == []


async def test_of_concurrent_appends_to_one_subject_exactly_one_wins(log: Log) -> None:
    subject = subject_of(log)
    last = 0
    for contest in range(5):
        payloads = [b"%d.%d" % (contest, contender) for contender in range(20)]
        outcomes = await asyncio.gather(*[log.append(subject, last, p) for p in payloads], return_exceptions=True)
        winners = [place for place, outcome in enumerate(outcomes) if isinstance(outcome, int)]
        assert len(winners) == 1
        assert all(isinstance(outcome, int | Conflict) for outcome in outcomes)
        stored = await log.last(subject)
        assert stored == Stored(outcomes[winners[0]], subject, payloads[winners[0]])
        last = stored.sequence
    assert len(await log.read_subject(subject)) == 5


async def test_many_appends_in_flight_all_settle_with_distinct_growing_sequences(log: Log) -> None:
    subjects = [subject_of(log, f"many-{number}") for number in range(3000)]
    first = await asyncio.gather(*[log.append(subject, 0, subject.encode()) for subject in subjects])
    assert first == sorted(set(first))
    futures = [
        log.append(subject, last, b"2 " + subject.encode()) for subject, last in zip(subjects, first, strict=True)
    ]
    second = await asyncio.gather(*futures)
    assert second == sorted(set(second))
    assert second[0] > first[-1]
    for place in (0, 1, 1499, 2999):
        subject = subjects[place]
        stored = [
            Stored(first[place], subject, subject.encode()),
            Stored(second[place], subject, b"2 " + subject.encode()),
        ]
        assert await log.read_subject(subject) == stored


async def test_a_conflict_among_many_appends_hits_only_the_guilty_commit(log: Log) -> None:
    guilty = {0, 7, 19}
    for number in guilty:
        await log.append(subject_of(log, str(number)), 0, b"before")
    futures = [log.append(subject_of(log, str(number)), 0, b"new %d" % number) for number in range(20)]
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    assert {number for number, outcome in enumerate(outcomes) if isinstance(outcome, Conflict)} == guilty
    for number, outcome in enumerate(outcomes):
        payload = b"before" if number in guilty else b"new %d" % number
        stored = await log.read_subject(subject_of(log, str(number)))
        assert [commit.payload for commit in stored] == [payload]
        if number not in guilty:
            assert stored[0].sequence == outcome


async def test_an_append_that_its_caller_gave_up_disturbs_no_other(log: Log) -> None:
    appends = [log.append(subject_of(log, str(number)), 0, b"%d" % number) for number in range(6)]
    waiting = [asyncio.ensure_future(append) for append in appends]
    await asyncio.sleep(0)
    waiting[2].cancel()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    for number in (0, 1, 3, 4, 5):
        assert isinstance(outcomes[number], int)
        assert [commit.payload for commit in await log.read_subject(subject_of(log, str(number)))] == [b"%d" % number]


async def test_a_payload_over_the_limit_is_refused_and_the_log_goes_on(log: Log) -> None:
    subject, other = subject_of(log, "1"), subject_of(log, "2")
    largest = bytes(range(256)) * (log.max_payload // 256)
    largest += b"x" * (log.max_payload - len(largest))
    outcomes = await asyncio.gather(
        log.append(subject, 0, largest),
        log.append(subject, 0, largest + b"x"),
        log.append(other, 0, largest[::-1]),
        return_exceptions=True,
    )
    assert isinstance(outcomes[1], PayloadTooLarge), outcomes[1]
    assert subject in str(outcomes[1])
    assert await log.read_subject(subject) == [Stored(outcomes[0], subject, largest)]
    assert await log.read_subject(other) == [Stored(outcomes[2], other, largest[::-1])]
    assert await log.append(subject, outcomes[0], b"next") > outcomes[0]


async def test_payloads_come_back_byte_by_byte(log: Log) -> None:
    payloads = [b"", bytes(range(256)), b"\r\n", b"MSG a 1 4\r\nabcd\r\n", b"NATS/1.0 100\r\n\r\n", b"\x00" * 10_000]
    subject, last, expected = subject_of(log), 0, []
    for payload in payloads:
        last = await log.append(subject, last, payload)
        expected.append(Stored(last, subject, payload))
        assert await log.last(subject) == expected[-1]
    assert await log.read_subject(subject) == expected
    reader = await log.read(0)
    assert await drain(reader, len(payloads)) == expected
    await reader.close()


async def test_a_closed_log_refuses_appends(log: Log) -> None:
    await log.close()
    with pytest.raises(Unavailable):
        await log.append(subject_of(log), 0, b"late")
    await log.close()


# one subject


async def test_a_subject_is_read_in_order_and_after_a_sequence(log: Log) -> None:
    made = await fill(log, 30, ids=3)
    for number in range(3):
        subject = subject_of(log, str(number))
        own = [stored for stored in made if stored.subject == subject]
        assert len(own) == 10
        assert await log.read_subject(subject) == own
        for skipped in (0, 1, 4, 9, 10):
            after = own[skipped - 1].sequence if skipped else 0
            assert await log.read_subject(subject, after) == own[skipped:]
    assert await log.read_subject(subject_of(log, "0"), made[-1].sequence + 1000) == []


async def test_a_subject_without_commits_is_empty(log: Log) -> None:
    await fill(log, 3)
    assert await log.read_subject(subject_of(log, "empty")) == []
    assert await log.last(subject_of(log, "empty")) is None


async def test_a_history_longer_than_one_round_trip_is_read_whole(log: Log) -> None:
    subject, last, expected = subject_of(log), 0, []
    noise = subject_of(log, "noise")
    await log.append(noise, 0, b"noise")
    for number in range(2500):
        payload = b"commit %d" % number
        last = await log.append(subject, last, payload)
        expected.append(Stored(last, subject, payload))
    assert await log.read_subject(subject) == expected
    assert await log.read_subject(subject, expected[1199].sequence) == expected[1200:]


async def test_several_subjects_are_read_at_the_same_time(log: Log) -> None:
    made = await fill(log, 200, ids=20)
    subjects = [subject_of(log, str(number)) for number in range(20)]
    for subject, found in zip(subjects, await asyncio.gather(*map(log.read_subject, subjects)), strict=True):
        assert found == [stored for stored in made if stored.subject == subject]


async def test_strange_ids_are_kept_apart(log: Log) -> None:
    appended = {}
    for name in STRANGE_IDS:
        address = log.subjects.address("Thing", name)
        appended[name] = await log.append(address.subject, 0, name.encode())
        assert log.subjects.parse(address.subject) == address
        assert address.id == name
    for name, sequence in appended.items():
        subject = subject_of(log, name)
        assert await log.read_subject(subject) == [Stored(sequence, subject, name.encode())]
    reader = await log.read(0)
    found = await drain(reader, len(STRANGE_IDS))
    assert [log.subjects.parse(stored.subject).id for stored in found] == STRANGE_IDS
    await reader.close()


@pytest.mark.parametrize("id", REFUSED_IDS, ids=ascii)
def test_ids_that_no_subject_can_carry_are_refused(id: str) -> None:
    with pytest.raises(InvalidId):
        MemoryLog("app", PARTITIONS).subjects.address("Thing", id)
