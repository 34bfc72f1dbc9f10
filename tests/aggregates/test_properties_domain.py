"""A history gives the same state however it is stored, and any bytes are either a commit or refused."""

# no postponed annotations here: the chains define local classes, which annotations name

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aggregates import (
    Aggregate,
    Context,
    DeclarationError,
    InvalidMessage,
    Rejected,
    SequenceError,
    applies,
    command,
    event,
    handles,
    upcasts,
)
from aggregates.cell import REMEMBERED_COMMANDS, Cell
from aggregates.commit import Decision, Envelope, decode
from aggregates.context import uuid7
from aggregates.declaration import declare
from tests.histories import encode

NOON = "2013-01-01T12:00:00Z"


@event
class Put:
    item: str
    count: int


@event
class Taken:
    item: str
    count: int


@command
class PutIn:
    item: str
    count: int


@command
class TakeOut:
    item: str
    count: int


@command
class Clear:
    pass


class Basket(Aggregate):
    items: dict[str, int] = None  # type: ignore[assignment]
    steps: int = 0

    def __post_init__(self) -> None:
        self.items = {}

    @handles
    def put_in(self, command: PutIn) -> Put:
        return Put(command.item, command.count)

    @handles
    def take_out(self, command: TakeOut) -> list[Taken]:
        if self.items.get(command.item, 0) < command.count:
            raise Rejected(f"there are not {command.count}")
        return [Taken(command.item, 1) for _ in range(command.count)]

    @handles
    def clear(self, command: Clear) -> tuple[Taken, ...] | None:
        return tuple(Taken(item, count) for item, count in self.items.items()) or None

    @applies
    def changed(self, event: Put | Taken) -> None:
        count = self.items.get(event.item, 0) + (event.count if isinstance(event, Put) else -event.count)
        # the state depends on the order, so that a fold in another order shows
        self.items = {**{key: value for key, value in self.items.items() if key != event.item}, event.item: count}
        self.items = {key: value for key, value in self.items.items() if value}
        self.steps = (self.steps * 31 + count + 1) % 1_000_003


BASKET = declare(Basket)
NAMES = {declared.cls: (declared.name, declared.version) for declared in BASKET.events.values()}
items = st.sampled_from(["apple", "pear", "fig", ""])
commands = st.one_of(
    st.builds(PutIn, items, st.integers(1, 3)), st.builds(TakeOut, items, st.integers(1, 3)), st.just(Clear())
)
# so few ids that some repeat
orders = st.lists(st.tuples(st.sampled_from([f"c{n}" for n in range(14)]), commands), max_size=30)


def decided(cell: Cell[Basket], wanted: Iterable[tuple[str, Any]]) -> list[Decision]:
    """Let the cell decide and evolve, one command after the other; return what it decided."""
    made = []
    for command_id, wanted_command in wanted:
        try:
            events = cell.decide(wanted_command, Context(command_id))
        except Rejected:
            continue
        cell.evolve(events)
        if events:
            made.append(Decision(command_id, events))
    return made


def stored(decisions: Sequence[Decision], after: int = 0) -> list[Envelope]:
    return decode(encode("/shop/Basket", "b", NAMES, decisions, after, NOON)) if decisions else []


def cut(envelopes: Sequence[Envelope], places: Iterable[int]) -> list[Sequence[Envelope]]:
    """Return the envelopes as commits, cut at these places (modulo their number)."""
    at = sorted({place % len(envelopes) for place in places} | {0, len(envelopes)}) if envelopes else []
    return [envelopes[start:end] for start, end in itertools.pairwise(at)]


def replayed(commits: Iterable[Sequence[Envelope]]) -> Cell[Basket]:
    cell = Cell(BASKET, "b")
    for position, commit in enumerate(commits, 1):
        cell.replay(commit, position * 10)
    return cell


def receipts(commits: Iterable[Sequence[Envelope]]) -> dict[str, tuple[int, int]]:
    """Return the receipts that a cell must remember: for each of the latest commands, where its last event is."""
    found: dict[str, tuple[int, int]] = {}
    for position, commit in enumerate(commits, 1):
        for envelope in commit:
            found[envelope.commandid] = (envelope.sequence, position * 10)
            if len(found) > REMEMBERED_COMMANDS:
                del found[next(iter(found))]
    return found


# the cell


@given(wanted=orders)
def test_any_history_replays_to_the_same_state(wanted: list[tuple[str, Any]]) -> None:
    live = Cell(BASKET, "b")
    decisions = decided(live, wanted)
    again = replayed([stored(decisions)] if decisions else [])
    assert again.state == live.state
    assert list(again.state.items.items()) == list(live.state.items.items())
    assert again.version == live.version == sum(len(decision.events) for decision in decisions)


