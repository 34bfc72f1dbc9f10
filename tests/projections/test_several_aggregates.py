"""Tallies and Sql projections fold the events of several aggregate types, and no table of another projection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import Engine, insert, select, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import Aggregate, DeclarationError, applies, event
from kernel import App
from projections import Recorded, Rows, Sql, Tallies, Tally, Transaction, projected
from projections.dead_letters import retry, waiting
from projections.exclusions import plan_of
from projections.tables import sequence
from tests.conftest import Commit, ReadSide, envelopes


@event
class Ordered:
    sku: str


@event
class Paid:
    sku: str
    cents: int


class Order(Aggregate):
    @applies
    def ordered(self, event: Ordered) -> None: ...


class Payment(Aggregate):
    @applies
    def paid(self, event: Paid) -> None: ...


class Base(DeclarativeBase):
    pass


class Article(Base):
    __tablename__ = "articles"
    sku: Mapped[str] = mapped_column(primary_key=True)
    ordered: Mapped[int] = mapped_column(default=0)
    cents: Mapped[int] = mapped_column(default=0)


class Step(Base):
    __tablename__ = "steps"
    place: Mapped[int] = mapped_column(primary_key=True)
    what: Mapped[str]


class Seen(Base):
    __tablename__ = "seen"
    order: Mapped[str] = mapped_column(primary_key=True)
    times: Mapped[int] = mapped_column(default=0)


class Articles(Tallies[Article], of=(Order, Payment)):
    @applies
    def ordered(self, tally: Tally[Article], event: Ordered) -> None:
        tally[event.sku].ordered += 1

    @applies
    def paid(self, tally: Tally[Article], event: Paid) -> None:
        tally[event.sku].cents += event.cents


class Steps(Sql, of=(Order, Payment)):
    tables = (Step,)

    @applies
    def happened(self, tx: Transaction, events: Sequence[Recorded[Ordered] | Recorded[Paid]]) -> None:
        for recorded in events:
            if recorded.event.sku == "bad":
                raise ValueError("bad")
            row = {"place": recorded.meta.stream_sequence, "what": type(recorded.event).__name__}
            tx.execute(insert(tx.table(Step)), row)


APP = App("shop", aggregates=[Order, Payment], projections=[Articles, Steps])


def commit(place: int, of: type[Aggregate], id: str, happened: Any, after: int = 0) -> Commit:
    return (place, of.__name__, id, envelopes(of, [happened], after))


def test_events_of_all_its_types_are_folded_also_where_two_have_the_same_id(engine: Engine) -> None:
    side = ReadSide(engine, APP)
    side.project([commit(1, Payment, "1", Paid("a", 5)), commit(2, Order, "1", Ordered("a"))])
    side.claim()  # the sequences of both come from the database
    assert side.project([commit(3, Order, "1", Ordered("b"), 1), commit(4, Payment, "1", Paid("a", 7), 1)]) == []
    assert [(row.sku, row.ordered, row.cents) for row in side.rows(Article)] == [("a", 1, 12), ("b", 1, 0)]
    assert [row.what for row in side.rows(Step)] == ["Paid", "Ordered", "Ordered", "Paid"]
    (gap,) = side.project([commit(5, Order, "1", Ordered("b"), 5)])
    assert "event 6 after 2" in gap.error
    with engine.connect() as connection:
        kept = select(sequence.c.aggregate_id, sequence.c.sequence).where(sequence.c.aggregate_id != "")
        assert sorted(connection.execute(kept).all()) == [("Order/1", 2), ("Payment/1", 2)]


def test_a_failure_parks_the_aggregate_of_its_type_alone_and_is_retried(engine: Engine) -> None:
    side = ReadSide(engine, APP)
    (failure,) = side.project([commit(1, Order, "1", Ordered("bad")), commit(2, Payment, "1", Paid("a", 5))])
    assert failure.aggregate == ("Order", "1")
    assert [row.what for row in side.rows(Step)] == ["Paid"]
    (parked,) = waiting(engine)
    assert (parked.projection, parked.aggregate, parked.aggregate_id) == ("Steps", "Order", "1")
    retried = retry(engine, plan_of(side.plan, "Steps"), "Steps", "Order", "1", None)
    assert "InvalidMessage" in retried.error  # the pretended log has no such bytes


def test_a_scenario_takes_events_of_each_type() -> None:
    steps = projected(Articles).given("1", Ordered("a")).given("1", Paid("a", 5)).given("2", Ordered("b"))
    steps.then(Article(sku="a", ordered=1, cents=5), Article(sku="b", ordered=1, cents=0))


def test_an_event_of_none_of_its_types_is_a_problem() -> None:
    class Wrong(Tallies[Article], of=(Order,)):
        @applies
        def paid(self, tally: Tally[Article], event: Paid) -> None: ...

    class Stranger(Articles, of=(Order, Payment), name="Stranger"):
        pass

    with pytest.raises(DeclarationError, match="Order has no event Paid; it has Ordered"):
        App("shop", aggregates=[Order], projections=[Wrong])
    with pytest.raises(DeclarationError, match="is of Payment, which is not among"):
        App("shop", aggregates=[Order], projections=[Stranger])


def test_rows_by_id_have_one_aggregate_type() -> None:
    class Both(Rows[Seen], of=(Order, Payment)):
        @applies
        def ordered(self, row: Seen, event: Ordered) -> None: ...

    with pytest.raises(DeclarationError, match="two of Order, Payment may have the same"):
        App("shop", aggregates=[Order, Payment], projections=[Both])


@pytest.mark.parametrize("statement", ["SELECT ordered FROM articles", "SELECT 1 FROM ARTICLES__1 AS a", "model"])
def test_an_sql_handler_that_reads_another_projections_table_is_refused(engine: Engine, statement: str) -> None:
    class Curious(Sql, of=Order, name="Steps"):
        tables = (Step,)

        @applies
        def ordered(self, tx: Transaction, events: Sequence[Recorded[Ordered]]) -> None:
            tx.execute(select(Article) if statement == "model" else text(statement))

    side = ReadSide(engine, App("shop", aggregates=[Order, Payment], projections=[Articles, Curious]))
    (failure,) = side.project([commit(1, Order, "1", Ordered("a"))])
    assert "'articles' is the table of another projection" in failure.error
    assert Counter(row.sku for row in side.rows(Article)) == {"a": 1}
