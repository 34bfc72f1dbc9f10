"""Bad bytes at the command endpoint, at the decoder or in the stream harm no other command or aggregate.

A failure prints its seed; TEST_SEED=<seed> runs the same inputs again.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import typing
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import nats
import orjson
import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import Aggregate, InvalidMessage, applies, command, event, handles
from aggregates.commit import Decision, Envelope, decode
from examples.bank import Account, Balances
from kernel import App, Client, Service
from kernel.protocol import ErrorType
from kernel.telemetry.metrics import BUGS
from projections import Rows
from projections.database import open_database
from projections.tables import dead_letter
from tests.apps import Lines, Note, Notebook, Noted, Pages, Words
from tests.conftest import settings_for
from tests.histories import encode

COUNT = 30_000
WINDOW = 1_000
"""Requests in flight; the service accepts ten times as many."""
KINDS = set(typing.get_args(ErrorType))
Wait = Callable[..., Coroutine[Any, Any, Any]]


@pytest.fixture
def dice() -> random.Random:
    seed = int(os.environ.get("TEST_SEED") or random.SystemRandom().getrandbits(32))
    print(f"TEST_SEED={seed}")
    return random.Random(seed)


# spoiling bytes

WORDS = [b"null", b"true", b"-1", b"1e999", b"1" * 30, b"1" * 5_000, b"0.5", b'""', b"[]", b"{}", b'"\\ud800"']
WORDS += [b'"\\udc00\\ud800"', b'"\xed\xa0\x80"', b'"\\u0000"', b'"a\\u0000b"', b'"\\u007f"', b'"\xf0\x9f\x98\x80"']
WORDS += [b'"' + b"x" * 300 + b'"', b'"nan"', b'"heavy"', b'{"a":' * 20 + b"1" + b"}" * 20]


def flip(dice: random.Random, good: bytes) -> bytes:
    spoilt = bytearray(good)
    for _ in range(dice.randint(1, 4)):
        spoilt[dice.randrange(len(spoilt))] ^= 1 << dice.randrange(8)
    return bytes(spoilt)


def truncate(dice: random.Random, good: bytes) -> bytes:
    return good[: dice.randrange(len(good))]


def repeat_span(dice: random.Random, good: bytes) -> bytes:
    start, end = sorted(dice.choices(range(len(good) + 1), k=2))
    return good[:end] + good[start:end] * dice.randint(1, 3) + good[end:]


def delete_span(dice: random.Random, good: bytes) -> bytes:
    start = dice.randrange(len(good))
    return good[:start] + good[start + dice.randint(1, 12) :]


def replace_value(dice: random.Random, good: bytes) -> bytes:
    """Replace the value of one field, at any depth, often by another type."""
    value = json.loads(good)
    inner = value
    while True:
        key = dice.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        if not (isinstance(inner[key], dict | list) and inner[key] and dice.random() < 0.6):
            break
        inner = inner[key]
    inner[key] = "\0here\0"
    return orjson.dumps(value).replace(b'"\\u0000here\\u0000"', dice.choice(WORDS))


def nest(dice: random.Random, good: bytes) -> bytes:
    depth = int(10 ** dice.uniform(1, 3.3))
    opening, closing = dice.choice([(b"[", b"]"), (b'{"a":', b"}")])
    deep = opening * depth + b"1" + (closing * depth if dice.random() < 0.8 else b"")
    return good[:-1] + b',"data":' + deep + b"}" if dice.random() < 0.7 else deep


def noise(dice: random.Random, good: bytes) -> bytes:
    return dice.randbytes(dice.choice([0, 1, 2, 3, 10, 100]))


SPOIL = [flip, flip, truncate, repeat_span, delete_span, replace_value, replace_value, noise]


def spoilt(dice: random.Random, good: bytes) -> bytes:
    # deeply nested values are slow to make and to send
    made = nest(dice, good) if dice.random() < 0.01 else dice.choice(SPOIL)(dice, good)
    return dice.choice(SPOIL[:5])(dice, made) if made and dice.random() < 0.2 else made


# the command endpoint


def bank_and_notebooks(name: str) -> App:
    return App(name, aggregates=[Account, Notebook], projections=[Balances, Pages, Words, Lines])


@pytest.fixture
async def service(nats_url: str, app_name: str, tmp_path: Path) -> AsyncIterator[Service]:
    service = Service(bank_and_notebooks(app_name), settings_for(tmp_path, nats=nats_url, drain=0.5))
    await service.start()
    yield service
    await service.stop()


@pytest.fixture
async def client(service: Service) -> AsyncIterator[Client]:
    async with await Client.connect(service.app, nats=service.nats_url, database=service.database_url) as client:
        yield client


SENT: list[dict[str, Any]] = [
    {"aggregate": "Account", "command": "Deposit", "data": {"cents": 500}},
    {"aggregate": "Account", "command": "Withdraw", "data": {"cents": 7}, "attempt": 1, "traceparent": "00-ab"},
    {"aggregate": "Notebook", "command": "Note", "data": {"text": "wörd", "number": 3}, "causation_id": "e"},
    {"aggregate": "Notebook", "command": "NoteTwice", "data": {"text": "two"}, "correlation_id": "c"},
    {"aggregate": "Notebook", "command": "Weigh", "data": {"grams": "1.5"}},
    {"aggregate": "Notebook", "command": "Explode", "data": {}},
]


def request(dice: random.Random, name: str) -> bytes:
    body = dict(dice.choice(SENT), id=f"{name}{dice.randrange(300)}")
    if dice.random() < 0.7:
        body["command_id"] = f"{name}-{dice.randrange(5_000)}"
    return orjson.dumps(body)


def neighbour(number: int) -> bytes:
    """A request that must take effect; no spoilt request can have its id."""
    body = {"aggregate": "Notebook", "id": f"good {number % 50}", "command": "Note", "command_id": f"n{number}"}
    return orjson.dumps({**body, "data": {"text": f"good {number % 7}", "number": number}})


def check_answer(payload: bytes) -> str:
    """Return the answer's outcome, after checking that it is a documented one."""
    answer = json.loads(payload)
    if set(answer) == {"ok"}:
        assert answer["ok"].keys() == {"version", "sequence", "partition", "command_id", "duplicate"}
        return "ok"
    assert set(answer) == {"error"}
    assert answer["error"]["type"] in KINDS
    assert isinstance(answer["error"]["message"], str)
    return answer["error"]["type"]