@given(wanted=orders, places=st.lists(st.integers(0, 100), max_size=10))
def test_any_split_into_commits_gives_the_same_cell(wanted: list[tuple[str, Any]], places: list[int]) -> None:
    live = Cell(BASKET, "b")
    history = stored(decided(live, wanted))
    commits = cut(history, places)
    cell = replayed(commits)
    assert (cell.state, cell.version) == (live.state, live.version)
    assert cell.position == 10 * len(commits)
    assert cell.commands == receipts(commits)
    whole = replayed([history] if history else [])
    assert {command_id: version for command_id, (version, _) in cell.commands.items()} == {
        command_id: version for command_id, (version, _) in whole.commands.items()
    }


@given(wanted=orders)
def test_deciding_changes_nothing_until_it_evolves(wanted: list[tuple[str, Any]]) -> None:
    cell, twin = Cell(BASKET, "b"), Cell(BASKET, "b")
    for command_id, wanted_command in wanted:
        try:
            first = cell.decide(wanted_command, Context(command_id))
        except Rejected:
            first = []
        assert (cell.state, cell.version, cell.commands) == (twin.state, twin.version, twin.commands)
        cell.evolve(first)
        twin.evolve(first)


@given(
    wanted=orders.filter(bool),
    spoil=st.sampled_from(["gap", "repeat", "swap"]),
    place=st.integers(0, 1000),
    places=st.lists(st.integers(0, 100), max_size=5),
)
def test_a_gap_or_a_repeat_anywhere_is_a_sequence_error(
    wanted: list[tuple[str, Any]], spoil: str, place: int, places: list[int]
) -> None:
    history = stored(decided(Cell(BASKET, "b"), [("first", PutIn("fig", 1)), ("second", PutIn("fig", 1)), *wanted]))
    at = place % (len(history) - 1)
    odd = {
        "gap": [*history[:at], *history[at + 1 :]],
        "repeat": [*history[: at + 1], *history[at:]],
        "swap": [*history[:at], history[at + 1], history[at], *history[at + 2 :]],
    }[spoil]
    with pytest.raises(SequenceError, match=f"after {at + 1 if spoil == 'repeat' else at}$"):
        replayed(cut(odd, places))


class BasketsLife(RuleBasedStateMachine):
    """A cell that decides, is dropped and reloaded, and meets another writer, compared with a plain counter."""

    @initialize()
    def empty(self) -> None:
        self.cell = Cell(BASKET, "b")
        self.log: list[tuple[int, list[Envelope]]] = []
        self.counts: dict[str, int] = {}
        self.ids = 0

    def _append(self, events: Sequence[Any], after: int) -> tuple[str, int]:
        self.ids += 1
        position = self.log[-1][0] + 7 if self.log else 7
        self.log.append((position, stored([Decision(f"c{self.ids}", events)], after)))
        for fact in (getattr(fact, "event", fact) for fact in events):
            change = fact.count if isinstance(fact, Put) else -fact.count
            self.counts[fact.item] = self.counts.get(fact.item, 0) + change
        return f"c{self.ids}", position

    @rule(command=commands)
    def execute(self, command: Any) -> None:
        try:
            events = self.cell.decide(command, Context("c"))
        except Rejected:
            assert isinstance(command, TakeOut)
            assert self.counts.get(command.item, 0) < command.count
            return
        before = self.cell.version
        self.cell.evolve(events)
        if events:
            command_id, position = self._append(events, before)
            self.cell.position = position
            self.cell.remember(command_id, self.cell.version, position)

    @rule(command=commands)
    def fail_to_append(self, command: Any) -> None:
        try:
            self.cell.evolve(self.cell.decide(command, Context("c")))
        except Rejected:
            return
        self.load()

    @rule(item=items, count=st.integers(1, 3))
    def be_overtaken(self, item: str, count: int) -> None:
        self._append([Put(item, count)], self.cell.version)
        self.load()

    @rule()
    def load(self) -> None:
        self.cell = Cell(BASKET, "b")
        for position, commit in self.log:
            self.cell.replay(commit, position)

    @precondition(lambda self: self.log)
    @rule()
    def replay_the_last_commit_again(self) -> None:
        with pytest.raises(SequenceError):
            self.cell.replay(self.log[-1][1], self.log[-1][0])

    @invariant()
    def the_cell_is_what_the_counter_says(self) -> None:
        assert self.cell.state.items == {item: count for item, count in self.counts.items() if count}
        assert self.cell.version == sum(len(commit) for _, commit in self.log)
        assert self.cell.position == (self.log[-1][0] if self.log else 0)
        latest = self.log[-REMEMBERED_COMMANDS:]
        assert list(self.cell.commands.items()) == [
            (commit[-1].commandid, (commit[-1].sequence, position)) for position, commit in latest
        ]


