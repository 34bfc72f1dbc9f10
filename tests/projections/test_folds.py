"""Events become rows, tallies and statements, however they are batched."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import BigInteger, DateTime, Engine, Numeric, String, Text, delete, insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import Aggregate, applies, event, upcasts
from kernel import App
from projections import DROP, Drop, Meta, Recorded, Rows, Sql, Tallies, Tally, Transaction
from tests.conftest import Commit, ReadSide, envelopes

HALF = Decimal("0.5")


@event
class Opened:
    owner: str
    on: date


@event
class Paid:
    cents: int
    rate: Decimal
    at: datetime


@event
class Flagged:
    flag: bool
    note: str | None
    ratio: float | None


@event(version=2)
class Renamed:
    owner: str


@event
class Closed:
    pass


@event
class Ignored:
    pass


class Ledger(Aggregate):
    @applies
    def any(self, event: Opened | Paid | Flagged | Renamed | Closed | Ignored) -> None:
        pass

    @staticmethod
    @upcasts(Renamed, version=1)
    def owner_not_name(fields: dict[str, Any]) -> dict[str, Any]:
        return {"owner": fields["name"]}


class Base(DeclarativeBase):
    pass


class Sheet(Base):
    __tablename__ = "sheets"
    id: Mapped[str] = mapped_column(String(200), primary_key=True)
    owner: Mapped[str | None] = mapped_column(Text)
    opened: Mapped[date | None]
    cents: Mapped[int] = mapped_column(BigInteger, default=7)
    rate: Mapped[Decimal | None] = mapped_column(Numeric(20, 4))
    paid: Mapped[datetime | None] = mapped_column(DateTime(timezone=False))
    flag: Mapped[bool] = mapped_column(default=False)
    note: Mapped[str | None] = mapped_column("Select", Text)  # a column whose name is an SQL keyword
    ratio: Mapped[float | None]
    events: Mapped[int] = mapped_column(default=lambda: 0)


class DayTotal(Base):
    __tablename__ = "day_totals"
    prefix: Mapped[str] = mapped_column(primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    payments: Mapped[int]
    cents: Mapped[int] = mapped_column(BigInteger)
    weight: Mapped[Decimal]


class Entry(Base):
    __tablename__ = "entries"
    id: Mapped[str] = mapped_column(primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True)
    what: Mapped[str]


class Sheets(Rows[Sheet], of=Ledger):
    @applies
    def opened(self, row: Sheet, event: Opened) -> None:
        row.owner, row.opened = event.owner, event.on
        row.events += 1

    @applies
    def paid(self, row: Sheet, event: Paid) -> None:
        row.cents += event.cents
        row.rate, row.paid = event.rate, event.at
        row.events += 1

    @applies
    def flagged(self, row: Sheet, event: Flagged) -> None:
        row.flag, row.note, row.ratio = event.flag, event.note, event.ratio
        row.events += 1

    @applies
    def renamed(self, row: Sheet, event: Renamed) -> None:
        row.owner = event.owner
        row.events += 1

    @applies
    def closed(self, row: Sheet, event: Closed) -> Drop:
        return DROP


class DayTotals(Tallies[DayTotal], of=Ledger):
    @applies
    def paid(self, tally: Tally[DayTotal], event: Paid, meta: Meta) -> None:
        entry = tally[meta.aggregate_id.split("/")[0], event.at.date()]
        entry.payments += 1
        entry.cents += event.cents
        entry.weight += HALF


class Entries(Sql, of=Ledger):
    tables = (Entry,)

    @applies
    def written(self, tx: Transaction, events: Sequence[Recorded[Opened | Paid | Renamed]]) -> None:
        rows = [
            {
                "id": recorded.meta.aggregate_id,
                "sequence": recorded.meta.sequence,
                "what": type(recorded.event).__name__,
            }
            for recorded in events
        ]
        tx.execute(insert(tx.table(Entry)), rows)

    @applies
    def closed(self, tx: Transaction, events: Sequence[Recorded[Closed]]) -> None:
        table = tx.table(Entry)
        for recorded in events:
            kept = tx.execute(select(table).where(table.c.id == recorded.meta.aggregate_id)).all()
            tx.execute(delete(table).where(table.c.id == recorded.meta.aggregate_id))
            tx.execute(
                insert(table),
                {"id": recorded.meta.aggregate_id, "sequence": recorded.meta.sequence, "what": f"had {len(kept)}"},
            )


def app() -> App:
    return App("ledgers", aggregates=[Ledger], projections=[Sheets, DayTotals, Entries])


@pytest.fixture
def side(engine: Engine) -> ReadSide:
    return ReadSide(engine, app())


def commits(history: Sequence[tuple[str, list[Any]]], start: int = 1) -> list[Commit]:
    """Make commits of (id, events), each with the next stream sequence."""
    versions: dict[str, int] = defaultdict(int)
    made = []
    for sequence, (ledger, events) in enumerate(history, start):
        made.append((sequence, "Ledger", ledger, envelopes(Ledger, events, versions[ledger])))
        versions[ledger] += len(events)
    return made


# the specification: a plain fold, one event after the other


@dataclass
class Plain:
    owner: str | None = None
    opened: date | None = None
    cents: int = 7
    rate: Decimal | None = None
    paid: datetime | None = None
    flag: bool = False
    note: str | None = None
    ratio: float | None = None
    events: int = 0


def folded_plainly(history: Sequence[tuple[str, list[Any]]]) -> tuple[dict[str, Plain], dict[Any, Any]]:
    sheets: dict[str, Plain] = {}
    days: dict[Any, Any] = defaultdict(lambda: (0, 0, Decimal(0)))
    for ledger, events in history:
        for fact in events:
            sheet = sheets.get(ledger, Plain())
            match fact:
                case Closed():
                    sheets.pop(ledger, None)
                    continue
                case Ignored():
                    continue
                case Opened():
                    sheet = replace(sheet, owner=fact.owner, opened=fact.on)
                case Paid():
                    sheet = replace(sheet, cents=sheet.cents + fact.cents, rate=fact.rate, paid=fact.at)
                    payments, cents, weight = days[ledger.split("/")[0], fact.at.date()]
                    days[ledger.split("/")[0], fact.at.date()] = (payments + 1, cents + fact.cents, weight + HALF)
                case Flagged():
                    sheet = replace(sheet, flag=fact.flag, note=fact.note, ratio=fact.ratio)
                case Renamed():
                    sheet = replace(sheet, owner=fact.owner)
            sheets[ledger] = replace(sheet, events=sheet.events + 1)
    return sheets, dict(days)


def plain(row: Sheet) -> Plain:
    return Plain(**{name: getattr(row, name) for name in Plain.__dataclass_fields__})


# text that both databases can hold: PostgreSQL accepts no zero byte
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
moments = st.datetimes(datetime(2000, 1, 1), datetime(2000, 1, 4))
events = st.one_of(
    st.builds(Opened, texts, st.dates()),
    st.builds(Paid, st.integers(-(10**12), 10**12), st.decimals(-(10**9), 10**9, places=4, allow_nan=False), moments),
    st.builds(
        Flagged,
        st.booleans(),
        st.none() | texts,
        st.none() | st.floats(-1e9, 1e9, allow_nan=False).map(lambda value: round(value, 3)),
    ),
    st.builds(Renamed, texts),
    st.just(Closed()),
    st.just(Ignored()),
)
histories = st.lists(
    st.tuples(st.sampled_from("abc"), st.lists(events, min_size=1, max_size=4)), min_size=1, max_size=15
)
run = itertools.count()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(history=histories, cuts=st.sets(st.integers(1, 14)))
def test_rows_and_tallies_equal_a_plain_fold_however_the_events_are_batched(
    side: ReadSide, history: list[tuple[str, list[Any]]], cuts: set[int]
) -> None:
    """Each example uses its own ids, so that examples share the database but not their rows."""
    start = side.position.highest + 1
    prefix = f"run{next(run)}"
    history = [(f"{prefix}/{ledger}", events) for ledger, events in history]
    made = commits(history, start)
    for first, last in itertools.pairwise([0, *sorted(cut for cut in cuts if cut < len(made)), len(made)]):
        assert side.project(made[first:last]) == []
        side.claim()
    sheets, days = folded_plainly(history)
    assert {row.id: plain(row) for row in side.rows(Sheet) if row.id.startswith(prefix + "/")} == sheets
    tallied = {
        (row.prefix, row.day): (row.payments, row.cents, row.weight)
        for row in side.rows(DayTotal)
        if row.prefix == prefix
    }
    assert tallied == days


# rows


def test_a_rows_changes_within_a_batch_are_one_row_to_write(side: ReadSide) -> None:
    history = [("a", [Renamed(f"name {number}")]) for number in range(50)] + [("b", [Renamed("other")])]
    folded = side.fold(commits(history))
    assert folded.count == 51
    assert {key: row.owner for key, row in folded.rows[0].items()} == {"a": "name 49", "b": "other"}
    write = side.freeze(commits(history), folded)
    assert write.ids[0] == ["a", "b"]


def test_a_new_row_has_the_columns_defaults(side: ReadSide) -> None:
    side.project(commits([("a", [Renamed("me")])]))
    (row,) = side.rows(Sheet)
    assert plain(row) == Plain(owner="me", events=1)


def test_a_dropped_row_is_deleted_and_a_later_event_starts_a_new_one(side: ReadSide) -> None:
    made = commits(
        [
            ("a", [Renamed("one"), Flagged(True, "note", 1.5)]),
            ("b", [Renamed("stays")]),
            ("a", [Closed()]),
            ("a", [Renamed("two")]),
            ("a", [Closed(), Renamed("three"), Closed()]),
            ("a", [Closed()]),
        ]
    )
    expected = [
        {"a": Plain(owner="one", flag=True, note="note", ratio=1.5, events=2)},
        {"a": Plain(owner="one", flag=True, note="note", ratio=1.5, events=2), "b": Plain(owner="stays", events=1)},
        {"b": Plain(owner="stays", events=1)},
        {"a": Plain(owner="two", events=1), "b": Plain(owner="stays", events=1)},
        {"b": Plain(owner="stays", events=1)},
        {"b": Plain(owner="stays", events=1)},
    ]
    for commit, rows in zip(made, expected, strict=True):
        side.project([commit])
        assert {row.id: plain(row) for row in side.rows(Sheet)} == rows


def test_a_row_dropped_and_started_in_one_batch_holds_nothing_old(side: ReadSide) -> None:
    side.project(commits([("a", [Renamed("old"), Flagged(True, "old", 2.5)])]))
    again = [(2, "Ledger", "a", envelopes(Ledger, [Closed(), Renamed("new")], 2))]
    side.project(again)
    assert [plain(row) for row in side.rows(Sheet)] == [Plain(owner="new", events=1)]


def test_every_type_of_column_comes_back_as_it_went(side: ReadSide) -> None:
    moment = datetime(2013, 5, 17, 23, 59, 59, 123456)
    hard = "quote ' double \" back \\ brace {} comma, colon :name %s \U0001f6e9\ufe0f \n tab\t 東京"
    side.project(
        commits(
            [
                ("a", [Opened(hard, date(2012, 2, 29)), Paid(2**62, Decimal("12345678901.2345"), moment)]),
                ("a", [Flagged(True, hard, -0.1)]),
                ("b", [Opened("", date(1, 1, 1)), Paid(-(2**62), Decimal("-0.0001"), datetime(1970, 1, 1))]),
                ("b", [Flagged(False, "", 1e300)]),
                ("c", [Flagged(True, "x", 1.0), Flagged(False, None, None)]),
                (hard, [Renamed("strange id")]),
            ]
        )
    )
    # in two steps, so that rows are also read back into records and written again
    side.claim()
    more = [(10, "Ledger", ledger, envelopes(Ledger, [Renamed("again")], 3)) for ledger in ("a", "b")]
    side.project(more)
    found = {row.id: plain(row) for row in side.rows(Sheet)}
    assert found == {
        "a": Plain("again", date(2012, 2, 29), 7 + 2**62, Decimal("12345678901.2345"), moment, True, hard, -0.1, 4),
        "b": Plain("again", date(1, 1, 1), 7 - 2**62, Decimal("-0.0001"), datetime(1970, 1, 1), False, "", 1e300, 4),
        "c": Plain(flag=False, events=2),
        hard: Plain(owner="strange id", events=1),
    }
    assert found["a"].flag is True
    assert isinstance(found["a"].rate, Decimal)


def test_a_big_batch_is_written_whole(side: ReadSide) -> None:
    history = [(f"id-{number:05}", [Renamed(f"name {number}")]) for number in range(7_000)]
    side.project(commits(history))
    rows = side.rows(Sheet)
    assert len(rows) == 7_000
    assert all(row.owner == f"name {int(row.id[3:])}" for row in rows)
    closed = [
        (sequence + 7_000, aggregate, ledger, envelopes(Ledger, [Closed()], 1))
        for sequence, aggregate, ledger, _ in commits(history)[:6_000]
    ]
    side.project(closed)
    assert [row.id for row in side.rows(Sheet)] == [f"id-{number:05}" for number in range(6_000, 7_000)]


def test_events_of_an_older_version_are_folded_through_their_upcasters(side: ReadSide) -> None:
    (sequence, aggregate, ledger, (envelope,)) = commits([("a", [Renamed("x")])])[0]
    envelope.dataversion = 1
    envelope.data = type(envelope.data)(b'{"name": "old name"}')
    side.project([(sequence, aggregate, ledger, [envelope])])
    assert [row.owner for row in side.rows(Sheet)] == ["old name"]


# tallies


def test_tallies_add_up_over_batches_and_aggregates(side: ReadSide) -> None:
    first, second = datetime(2013, 1, 1, 10), datetime(2013, 1, 2)
    rate = Decimal(1)
    history = [
        ("x/1", [Paid(5, rate, first), Paid(6, rate, first)]),
        ("x/2", [Paid(7, rate, second)]),
        ("y/1", [Paid(-3, rate, first)]),
        ("x/2", [Paid(10, rate, first)]),
        ("x/1", [Paid(100, rate, second)]),
    ]
    for commit in commits(history):
        side.project([commit])
    assert [(row.prefix, row.day, row.payments, row.cents, row.weight) for row in side.rows(DayTotal)] == [
        ("x", date(2013, 1, 1), 3, 21, 1.5),
        ("x", date(2013, 1, 2), 2, 107, 1.0),
        ("y", date(2013, 1, 1), 1, -3, 0.5),
    ]


# statements


def test_sql_handlers_get_events_in_order_on_the_batchs_transaction(side: ReadSide) -> None:
    side.project(commits([("a", [Renamed("x"), Renamed("y")]), ("b", [Renamed("z"), Ignored()])]))
    assert [(row.id, row.sequence, row.what) for row in side.rows(Entry)] == [
        ("a", 1, "Renamed"),
        ("a", 2, "Renamed"),
        ("b", 1, "Renamed"),
    ]
    # in the next batch a handler sees the rows that were written before, and changes them
    side.project([(3, "Ledger", "a", envelopes(Ledger, [Closed()], 2))])
    assert [(row.id, row.sequence, row.what) for row in side.rows(Entry)] == [("a", 3, "had 2"), ("b", 1, "Renamed")]


def test_an_events_metadata_is_what_was_stored() -> None:
    (first, second) = envelopes(Ledger, [Renamed("x"), Renamed("y")], 4, "2013-02-03T04:05:06.789Z")
    meta = Meta(second, "a", 17)
    assert (meta.sequence, meta.stream_sequence, meta.aggregate_id) == (6, 17, "a")
    assert meta.time == datetime(2013, 2, 3, 4, 5, 6, 789_000, UTC)
    assert meta.time.utcoffset() == timedelta(0)
    assert (meta.event_id, meta.command_id, meta.correlation_id) == (second.id, "command", "command")
    second.correlation_id = "talk"
    assert meta.correlation_id == "talk"
    assert first.id != second.id
