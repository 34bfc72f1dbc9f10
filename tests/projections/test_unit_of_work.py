"""A batch is written whole or not at all, and by its owner only; events that can't be folded are parked."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

import pytest
from sqlalchemy import Engine, String, Table, insert, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import Aggregate, applies, event
from kernel import App
from projections import (
    Fenced,
    HandlerFailed,
    Recorded,
    Rows,
    SchemaError,
    Sql,
    Tallies,
    Tally,
    Transaction,
    dead_letters,
)
from projections.checkpoints import Position, claim, reached
from projections.fold import Folded
from projections.generations import retire_live
from projections.origin import register
from projections.parked import EVERY, Parked
from projections.tables import checkpoint, dead_letter
from tests.conftest import Commit, ReadSide, envelopes


@event
class Noted:
    text: str
    number: int = 1


class Notebook(Aggregate):
    @applies
    def noted(self, event: Noted) -> None:
        pass


class Base(DeclarativeBase):
    pass


class Page(Base):
    __tablename__ = "pages"
    book: Mapped[str] = mapped_column(primary_key=True)
    notes: Mapped[int] = mapped_column(default=0)
    last: Mapped[str | None] = mapped_column(String(20))
    day: Mapped[date | None]


class Total(Base):
    __tablename__ = "totals"
    kind: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int]


class Line(Base):
    __tablename__ = "lines"
    book: Mapped[str] = mapped_column(primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


ODD_VALUES: dict[str, Any] = {
    "beyond 64 bits": {"notes": 2**70},
    "no plain value": {"last": object()},
    "a text for a date": {"day": "2013-01-01"},
    "a text for a number": {"notes": "many"},
    "a zero byte": {"last": "a\x00b"},
    "too long": {"last": "x" * 21},
    "nothing where something must be": {"notes": None},
}


class Pages(Rows[Page], of=Notebook):
    @applies
    def noted(self, row: Page, event: Noted) -> None:
        row.notes += 1
        row.last = event.text
        for name, value in ODD_VALUES.get(event.text, {}).items():
            setattr(row, name, value)
        if event.text == "bad page":
            raise ValueError("this page is bad")


class Totals(Tallies[Total], of=Notebook):
    @applies
    def noted(self, tally: Tally[Total], event: Noted) -> None:
        tally["all"].number += event.number
        if event.text == "bad total":
            raise ValueError("this total is bad")


class Lines(Sql, of=Notebook):
    tables = (Line,)

    @applies
    def noted(self, tx: Transaction, events: Sequence[Recorded[Noted]]) -> None:
        for recorded in events:
            line = {"book": recorded.meta.aggregate_id, "sequence": recorded.meta.sequence, "text": recorded.event.text}
            tx.execute(insert(tx.table(Line)), line)
            if recorded.event.text == "bad line":
                raise ValueError("this line is bad")


@pytest.fixture
def side(engine: Engine) -> ReadSide:
    return ReadSide(engine, App("books", aggregates=[Notebook], projections=[Pages, Totals, Lines]))


def commit(sequence: int, book: str, texts: Sequence[str], after: int = 0) -> Commit:
    return sequence, "Notebook", book, envelopes(Notebook, [Noted(text) for text in texts], after)


def everything(side: ReadSide) -> dict[str, Any]:
    """Return all rows that a batch may change."""
    with side.engine.connect() as connection:
        checkpoints = connection.execute(
            select(checkpoint).order_by(checkpoint.c.projection, checkpoint.c.generation, checkpoint.c.partition)
        ).all()
    return {
        "pages": [(row.book, row.notes, row.last) for row in side.rows(Page)],
        "totals": [(row.kind, row.number) for row in side.rows(Total)],
        "lines": [(row.book, row.sequence, row.text) for row in side.rows(Line)],
        "checkpoints": [tuple(row) for row in checkpoints],
        "letters": letters(side.engine),
    }


def letters(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        rows = connection.execute(select(dead_letter).order_by(dead_letter.c.id)).all()
    return [(row.projection, row.aggregate_id, row.sequence, row.stream_sequence, row.payload) for row in rows]


def folded_to(side: ReadSide, book: str) -> dict[str, int]:
    with side.engine.connect() as connection:
        return reached(connection, side.subjects.partition("Notebook", book))


# one transaction


def test_rows_and_checkpoints_are_written_together(side: ReadSide) -> None:
    assert side.project([commit(5, "a", ["one", "two"])]) == []
    found = everything(side)
    assert found["pages"] == [("a", 2, "two")]
    assert found["totals"] == [("all", 2)]
    assert found["lines"] == [("a", 1, "one"), ("a", 2, "two")]
    assert found["letters"] == []
    assert folded_to(side, "a") == {"Pages": 5, "Totals": 5, "Lines": 5}
    moved = [row for row in found["checkpoints"] if row[3] == 5]
    assert {row[2] for row in moved} == {side.subjects.partition("Notebook", "a")}


def test_a_table_that_is_gone_leaves_neither_rows_nor_checkpoints(side: ReadSide) -> None:
    """Nobody is parked for it: no aggregate is to blame."""
    pages = side.generations[0].tables["pages"].name
    with side.engine.begin() as connection:
        connection.execute(text("DROP VIEW pages"))
        connection.execute(text(f"ALTER TABLE {pages} RENAME TO elsewhere"))
    batch = [commit(1, "a", ["one"])]
    folded = Folded(side.plan)
    side.plan.fold("Notebook", "a", [None] * 3, [(1, batch[0][3])], folded, None)
    with pytest.raises(SQLAlchemyError, match="no such table|does not exist"):
        side.writer.commit(side.freeze(batch, folded))
    assert side.rows(Total) == []
    assert side.rows(Line) == []
    assert letters(side.engine) == []
    assert folded_to(side, "a") == {"Pages": 0, "Totals": 0, "Lines": 0}


def test_a_write_can_be_tried_again_and_is_then_written_once(side: ReadSide) -> None:
    batch = [commit(1, "a", ["one"]), commit(2, "b", ["two"])]
    write = side.freeze(batch, side.fold(batch))
    with side.engine.connect() as connection:
        transaction = connection.begin()
        side.writer.apply(connection, write)
        transaction.rollback()
    assert everything(side)["totals"] == []
    side.writer.commit(write)
    once = everything(side)
    assert once["totals"] == [("all", 2)]
    with pytest.raises(Fenced):
        side.writer.commit(write)
    assert everything(side) == once


# fences


def test_a_write_of_another_epoch_is_fenced_and_leaves_nothing(side: ReadSide) -> None:
    side.project([commit(1, "a", ["one"])])
    batch = [commit(2, "a", ["two"], 1), commit(3, "b", ["three"])]
    write = side.freeze(batch, side.fold(batch))
    assert claim(side.engine, "books", side.app.projections, range(4)).epoch == side.epoch + 1
    before = everything(side)
    with pytest.raises(Fenced):
        side.writer.commit(write)
    assert everything(side) == before


def test_a_claim_fences_the_partitions_that_it_names_and_no_others(side: ReadSide) -> None:
    theirs, ours = commit(1, "a", ["one"]), commit(2, "b", ["two"])
    partition = side.subjects.partition("Notebook", "a")
    assert partition != side.subjects.partition("Notebook", "b")
    writes = [side.freeze([commit], side.fold([commit])) for commit in (theirs, ours)]
    claim(side.engine, "books", side.app.projections, [partition])
    with pytest.raises(Fenced):
        side.writer.commit(writes[0])
    side.writer.commit(writes[1])
    assert [row.book for row in side.rows(Page)] == ["b"]


def test_a_write_from_a_moved_checkpoint_is_fenced_and_leaves_nothing(side: ReadSide) -> None:
    batch = [commit(1, "a", ["one"])]
    first, second = side.freeze(batch, side.fold(batch)), side.freeze(batch, side.fold(batch))
    side.writer.commit(first)
    before = everything(side)
    with pytest.raises(Fenced):
        side.writer.commit(second)
    assert everything(side) == before


def test_one_moved_checkpoint_of_several_fences_the_whole_write(side: ReadSide) -> None:
    batch = [commit(9, "a", ["one"])]
    write = side.freeze(batch, side.fold(batch))
    with side.engine.begin() as connection:
        connection.execute(checkpoint.update().where(checkpoint.c.projection == "Totals").values(sequence=4))
    before = everything(side)
    with pytest.raises(Fenced, match="1 of 3"):
        side.writer.commit(write)
    assert everything(side) == before


def test_a_retired_generation_is_fenced(side: ReadSide) -> None:
    batch = [commit(1, "a", ["one"])]
    write = side.freeze(batch, side.fold(batch))
    with side.engine.begin() as connection:
        assert retire_live(connection, "Pages") == dict.fromkeys(range(4), 0)
    before = everything(side)
    with pytest.raises(Fenced):
        side.writer.commit(write)
    assert everything(side) == before


# taking over


def test_an_owner_takes_over_where_the_last_one_stood(side: ReadSide) -> None:
    side.project([commit(3, "a", ["one"]), commit(4, "b", ["two"])])
    stood = everything(side)
    side.claim()
    found = everything(side)
    assert [row[:4] for row in found["checkpoints"]] == [row[:4] for row in stood["checkpoints"]]
    assert {row[4] for row in found["checkpoints"]} == {side.epoch}
    side.project([commit(5, "a", ["three"], 1)])
    assert [(row.book, row.notes) for row in side.rows(Page)] == [("a", 2), ("b", 1)]


@pytest.mark.parametrize(
    ("created", "partitions", "last", "message"),
    [("2014", 4, 10, "2014"), ("2013", 8, 10, "8"), ("2013", 4, 6, "truncated")],
)
def test_a_database_of_another_log_is_refused(
    side: ReadSide, created: str, partitions: int, last: int, message: str
) -> None:
    side.project([commit(7, "a", ["one"])])
    with pytest.raises(SchemaError, match=message):
        register(side.engine, "books", created, partitions, last)


def test_a_projection_of_another_version_is_left_alone_until_it_is_built(side: ReadSide) -> None:
    class Pages(Rows[Page], of=Notebook, version=2):
        @applies
        def noted(self, row: Page, event: Noted) -> None:
            row.notes += 2

    newer = App("books", aggregates=[Notebook], projections=[Pages])
    claimed = claim(side.engine, "books", newer.projections, range(4))
    assert claimed.absent == {0}
    assert claimed.position.owned == frozenset()
    side.project([commit(7, "a", ["the older program is not fenced"])])


def test_positions_know_what_each_projection_has_folded() -> None:
    position = Position([{0: 5, 1: 9}, {0: 7, 1: 2}])
    assert (position.lowest, position.highest) == (2, 9)
    assert position.folded(0, 5) == {0, 1}
    assert position.folded(0, 6) == {1}
    assert position.folded(1, 9) == {0}
    assert position.folded(1, 10) == frozenset()


# dead letters


@pytest.mark.parametrize(("bad", "projection"), [("bad page", 0), ("bad total", 1), ("bad line", 2)])
def test_a_handler_that_raises_parks_its_aggregate_and_the_rest_goes_on(
    side: ReadSide, bad: str, projection: int
) -> None:
    name = side.app.projections[projection].name
    batch = [
        commit(1, "a", ["one", "two"]),
        commit(2, "b", ["good", bad, "waits"]),
        commit(3, "c", ["three"]),
        commit(4, "b", ["waits too"], 3),
    ]
    (failure,) = side.project(batch)
    assert (failure.projection, failure.aggregate, failure.sequence) == (projection, ("Notebook", "b"), 2)
    assert failure.error.startswith("ValueError: this ")
    found = everything(side)
    assert found["letters"] == [(name, "b", 2, 2, b"2"), (name, "b", 3, 2, b"2"), (name, "b", 4, 4, b"4")]
    notes, total = (1, 7) if projection == 0 else (4, 4 if projection == 1 else 7)
    assert found["pages"] == [
        ("a", 2, "two"),
        ("b", notes, "good" if projection == 0 else "waits too"),
        ("c", 1, "three"),
    ]
    assert found["totals"] == [("all", total)]
    assert len(found["lines"]) == (4 if projection == 2 else 7)
    assert folded_to(side, "b") == {"Pages": 4, "Totals": 4, "Lines": 4}
    # later events wait too, also under the next owner, but for this projection only
    side.claim()
    assert side.plan.parked == {("Notebook", "b"): {projection: Parked(2, failure.error)}}
    assert side.project([commit(5, "b", ["later"], 4), commit(6, "a", ["more"], 2)]) == []
    later = everything(side)
    assert later["letters"] == [*found["letters"], (name, "b", 5, 5, b"5")]
    assert ("a", 3, "more") in later["pages"]
    assert later["totals"] == [("all", total + (1 if projection == 1 else 2))]


def test_a_row_that_the_database_refuses_is_blamed_on_its_aggregate(side: ReadSide) -> None:
    """The handler accepts the row but the table does not: the failure shows only when the row is written."""
    with side.engine.begin() as connection:
        pages = side.generations[0].tables["pages"].name
        if side.engine.dialect.name == "sqlite":
            connection.execute(
                text(
                    f"CREATE TRIGGER no BEFORE INSERT ON {pages} WHEN NEW.last = 'refused' "
                    "BEGIN SELECT RAISE(ABORT, 'refused here'); END"
                )
            )
        else:
            connection.execute(text(f"ALTER TABLE {pages} ADD CONSTRAINT no CHECK (last <> 'refused')"))
    batch = [commit(1, "a", ["fine"]), commit(2, "b", ["fine", "refused"]), commit(3, "c", ["fine"])]
    (failure,) = side.project(batch)
    assert (failure.projection, failure.aggregate, failure.sequence) == (0, ("Notebook", "b"), 2)
    found = everything(side)
    assert found["pages"] == [("a", 1, "fine"), ("b", 1, "fine"), ("c", 1, "fine")]
    assert found["totals"] == [("all", 4)]
    assert found["letters"] == [("Pages", "b", 2, 2, b"2")]


@pytest.mark.parametrize("odd", ODD_VALUES)
def test_a_value_that_its_column_cannot_hold_is_stored_as_it_is_or_blamed_on_its_aggregate(
    side: ReadSide, odd: str
) -> None:
    """SQLite stores values that PostgreSQL refuses; with neither are other aggregates stopped."""
    failures = side.project([commit(1, "a", ["fine"]), commit(2, "b", [odd]), commit(3, "c", ["fine"])])
    with side.engine.connect() as connection:
        rows = {row.book: row for row in connection.execute(text("SELECT book, notes, last, day FROM pages"))}
    assert {"a", "c"} <= set(rows)
    if failures:
        assert [(failure.projection, failure.aggregate) for failure in failures] == [(0, ("Notebook", "b"))]
        assert [letter[:2] for letter in letters(side.engine)] == [("Pages", "b")]
        assert "b" not in rows
    else:
        for name, value in ODD_VALUES[odd].items():
            assert str(getattr(rows["b"], name)) == str(value)


def test_an_event_that_cannot_be_read_parks_its_aggregate_for_every_projection(side: ReadSide) -> None:
    spoilt = commit(2, "b", ["good", "spoilt", "waits"])
    spoilt[3][1].data = type(spoilt[3][1].data)(b'{"text": 5}')
    (failure,) = side.project([commit(1, "a", ["one"]), spoilt])
    assert (failure.projection, failure.aggregate, failure.sequence) == (EVERY, ("Notebook", "b"), 2)
    names = [declared.name for declared in side.app.projections]
    assert sorted(letters(side.engine)) == sorted(
        (name, "b", sequence, 2, b"2") for sequence in (2, 3) for name in names
    )
    assert everything(side)["pages"] == [("a", 1, "one"), ("b", 1, "good")]


def test_an_event_out_of_sequence_parks_its_aggregate(side: ReadSide) -> None:
    odd = commit(2, "b", ["good", "odd"])
    odd[3][1].sequence = 7
    (failure,) = side.project([commit(1, "a", ["one"]), odd])
    assert failure.projection == EVERY
    assert everything(side)["pages"] == [("a", 1, "one"), ("b", 1, "good")]
    assert len(letters(side.engine)) == 3
    assert dead_letters.counts(side.engine) == (3, 0)


@pytest.mark.parametrize(
    "newer", [{"type": "Unheard"}, {"dataversion": 9}], ids=["unknown type", "version from the future"]
)
def test_an_event_of_a_newer_program_waits_without_a_failure(side: ReadSide, newer: dict[str, Any]) -> None:
    odd = commit(2, "b", ["good", "odd", "behind"])
    for name, value in newer.items():
        setattr(odd[3][1], name, value)
    assert side.project([commit(1, "a", ["one"]), odd, commit(3, "b", ["later"], 3)]) == []
    assert everything(side)["pages"] == [("a", 1, "one"), ("b", 1, "good")]
    assert len(letters(side.engine)) == 9
    assert dead_letters.counts(side.engine) == (0, 0)
    for _ in range(2):  # as it is at once, and as it is after a new claim
        assert all(parked.waits for parked in side.plan.parked["Notebook", "b"].values())
        side.claim()


def test_the_earliest_failure_of_an_aggregate_is_what_its_events_wait_behind(side: ReadSide) -> None:
    book = ("Notebook", "b")
    for sequence in (5, 2, 4):
        side.plan.park(HandlerFailed(0, book, sequence, f"error {sequence}"))
    side.plan.park(HandlerFailed(EVERY, book, 3, "error 3"))
    assert side.plan.parked == {book: {0: Parked(2, "error 2"), 1: Parked(3, "error 3"), 2: Parked(3, "error 3")}}


def test_bytes_that_are_no_commit_are_kept(side: ReadSide) -> None:
    batch = [commit(1, "a", ["one"])]
    write = side.freeze(batch, side.fold(batch))
    write.letters.append(side.writer.garbage(2, "books.evt.1.Notebook.x", 1, b"\x00\xff garbage", "not a commit"))
    side.writer.commit(write)
    with side.engine.connect() as connection:
        (row,) = connection.execute(select(dead_letter)).all()
    assert (row.payload, row.stream_sequence, row.error) == (b"\x00\xff garbage", 2, "not a commit")
    assert row.aggregate_id == "books.evt.1.Notebook.x"
    side.claim()
    assert side.plan.parked == {}


def test_a_transaction_names_the_generations_table(side: ReadSide) -> None:
    with side.engine.connect() as connection:
        table = Transaction(connection, side.generations[2].tables).table(Line)
    assert isinstance(table, Table)
    assert table.name == "lines__1"
