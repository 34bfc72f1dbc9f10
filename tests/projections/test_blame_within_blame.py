"""What is to blame twice, or after something else in the same batch was, is parked once."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import (
    JSON,
    Engine,
    ForeignKey,
    String,
    TypeDecorator,
    insert,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, mapped_column

from aggregates import applies
from aggregates.commit import Decision
from projections import Recorded, Rows, Sql, Tallies, Tally, Transaction
from projections.codec import Refused
from projections.codecs import codec_of
from projections.database import open_database
from projections.dead_letters import retry
from projections.errors import HandlerFailed
from projections.exclusions import plan_of
from projections.tables import dead_letter
from tests.histories import encode
from tests.projections.blame import (
    Count,
    Counted,
    Counts,
    Gone,
    Named,
    Owners,
    Row,
    Thing,
    Things,
    commit,
    letters,
    side_of,
)


def test_a_row_that_is_refused_before_it_was_refused_is_parked_once(engine: Engine) -> None:
    side = side_of(engine, Things)
    side.project([commit(1, "a", 0, Named("bad"), Named("a\0")), commit(2, "b", 0, Named("fine"))])
    assert letters(engine) == [("Things", "a", 1), ("Things", "a", 2)]


def test_an_event_that_makes_two_counters_too_large_is_parked_once(engine: Engine) -> None:
    side = side_of(engine, Counts)
    side.project(
        [
            commit(1, "a", 0, Counted("x", "y"), Counted("x", "y", 9), Counted("p", "q")),
            commit(2, "b", 0, Counted("x", "y"), Counted("x\0", "y")),
        ]
    )
    assert letters(engine) == [("Counts", "a", 2), ("Counts", "a", 3), ("Counts", "b", 2)]
    assert [(row.name, row.times) for row in side.rows(Count)] == [("x", 2), ("y", 2)]


def test_counters_that_are_too_large_at_different_events_park_from_the_first(engine: Engine) -> None:
    side = side_of(engine, Counts)
    events = Counted("p", "x", 3), Counted("q", "x", 1), Counted("y", "q", 9), Counted("q", "a\0")
    side.project([commit(1, "a", 0, *events)])
    assert letters(engine) == [("Counts", "a", 2), ("Counts", "a", 3), ("Counts", "a", 4)]
    assert [(row.name, row.times) for row in side.rows(Count)] == [("p", 3), ("x", 3)]


@pytest.mark.parametrize("bad", ["bad", "a\0"])
def test_a_row_that_was_dropped_and_then_refused_goes_on_after_it(engine: Engine, bad: str) -> None:
    side = side_of(engine, Things)
    side.project([commit(1, "a", 0, Named("one"), Gone())])
    side.project([commit(2, "a", 2, Named("two"), Gone(), Named(bad))])
    assert letters(engine) == [("Things", "a", 5)]
    with engine.connect() as connection:
        kept = connection.execute(
            text("SELECT aggregate_id, sequence FROM eskernel_sequence WHERE aggregate_id <> ''")
        ).all()
    assert [tuple(row) for row in kept] == [("a", 4)]


def test_a_unique_value_is_tried_again_more_than_once(engine: Engine) -> None:
    side = side_of(engine, Owners)
    side.project([commit(1, "a", 0, Named("x")), commit(2, "b", 0, Named("x"))])
    names: Any = {Named: ("Named", 1)}
    again: Any = Named("x")
    payload = encode("/test", "b", names, [Decision("command", [again])], 0, "2013-01-01T12:00:00Z")
    with engine.begin() as connection:
        connection.execute(dead_letter.update().values(payload=payload, next_attempt=None))
    done = retry(engine, plan_of(side.plan, "Owners"), "Owners", "Thing", "b", 1.0)
    assert done.left == 1
    assert "unique" in done.error.lower()
    with engine.connect() as connection:
        assert connection.scalar(select(dead_letter.c.next_attempt)) is not None


def test_an_increment_beyond_all_bounds_parks_its_aggregate(engine: Engine) -> None:
    class Sums(Tallies[Count], of=Thing):
        @applies
        def counted(self, tally: Tally[Count], event: Counted) -> None:
            tally[event.first].cents += Decimal(event.second)

    side = side_of(engine, Sums)
    side.project([commit(1, "a", 0, Counted("x", "1e5000")), commit(2, "b", 0, Counted("x", "1"))])
    assert letters(engine) == [("Sums", "a", 1)]
    assert [row.cents for row in side.rows(Count)] == [1]


def test_a_tuple_as_default_is_no_list_that_rows_share(engine: Engine) -> None:
    class Own(DeclarativeBase):
        pass

    class Document(Own):
        __tablename__ = "documents"
        id = mapped_column(String, primary_key=True)
        names = mapped_column(JSON, default=())

    class Documents(Rows[Document], of=Thing):
        @applies
        def named(self, row: Document, event: Named) -> None:
            row.names.append(event.name)

    side = side_of(engine, Documents)
    assert side.project([commit(1, "a", 0, Named("x")), commit(2, "b", 0, Named("y"))]) == []
    assert [row.names for row in side.rows(Document)] == [["x"], ["y"]]


def test_a_handler_that_fails_only_when_it_counts_again_loses_nothing(engine: Engine) -> None:
    calls = 0

    class Flaky(Tallies[Count], of=Thing):
        @applies
        def counted(self, tally: Tally[Count], event: Counted) -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise ConnectionError("away for a moment")
            tally[event.first].times += 1
            if event.first == "half":
                raise ValueError

    side = side_of(engine, Flaky)
    batch = [commit(1, "a", 0, Counted("x", "")), commit(2, "b", 0, Counted("half", ""))]
    try:
        side.project(batch)
    except HandlerFailed:
        side.claim()
        side.project(batch)
    found = len(letters(engine)), [(row.name, row.times) for row in side.rows(Count)]
    assert found == (1, [("x", 1)]) or found == (2, [])


def test_a_batch_folded_again_parks_from_the_same_event(engine: Engine) -> None:
    side = side_of(engine, Things)
    batch = [commit(1, "a", 0, Named("one"), Named("a\0"))]
    side.freeze(batch, side.fold(batch))
    side.project(batch)
    assert letters(engine) == [("Things", "a", 2)]


def test_a_handler_may_rely_on_checks_at_the_commit_whatever_else_is_refused(fresh_postgres: str) -> None:
    class Own(DeclarativeBase):
        pass

    class Parent(Own):
        __tablename__ = "parents"
        id = mapped_column(String, primary_key=True)

    class Child(Own):
        __tablename__ = "children"
        id = mapped_column(String, primary_key=True)
        parent = mapped_column(ForeignKey("parents.id", deferrable=True, initially="DEFERRED"))

    class Pairs(Sql, of=Thing):
        tables = (Parent, Child)

        @applies
        def named(self, tx: Transaction, events: Sequence[Recorded[Named]]) -> None:
            ids = [recorded.meta.aggregate_id for recorded in events]
            tx.execute(insert(tx.table(Child)), [{"id": own, "parent": own.removeprefix("orphan ")} for own in ids])
            tx.execute(insert(tx.table(Parent)), [{"id": own} for own in ids])

    engine = open_database(fresh_postgres)
    side = side_of(engine, Things, Pairs)
    side.project(
        [commit(1, "a", 0, Named("fine")), commit(2, "b", 0, Named("bad")), commit(3, "orphan c", 0, Named("fine"))]
    )
    assert letters(engine) == [("Pairs", "orphan c", 1), ("Things", "b", 1)]
    assert [row.id for row in side.rows(Parent)] == ["a", "b"]
    engine.dispose()


class Marked(TypeDecorator[str]):
    """It adds to the text each time that it is written."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else f"{value}!"


def test_a_type_that_changes_its_own_values_is_refused() -> None:
    with pytest.raises(Refused, match="Marked gives back"):
        codec_of(Marked(), sqlite.dialect()).normalise("x")


def test_there_is_no_negative_zero_in_jsonb() -> None:
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    normal = codec_of(postgresql.JSONB(), dialect).normalise({"zero": [-0.0]})
    assert str(normal) == "{'zero': [0.0]}"


def test_a_handler_that_sets_the_key_overwrites_no_other_row(engine: Engine) -> None:
    class Movers(Rows[Row], of=Thing):
        @applies
        def named(self, row: Row, event: Named) -> None:
            row.name = event.name
            if event.name == "moves":
                row.id = "b"

    side = side_of(engine, Movers)
    side.project([commit(1, "b", 0, Named("own"))])
    (failure,) = side.project([commit(2, "a", 0, Named("one"), Named("moves")), commit(3, "c", 0, Named("fine"))])
    assert (failure.sequence, failure.error) == (2, "Row.id is the aggregate's id; a handler can't set it")
    assert [(row.id, row.name) for row in side.rows(Row)] == [("a", "one"), ("b", "own"), ("c", "fine")]
    assert letters(engine) == [("Movers", "a", 2)]