TestABasketsLife = BasketsLife.TestCase
TestABasketsLife.settings = settings(max_examples=60, stateful_step_count=30)


def test_a_command_id_of_any_age_is_known_and_a_new_one_is_not_mistaken_for_one() -> None:
    cell = Cell(BASKET, "b")
    known = [uuid7() for _ in range(20_000)]
    for number, command_id in enumerate(known, 1):
        cell.remember(command_id, number, number)
    assert all(command_id in cell.seen or command_id in cell.commands for command_id in known)
    # a false positive costs reading the whole history, so there must be next to none, however many ids are known
    assert sum(uuid7() in cell.seen for _ in range(100_000)) == 0


# the envelope


@event(name="thing.held")
class Held:
    value: Any
    table: dict[str, Any]


class Thing(Aggregate):
    @applies
    def held(self, event: Held) -> None: ...


THING = declare(Thing)
HELD = {Held: ("thing.held", 1)}
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
# values that JSON can represent, with integers of 64 bits
plain = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
# and values that it can't: infinite numbers, longer integers, lone surrogates, and other objects
odd = st.floats() | st.integers() | st.text(max_size=3) | st.builds(object) | st.just(2**64) | st.just("\ud800")


def nested(leaves: st.SearchStrategy[Any], keys: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=10
    )


storable = nested(plain | texts, texts)
helds = st.builds(Held, storable, st.dictionaries(texts, storable, max_size=3))
maybe = st.none() | texts
decisions = st.lists(
    st.builds(
        Decision, command_id=texts, events=st.lists(helds, min_size=1, max_size=3), correlation_id=maybe,
        causation_id=maybe, traceparent=maybe,
    ),
    min_size=1,
    max_size=3,
)  # fmt: skip


def exact(value: Any) -> Any:
    """Return the value in a form in which 1, 1.0 and True differ, and 0.0 and -0.0 too."""
    if isinstance(value, dict):
        return {key: exact(inner) for key, inner in value.items()}
    return [exact(inner) for inner in value] if isinstance(value, list) else (type(value), repr(value))


@given(made=decisions, id=texts, after=st.integers(0, 2**53))
def test_any_storable_events_come_back_with_all_their_ids(made: list[Decision], id: str, after: int) -> None:
    payload = encode("/x/Thing", id, HELD, made, after, NOON)
    expected = [(decision, event) for decision in made for event in decision.events]
    for envelope, (decision, original), sequence in zip(
        decode(payload), expected, range(after + 1, 2**60), strict=False
    ):
        back = THING.events[envelope.type].decode(envelope.data, envelope.dataversion)
        assert (exact(back.value), exact(back.table)) == (exact(original.value), exact(original.table))
        assert (envelope.sequence, envelope.time, envelope.commandid) == (sequence, NOON, decision.command_id)
        assert envelope.correlation_id == decision.correlation_id
        assert envelope.causation_id == decision.causation_id
        assert envelope.traceparent == decision.traceparent
    assert [envelope["subject"] for envelope in orjson.loads(payload)] == [id] * len(expected)


@given(value=nested(plain | odd, st.text(max_size=3)))
def test_any_value_is_stored_as_it_is_or_refused(value: Any) -> None:
    try:
        payload = encode("/x/Thing", "1", HELD, [Decision("c", [Held(value, {})])], 0, NOON)
    except (InvalidMessage, TypeError):
        return
    (envelope,) = decode(payload)
    assert exact(THING.events["thing.held"].decode(envelope.data, 1).value) == exact(value)


@pytest.mark.parametrize("depth", [10, 200, 300, 400, 600, 900, 5_000])
def test_a_value_of_any_depth_is_stored_as_it_is_or_refused(depth: int) -> None:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    try:
        payload = encode("/x/Thing", "1", HELD, [Decision("c", [Held(value, {})])], 0, NOON)
    except (InvalidMessage, TypeError):
        assert depth > 200
        return
    (envelope,) = decode(payload)
    assert bytes(envelope.data).count(b"[") == depth


