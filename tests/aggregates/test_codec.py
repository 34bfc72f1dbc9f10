"""Stored commits are CloudEvents: decided events come back unchanged, and other bytes are refused."""

# no postponed annotations here: the test cases define local classes, which annotations name

import enum
import math
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregates import Aggregate, DeclarationError, InvalidMessage, applies, command, event
from aggregates.commit import Decision, Envelope, decode, timestamp
from aggregates.context import uuid7
from aggregates.declaration import declare
from aggregates.messages import dumps, parse
from tests.histories import encode


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Size(enum.IntEnum):
    SMALL = 1
    LARGE = 2


@dataclass(frozen=True)
class Place:
    name: str
    height: float | None = None


@event(name="bag.packed")
class Packed:
    text: str
    number: int
    ratio: float
    flag: bool
    nothing: str | None
    day: date
    moment: datetime
    price: Decimal
    key: UUID
    colour: Colour
    size: Size
    words: list[str]
    counts: dict[str, int]
    place: Place
    places: list[Place]
    pair: tuple[int, str]
    tags: frozenset[int]


class Bag(Aggregate):
    packed_times: int = 0

    @applies
    def packed(self, event: Packed) -> None:
        self.packed_times += 1


NAMES = {Packed: ("bag.packed", 1)}

# values that JSON can represent: no lone surrogates; numbers of 64 bits, and finite
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
integers = st.integers(-(2**63), 2**63 - 1)
floats = st.floats(allow_nan=False, allow_infinity=False)
offsets = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
moments = st.one_of(
    st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC)),
    st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1), timezones=offsets),
    st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1)),
)
places = st.builds(Place, texts, st.none() | floats)
packed = st.builds(
    Packed,
    text=texts,
    number=integers,
    ratio=floats,
    flag=st.booleans(),
    nothing=st.none() | texts,
    day=st.dates(),
    moment=moments,
    price=st.decimals(allow_nan=False, allow_infinity=False),
    key=st.uuids(),
    colour=st.sampled_from(Colour),
    size=st.sampled_from(Size),
    words=st.lists(texts, max_size=4),
    counts=st.dictionaries(texts, integers, max_size=4),
    place=places,
    places=st.lists(places, max_size=3),
    pair=st.tuples(integers, texts),
    tags=st.frozensets(integers, max_size=3),
)
decisions = st.lists(
    st.tuples(
        texts,
        st.lists(packed, min_size=1, max_size=3),
        *(st.none() | texts, st.none() | texts, st.none() | texts),
        st.integers(0, 2**31 - 1),
    ),
    min_size=1,
    max_size=3,
)


DECLARED = declare(Bag)


def event_of(envelope: Envelope) -> Any:
    return DECLARED.events[envelope.type].decode(envelope.data, envelope.dataversion)


@settings(max_examples=150)
@given(decided=decisions, id=texts, sequence=st.integers(0, 10**12))
def test_a_commit_comes_back_as_it_was_decided(decided: list[Any], id: str, sequence: int) -> None:
    made = [Decision(*fields) for fields in decided]
    moment = timestamp()
    envelopes = decode(encode("/bags/Bag", id, NAMES, made, sequence, moment))
    expected = [(decision, event) for decision in made for event in decision.events]
    assert len(envelopes) == len(expected)
    for place, (envelope, (decision, original)) in enumerate(zip(envelopes, expected, strict=True), 1):
        back = event_of(envelope)
        assert back == original
        assert repr(back.ratio) == repr(original.ratio)
        assert str(back.price) == str(original.price)
        assert back.moment.utcoffset() == original.moment.utcoffset()
        assert (envelope.type, envelope.dataversion, envelope.time) == ("bag.packed", 1, moment)
        assert envelope.sequence == sequence + place
        assert envelope.commandid == decision.command_id
        assert envelope.correlation_id == decision.correlation_id
        assert envelope.causation_id == decision.causation_id
        assert envelope.traceparent == decision.traceparent
        assert envelope.depth == decision.depth