async def test_any_request_has_one_answer_and_harms_no_neighbour(
    service: Service, client: Client, dice: random.Random, wait_until: Wait
) -> None:
    alerts = BUGS._value.get()
    connection = await nats.connect(service.nats_url)
    inbox = connection.new_inbox()
    answers: dict[int, bytes] = {}
    twice: list[int] = []
    waiting: set[int] = set()
    all_here = asyncio.Event()

    async def take(message: Any) -> None:
        number = int(message.subject[len(inbox) + 1 :])
        if number in answers:
            twice.append(number)
        answers[number] = message.data
        waiting.discard(number)
        if not waiting:
            all_here.set()

    await connection.subscribe(f"{inbox}.*", cb=take, pending_msgs_limit=COUNT)
    sent: dict[int, bytes] = {}
    good: list[int] = []
    outcomes: Counter[str] = Counter()
    for start in range(0, COUNT, WINDOW):
        all_here.clear()
        waiting |= set(range(start, start + WINDOW))
        for number in range(start, start + WINDOW):
            valid = dice.random() < 0.1
            if valid:
                good.append(number)
            payload = neighbour(len(good) - 1) if valid else request(dice, "bad")
            if not valid and dice.random() < 0.9:
                payload = spoilt(dice, payload)
            sent[number] = payload
            place = dice.choice(["", f".{dice.randrange(64)}"])
            # some senders want no answer; the endpoint has to cope with that too
            if not valid and dice.random() < 0.02:
                await connection.publish(f"{service.app.name}.cmd", spoilt(dice, request(dice, "bad")))
            await connection.publish(f"{service.app.name}.cmd{place}", payload, reply=f"{inbox}.{number}")
        await connection.flush()
        async with asyncio.timeout(20):
            await all_here.wait()
        for number in range(start, start + WINDOW):
            try:
                outcomes[check_answer(answers[number])] += 1
            except Exception as error:
                raise AssertionError(f"{sent[number][:500]!r} was answered {answers[number][:500]!r}") from error
    print(dict(outcomes))
    assert len(answers) == COUNT
    # the mixture must have inputs for each of these outcomes
    assert {"ok", "malformed", "unknown-aggregate", "unknown-command", "invalid-command"} <= set(outcomes)
    assert outcomes["ok"] > len(good)
    assert "overloaded" not in outcomes

    receipts = [json.loads(answers[number])["ok"] for number in good]
    assert not any(receipt["duplicate"] for receipt in receipts)
    for book in range(50):
        own = receipts[book::50]
        assert sorted(receipt["version"] for receipt in own) == list(range(1, len(own) + 1))
    last = await client.execute(Notebook, "good 0", Note("last", 0))
    await client.query("select 1", after=last, timeout=30)
    rows = await client.query("select * from pages where notebook like 'good %'")
    assert sum(row["notes"] for row in rows) == len(good) + 1
    assert sum(row["total"] for row in rows) == sum(range(len(good)))
    rows = await client.query("select sum(times) as n from words where word like 'good %'")
    assert rows[0]["n"] == len(good)

    await connection.flush()
    assert twice == []
    assert BUGS._value.get() == alerts
    assert service.status()["commands_pending"] == 0
    assert service.status()["projection"]["state"] == "running"
    assert service.health.ready
    assert not service.stopped.is_set()
    await connection.close()