marks = [b"[", b"]", b"{", b"}", b'"', b":", b",", b" ", b"\\u0000", b"\\ud800", b"\xff", b"\xed\xa0\x80"]
fields = [b'"id"', b'"type"', b'"time"', b'"sequence"', b'"data"', b'"commandid"']
numbers = [b"1", b"-1", b"1e999", b"9" * 40, b"9" * 5_000, b"null"]
quoted = [b'"a"', b'""', b'"\\u0000"', b'"\\ud800"', b'"\xff"', b'"\xed\xa0\x80"', b'[{"a":[]}]']
pieces = st.sampled_from([*marks, *fields, *numbers, *quoted])
values = st.sampled_from([*numbers, *quoted]) | st.sampled_from([b'"a"', b"1"])
envelope_texts = st.fixed_dictionaries(
    dict.fromkeys(("id", "type", "time", "sequence", "data"), values),
    optional=dict.fromkeys(("dataversion", "commandid", "correlationid", "x"), values),
).map(lambda parts: b"[{" + b",".join(b'"%b":%b' % (name.encode(), part) for name, part in parts.items()) + b"}]")


@settings(max_examples=500)
@given(payload=st.binary(max_size=60) | st.lists(pieces, max_size=30).map(b"".join) | envelope_texts)
def test_any_bytes_are_envelopes_or_an_invalid_message(payload: bytes) -> None:
    try:
        envelopes = decode(payload)
    except InvalidMessage:
        return
    assert envelopes
    assert all(type(envelope) is Envelope and type(envelope.sequence) is int for envelope in envelopes)


# upcasters


def step(version: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda fields: {"steps": [*fields["steps"], version]}


def grown(version: int, links: Iterable[int]) -> type[Aggregate]:
    """Return an aggregate whose event has this version, with upcasters from these versions."""

    @event(version=version)
    class Grown:
        steps: list[int]

    class Plant(Aggregate):
        seen: list[int] = None  # type: ignore[assignment]

        @applies
        def grow(self, event: Grown) -> None:
            self.seen = event.steps

    for link in links:
        setattr(Plant, f"from_{link}", staticmethod(upcasts(Grown, version=link)(step(link))))
    return Plant


def old_envelope(version: int, data: bytes = b'{"steps":[]}') -> Envelope:
    return Envelope("1", "Grown", NOON, 1, msgspec.Raw(data), version)


@given(version=st.integers(1, 15), since=st.integers(1, 15))
def test_a_chain_of_any_length_leads_from_any_version_to_the_present(version: int, since: int) -> None:
    cell = Cell(declare(grown(version, range(1, version))), "p")
    if since > version:
        with pytest.raises(InvalidMessage, match="too old"):
            cell.replay([old_envelope(since)], 1)
    else:
        cell.replay([old_envelope(since)], 1)
        assert cell.state.seen == list(range(since, version))  # type: ignore[attr-defined]


@given(version=st.integers(2, 15), links=st.sets(st.integers(-1, 16)))
def test_a_missing_or_superfluous_upcaster_is_reported_at_start(version: int, links: set[int]) -> None:
    missing = [link for link in range(1, version) if link not in links]
    superfluous = [link for link in links if not 1 <= link < version]
    if not missing and not superfluous:
        declare(grown(version, links))
        return
    with pytest.raises(DeclarationError) as error:
        declare(grown(version, links))
    problems = "\n".join(error.value.problems)
    assert (f"no upcaster from version {missing[0]};" in problems) if missing else ("no upcaster" not in problems)
    for link in superfluous:
        assert f"upcasts version {link} of Grown, whose version is {version}" in problems


@given(
    version=st.integers(2, 6),
    since=st.integers(-3, 10) | st.integers(),
    data=storable.map(orjson.dumps) | st.binary(max_size=8),
)
def test_any_data_of_an_old_event_is_an_event_or_an_invalid_message(version: int, since: int, data: bytes) -> None:
    cell = Cell(declare(grown(version, range(1, version))), "p")
    try:
        cell.replay([old_envelope(since, data)], 1)
    except InvalidMessage:
        assert cell.version == 0
        assert cell.commands == {}
        return
    assert 1 <= since <= version
    assert all(type(number) is int for number in cell.state.seen)  # type: ignore[attr-defined]


def test_numbers_that_json_cannot_represent_are_refused_at_any_depth() -> None:
    for number in (math.inf, -math.inf, math.nan):
        for value in (number, [number], {"a": [{"b": number}]}):
            with pytest.raises(InvalidMessage, match="JSON cannot represent"):
                encode("/x/Thing", "1", HELD, [Decision("c", [Held(value, {})])], 0, NOON)