@settings(max_examples=50)
@given(message=packed)
def test_a_message_is_parsed_from_what_it_was_dumped_to(message: Packed) -> None:
    assert parse(Packed, orjson.loads(dumps(message))) == message


@settings(max_examples=50)
@given(decided=decisions, id=texts.filter(bool))
def test_a_commit_is_a_cloudevents_batch(decided: list[Any], id: str) -> None:
    commit = encode("/bags/Bag", id, NAMES, [Decision(*fields) for fields in decided], 0, timestamp())
    batch = orjson.loads(commit)
    assert isinstance(batch, list)
    for item in batch:
        assert item["specversion"] == "1.0"
        assert item["source"] == "/bags/Bag"
        assert item["type"] == "bag.packed"
        assert item["subject"] == id
        assert uuid.UUID(item["id"]).version == 7
        assert datetime.fromisoformat(item["time"]).utcoffset() == timedelta(0)
        assert isinstance(item["data"], dict)
        assert item.get("depth") != 0
        # names of attributes: lower-case letters and digits only; no attribute is null; simple types
        for name, value in item.items():
            assert name.isascii()
            assert name.isalnum()
            assert name == name.lower()
            assert value is not None
            assert name == "data" or isinstance(value, str | int)
    assert len({item["id"] for item in batch}) == len(batch)


# values that would not come back


def test_a_number_that_json_cannot_represent_is_not_stored_as_something_else() -> None:
    @event
    class Measured:
        value: float

    class Gauge(Aggregate):
        @applies
        def measured(self, event: Measured) -> None: ...

    for value in (math.inf, -math.inf, math.nan):
        try:
            stored = encode("/g", "1", {Measured: ("Measured", 1)}, [Decision("", [Measured(value)])], 0, timestamp())
        except InvalidMessage:
            continue
        back = declare(Gauge).events["Measured"].decode(decode(stored)[0].data, 1)
        assert repr(back.value) == repr(value)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (dict[int, str], {1: "one", -2: "two"}),
        (dict[date, int], {date(2013, 1, 1): 5}),
        (dict[UUID, int], {UUID(int=7): 5}),
        (dict[Colour, int], {Colour.RED: 5}),
        (dict[str, dict[int, str]], {"a": {1: "one"}}),
        (bytes, b"\x00\xff raw"),
        (timedelta, timedelta(days=1, seconds=2, microseconds=3)),
        (set[date], {date(2013, 1, 1)}),
        (int | str | None, "text"),
        (list[tuple[str, Decimal]], [("a", Decimal("1.10"))]),
    ],
    ids=str,
)
def test_a_declared_field_is_carried_or_refused_at_start(annotation: Any, value: Any) -> None:
    @event
    class Held:
        field: annotation  # type: ignore[valid-type]

    class Holder(Aggregate):
        @applies
        def held(self, event: Held) -> None: ...

    try:
        declared = declare(Holder)
    except DeclarationError:
        return
    stored = encode("/h", "1", {Held: ("Held", 1)}, [Decision("", [Held(value)])], 0, timestamp())
    assert declared.events["Held"].decode(decode(stored)[0].data, 1) == Held(value)
    assert parse(Held, orjson.loads(dumps(Held(value)))) == Held(value)


def test_a_field_whose_name_begins_with_an_underscore_is_carried_or_refused_at_start() -> None:
    @event
    class Hidden:
        _secret: int

    class Holder(Aggregate):
        @applies
        def hidden(self, event: Hidden) -> None: ...

    try:
        declared = declare(Holder)
    except DeclarationError:
        return
    stored = encode("/h", "1", {Hidden: ("Hidden", 1)}, [Decision("", [Hidden(5)])], 0, timestamp())
    assert declared.events["Hidden"].decode(decode(stored)[0].data, 1) == Hidden(5)


# bytes that are not a commit


@settings(max_examples=300)
@given(payload=st.binary(max_size=200))
def test_random_bytes_are_no_commit(payload: bytes) -> None:
    with pytest.raises(InvalidMessage, match="not a commit"):
        decode(payload)