# a value of any shape, which neither the bank nor the notebooks accept


@command
class Pack:
    value: Any


@event
class Packed:
    value: Any


class Box(Aggregate):
    packed_times: int = 0

    @handles
    def pack(self, command: Pack) -> Packed:
        return Packed(command.value)

    @applies
    def packed(self, event: Packed) -> None:
        self.packed_times += 1


class Base(DeclarativeBase):
    pass


class Lid(Base):
    __tablename__ = "lids"
    box: Mapped[str] = mapped_column(primary_key=True)
    packed: Mapped[int] = mapped_column(default=0)


class Lids(Rows[Lid], of=Box):
    @applies
    def packed(self, row: Lid, event: Packed) -> None:
        row.packed += 1


@pytest.mark.parametrize("depth", [250, 300, 700])
async def test_a_command_with_a_deep_value_is_answered_and_its_aggregate_goes_on(
    nats_url: str, app_name: str, tmp_path: Path, depth: int
) -> None:
    service = Service(
        App(app_name, aggregates=[Box], projections=[Lids]), settings_for(tmp_path, nats=nats_url, drain=0.5)
    )
    await service.start()
    alerts = BUGS._value.get()
    connection = await nats.connect(nats_url)
    deep = b'{"aggregate":"Box","id":"b","command":"Pack","data":{"value":%b1%b}}' % (b"[" * depth, b"]" * depth)
    fine = b'{"aggregate":"Box","id":"b","command":"Pack","data":{"value":1}}'
    try:
        for payload in (deep, fine):
            outcome = check_answer((await connection.request(f"{app_name}.cmd", payload, timeout=2)).data)
        assert outcome == "ok"
        assert BUGS._value.get() == alerts
    finally:
        await connection.close()
        # otherwise the stop would wait for a command that gets no answer
        service.parts.gateway.pending.total = 0
        await service.stop()


# the decoder


def test_any_payload_is_a_list_of_envelopes_or_an_invalid_message(dice: random.Random) -> None:
    names = {Noted: ("Noted", 1)}
    made = [
        Decision("c-1", [Noted("one", 1), Noted('tw"o', -(2**60))], "corr", "caus", "00-ab-01"),
        Decision("ç", [Noted("", 0)]),
    ]
    good = [encode("/x/Notebook", "n", names, made[:count], 7, "2013-01-01T12:00:00Z") for count in (1, 2)]
    taken = 0
    for _ in range(COUNT):
        payload = spoilt(dice, dice.choice(good))
        try:
            envelopes = decode(payload)
        except InvalidMessage:
            continue
        except BaseException as error:
            raise AssertionError(f"{payload[:500]!r} gave {type(error).__name__}: {error}") from error
        taken += 1
        assert envelopes
        assert type(envelopes) is list
        assert all(type(envelope) is Envelope and type(envelope.sequence) is int for envelope in envelopes)
    assert COUNT / 100 < taken < COUNT / 2


# the stream


