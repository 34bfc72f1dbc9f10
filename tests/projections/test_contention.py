"""Several writers on the same keys: they lock in one order, and a deadlock is tried again at once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, insert, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import Aggregate, applies, event
from aggregates.commit import Decision
from kernel import App
from projections import Recorded, Sql, Tallies, Tally, Transaction
from projections.checkpoints import claim
from projections.contention import ATTEMPTS, count_contention, outlast_contention
from projections.database import open_database
from projections.dead_letters import retry, waiting
from projections.exclusions import plan_of
from projections.fold import Folded
from projections.tables import dead_letter
from projections.unit_of_work import Write, Writer
from tests.conftest import ReadSide, batch_of, envelopes
from tests.histories import encode

KEYS, ROUNDS = 400, 20


@event
class Counted:
    words: list[str]


class Book(Aggregate):
    @applies
    def counted(self, event: Counted) -> None:
        pass


class Base(DeclarativeBase):
    pass


class Word(Base):
    __tablename__ = "words"
    language: Mapped[str] = mapped_column(primary_key=True)
    word: Mapped[str] = mapped_column(primary_key=True)
    count: Mapped[int]


class Words(Tallies[Word], of=Book):
    fails = False

    @applies
    def counted(self, tally: Tally[Word], event: Counted) -> None:
        for word in event.words:
            tally["en", word].count += 1
        if Words.fails:
            raise ValueError("this program is bad")


class Shelved(Base):
    __tablename__ = "shelved"
    book: Mapped[str] = mapped_column(primary_key=True)
    books: Mapped[int]


class Shelf(Sql, of=Book):
    tables = (Shelved,)

    @applies
    def counted(self, tx: Transaction, events: Sequence[Recorded[Counted]]) -> None:
        try:
            tx.execute(insert(tx.table(Shelved)), [{"book": each.meta.aggregate_id, "books": 1} for each in events])
        except DBAPIError as error:
            raise RuntimeError("the shelf is full") from error


APP = App("contention", aggregates=[Book], projections=[Words])
REFUSE_SOME = """
    CREATE SEQUENCE tries;
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF nextval('tries') <= {times} THEN RAISE EXCEPTION 'in each other''s way' USING ERRCODE = '{state}'; END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER refuse BEFORE INSERT ON {table} FOR EACH ROW EXECUTE FUNCTION refuse();
"""


@pytest.fixture
def engine(fresh_postgres: str) -> Iterator[Engine]:
    """SQLite has one writer at a time, so that nothing can be in another one's way."""
    opened = open_database(fresh_postgres)
    yield opened
    opened.dispose()


@pytest.fixture
def side(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> ReadSide:
    monkeypatch.setattr(Words, "fails", False)
    return ReadSide(engine, APP)


def book_in(side: ReadSide, partition: int) -> str:
    return next(name for name in map(str, range(1000)) if side.subjects.partition("Book", name) == partition)


def refuse_some(side: ReadSide, times: int, state: str = "40P01") -> None:
    (table,) = side.generations[0].tables.values()
    with side.engine.begin() as connection:
        connection.execute(text(REFUSE_SOME.format(times=times, state=state, table=table.name)))


def test_writers_of_the_same_keys_do_not_deadlock(side: ReadSide) -> None:
    deadlocks: list[None] = []
    count_contention(side.engine, lambda: deadlocks.append(None))
    names = [f"w{number}" for number in range(KEYS)]
    together = threading.Barrier(2)

    def count(partition: int, words: Sequence[str]) -> None:
        owned = claim(side.engine, APP.name, APP.projections, [partition])
        writer = Writer(side.engine, APP.plan(side.engine.dialect), owned.generations, owned.epoch)
        book, at = book_in(side, partition), 0
        for number in range(1, ROUNDS + 1):
            commits = [(number, "Book", book, envelopes(Book, [Counted(list(words))], number - 1))]
            folded, batch = Folded(writer.plan), batch_of(commits)
            writer.plan.fold("Book", book, [None], batch[0][1], folded, number - 1)
            moves = [("Words", owned.generations[0].number, partition, at, number)]
            write = writer.freeze(folded, moves, lambda _: (partition, b""), batch)
            together.wait()
            writer.commit(write)
            at = number

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(count, 0, names), pool.submit(count, 1, names[::-1])]:
            done.result()
    assert [row.count for row in side.rows(Word)] == [2 * ROUNDS] * KEYS
    assert not deadlocks


@pytest.mark.parametrize("state", ["40P01", "40001"])
def test_a_deadlock_is_tried_again_and_parks_nothing(
    side: ReadSide, caplog: pytest.LogCaptureFixture, state: str
) -> None:
    counted: list[None] = []
    count_contention(side.engine, lambda: counted.append(None))
    refuse_some(side, 5, state)
    with caplog.at_level(logging.DEBUG):
        assert side.project([(1, "Book", "a", envelopes(Book, [Counted(["x", "y"])]))]) == []
    assert len(counted) == 5
    assert [row.count for row in side.rows(Word)] == [1, 1]
    assert waiting(side.engine) == []
    assert not [record for record in caplog.records if record.name.startswith("eskernel")]


def test_a_handler_that_wraps_a_deadlock_parks_nothing(engine: Engine) -> None:
    side = ReadSide(engine, App("wrapping", aggregates=[Book], projections=[Shelf]))
    refuse_some(side, 2)
    assert side.project([(1, "Book", "a", envelopes(Book, [Counted(["x"])]))]) == []
    assert [row.books for row in side.rows(Shelved)] == [1]


def test_deadlocks_without_end_are_the_callers(side: ReadSide) -> None:
    refuse_some(side, ATTEMPTS)
    commits = [(1, "Book", "a", envelopes(Book, [Counted(["x"])]))]
    write = side.freeze(commits, side.fold(commits))
    with pytest.raises(DBAPIError):
        side.writer.commit(write)
    side.writer.commit(write)
    assert [row.count for row in side.rows(Word)] == [1]


def test_a_deadlock_in_a_retry_of_dead_letters_is_tried_again(side: ReadSide) -> None:
    Words.fails = True
    events = [Counted(["x"]), Counted(["x", "y"])]
    side.project([(1, "Book", "a", envelopes(Book, events))])
    payload = encode("/test", "id", {Counted: ("Counted", 1)}, [Decision("command", events)], 0, "2013-01-01T12:00:00Z")
    with side.engine.begin() as connection:
        connection.execute(update(dead_letter).values(payload=payload))
    Words.fails = False
    refuse_some(side, 3)
    plan = plan_of(APP.plan(side.engine.dialect), "Words")
    assert retry(side.engine, plan, "Words", "Book", "a", None).folded == 2
    assert [row.count for row in side.rows(Word)] == [2, 1]


def test_a_deadlock_with_a_claim_is_no_deadlock(side: ReadSide) -> None:
    """A write and a takeover lock checkpoints in the same order."""
    moves = side.position.quiet_moves(side.generations, 1)
    assert moves == sorted(moves)
    side.writer.commit(Write(moves))
    side.claim()
    assert set(side.position.of(0).values()) == {1}


def test_other_errors_are_not_tried_again() -> None:
    tries = []

    def fail() -> None:
        tries.append(None)
        raise DBAPIError("SELECT 1", {}, Exception("gone"))

    with pytest.raises(DBAPIError):
        outlast_contention(fail)
    assert len(tries) == 1