json_values = st.recursive(
    st.none() | st.booleans() | integers | floats | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
near_commits = st.lists(
    st.dictionaries(
        st.sampled_from(["id", "type", "time", "sequence", "data", "dataversion", "commandid", "causationid", "x"]),
        json_values,
    ),
    max_size=3,
)


@settings(max_examples=300)
@given(value=json_values | near_commits)
def test_other_json_is_a_commit_or_an_invalid_message(value: Any) -> None:
    try:
        envelopes = decode(orjson.dumps(value))
    except InvalidMessage:
        return
    assert envelopes
    assert all(isinstance(envelope.sequence, int) and isinstance(envelope.type, str) for envelope in envelopes)


@settings(max_examples=300)
@given(message=packed, cut=st.integers(0, 10_000), flipped=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_spoilt_commit_is_a_commit_or_an_invalid_message(message: Packed, cut: int, flipped: int, byte: int) -> None:
    good = encode("/bags/Bag", "1", NAMES, [Decision("c", [message])], 0, timestamp())
    with pytest.raises(InvalidMessage):
        decode(good[: cut % len(good)])
    spoilt = bytearray(good)
    spoilt[flipped % len(good)] = byte
    try:
        for envelope in decode(bytes(spoilt)):
            if envelope.type in DECLARED.events:
                event_of(envelope)
    except InvalidMessage:
        pass


@pytest.mark.parametrize("payload", [b"[]", b"", b"null", b"{}", b"\xff\xfe", b"[" * 100_000, b"[[[[]]]]"])
def test_bytes_without_events_are_not_a_commit(payload: bytes) -> None:
    with pytest.raises(InvalidMessage):
        decode(payload)


# parse


@command
class Send:
    to: str
    cents: int
    note: str | None = None


@command
class Empty:
    pass


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"to": "x", "cents": 1, "extra": 2}, ["Send", "'extra'", "cents, note, to"]),
        ({"to": "x"}, ["Send", "cents"]),
        ({"to": "x", "cents": "1"}, ["Send", "cents"]),
        ({"to": None, "cents": 1}, ["Send", "to"]),
        ({"to": "x", "cents": 1.5}, ["Send", "cents"]),
        ({"to": "x", "cents": True}, ["Send", "cents"]),
        ([1, 2], ["Send", "list"]),
        (None, ["Send", "NoneType"]),
        ("text", ["Send", "str"]),
    ],
)
def test_a_wrong_field_is_named(data: Any, words: list[str]) -> None:
    with pytest.raises(InvalidMessage) as error:
        parse(Send, data)
    for word in words:
        assert word in str(error.value)


def test_a_field_of_a_message_without_fields_is_named() -> None:
    assert parse(Empty, {}) == Empty()
    with pytest.raises(InvalidMessage, match="no fields"):
        parse(Empty, {"a": 1})


def test_a_right_message_is_parsed_with_its_defaults() -> None:
    assert parse(Send, {"to": "x", "cents": 5}) == Send("x", 5, None)


# ids


def test_event_ids_are_version_7_unique_and_ordered_by_time() -> None:
    before = datetime.now(UTC)
    made = [uuid7() for _ in range(100_000)]
    after = datetime.now(UTC)
    assert made == sorted(made)
    assert len(set(made)) == len(made)
    for text in (made[0], made[54_321], made[-1]):
        parsed = uuid.UUID(text)
        assert str(parsed) == text
        assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
        moment = datetime.fromtimestamp((parsed.int >> 80) / 1000, UTC)
        assert before - timedelta(seconds=1) <= moment <= after + timedelta(seconds=1)


def test_event_ids_are_ordered_even_while_the_clock_stands_or_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [uuid7()]
    now = time.time_ns()
    clock = iter([now] * 5000 + [now - 3_600_000_000_000] * 5000)
    monkeypatch.setattr(time, "time_ns", lambda: next(clock))
    made += [uuid7() for _ in range(10_000)]
    assert made == sorted(set(made))


def test_a_timestamp_is_rfc_3339_in_utc() -> None:
    text = timestamp()
    assert text.endswith("Z")
    assert abs(datetime.fromisoformat(text) - datetime.now(UTC)) < timedelta(minutes=1)