async def test_garbage_in_the_stream_stops_no_projection(
    service: Service, client: Client, dice: random.Random, wait_until: Wait
) -> None:
    names = {Noted: ("Noted", 1)}
    good = encode("/x", "n", names, [Decision("c", [Noted("strange", 1)])], 0, "2013-01-01T12:00:00Z")
    connection = await nats.connect(service.nats_url)
    stream = connection.jetstream()
    subjects = service.parts.log.subjects
    receipts = []
    for number in range(400):
        strange = subjects.address("Notebook", f"strange {dice.randrange(60)}").subject
        odd = dice.choice([strange, strange, f"{service.app.name}.evt.{dice.randrange(70)}.Nobody.x", f"{strange}x"])
        await stream.publish(odd, spoilt(dice, good))
        receipts.append(await client.execute(Notebook, f"good {number % 20}", Note(f"good {number % 7}", number)))
    rows = await client.query("select * from pages where notebook like 'good %'", after=receipts, timeout=20)
    assert [row["notes"] for row in rows] == [20] * 20
    assert sum(row["total"] for row in rows) == sum(range(400))
    assert (await client.query("select sum(times) as n from words where word like 'good %'"))[0]["n"] == 400
    assert (await client.query("select count(*) as n from lines where notebook like 'good %'"))[0]["n"] == 400
    assert service.status()["projection"]["state"] == "running"
    await connection.close()
    engine = open_database(service.database_url, read_only=True)
    with engine.connect() as connection:
        letters = connection.execute(select(dead_letter.c.aggregate_id)).scalars().all()
        kept = connection.scalar(select(func.count()).where(dead_letter.c.projection == ""))
    engine.dispose()
    assert kept
    assert not [aggregate_id for aggregate_id in letters if aggregate_id.startswith("good")]


def foreign(sequence: int, type: str = "Noted", data: bytes = b'{"text":"strange","number":1}') -> bytes:
    template = b'[{"id":"1","type":"%b","time":"2013-01-01T12:00:00Z","sequence":%d,"data":%b}]'
    return template % (type.encode(), sequence, data)


async def check_that_it_goes_on(service: Service, client: Client) -> None:
    receipt = await client.execute(Notebook, "good", Note("good"))
    rows = await client.query("select notes from pages where notebook = 'good'", after=receipt, timeout=3)
    assert rows == [{"notes": 1}]


async def test_foreign_commits_with_odd_numbers_and_subjects_stop_no_projection(
    service: Service, client: Client
) -> None:
    for place, payload in enumerate([foreign(0, "Unheard"), foreign(-5), foreign(9), foreign(2**63 - 1, "Unheard")]):
        await publish(service, service.parts.log.subjects.address("Notebook", f"x{place}").subject, payload)
    for token in ("%0A", "%78", "%FF", "%", "%zz", "~"):
        await publish(service, subject_of(service, token), foreign(1))
    for partition in ("99999999999999999999", "00", "-1", "٣", "é"):
        await publish(service, f"{service.app.name}.evt.{partition}.Notebook.x", foreign(1))
    await check_that_it_goes_on(service, client)


async def test_a_foreign_commit_with_a_huge_sequence_stops_no_projection(service: Service, client: Client) -> None:
    await publish(service, subject_of(service, "x"), foreign(2**70, "Unheard"))
    await check_that_it_goes_on(service, client)


async def test_a_subject_whose_id_holds_a_zero_character_stops_no_projection(service: Service, client: Client) -> None:
    await publish(service, subject_of(service, "%00"), foreign(1))
    await check_that_it_goes_on(service, client)


async def test_a_subject_with_an_odd_digit_for_its_partition_stops_no_projection(
    service: Service, client: Client
) -> None:
    await publish(service, f"{service.app.name}.evt.².Notebook.x", foreign(1))
    await check_that_it_goes_on(service, client)


def subject_of(service: Service, token: str) -> str:
    """Return the subject with this token, in the partition of the token's id."""
    partition = service.parts.log.subjects.partition("Notebook", unquote(token))
    return f"{service.app.name}.evt.{partition}.Notebook.{token}"


async def publish(service: Service, subject: str, payload: bytes) -> None:
    connection = await nats.connect(service.nats_url)
    await connection.jetstream().publish(subject, payload)
    await connection.close()
