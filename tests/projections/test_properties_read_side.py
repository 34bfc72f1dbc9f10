"""The tables hold the result of a plain fold, however events are batched and whatever crashes in between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, delete, insert, select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import Aggregate, InvalidId, applies, event
from kernel import App
from kernel.log.subjects import MAX_TOKEN, Subjects
from projections import DROP, Drop, Fenced, HandlerFailed, Recorded, Rows, Sql, Tallies, Tally, Transaction
from projections.checkpoints import claim
from projections.fold import Folded
from projections.tables import checkpoint, dead_letter
from tests.conftest import Commit, ReadSide, batch_of, envelopes


@event
class Noted:
    text: str
    number: int


class Book(Aggregate):
    @applies
    def noted(self, event: Noted) -> None: ...


class Shelf(Aggregate):
    @applies
    def noted(self, event: Noted) -> None: ...


class Base(DeclarativeBase):
    pass


class Page(Base):
    __tablename__ = "pages"
    book: Mapped[str] = mapped_column(primary_key=True)
    notes: Mapped[int] = mapped_column(default=0)
    total: Mapped[int] = mapped_column(default=10)
    last: Mapped[str | None]


class Word(Base):
    __tablename__ = "words"
    word: Mapped[str] = mapped_column(primary_key=True)
    even: Mapped[bool] = mapped_column(primary_key=True)
    times: Mapped[int] = mapped_column(default=0)
    sum: Mapped[int] = mapped_column(default=0)


class Line(Base):
    __tablename__ = "lines"
    book: Mapped[str] = mapped_column(primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


class Board(Base):
    __tablename__ = "boards"
    shelf: Mapped[str] = mapped_column(primary_key=True)
    total: Mapped[int] = mapped_column(default=0)


class Pages(Rows[Page], of=Book):
    @applies
    def noted(self, row: Page, event: Noted) -> Drop | None:
        row.notes += 1
        row.total += event.number
        row.last = event.text
        if event.text == "bad page":
            raise ValueError(event.text)
        return DROP if event.text == "torn" else None


class Words(Tallies[Word], of=Book):
    @applies
    def noted(self, tally: Tally[Word], event: Noted) -> None:
        tally[event.text, event.number % 2 == 0].times += 1
        tally[event.text, event.number % 2 == 0].sum += event.number
        if event.text == "bad word":
            raise ValueError(event.text)


class Lines(Sql, of=Book):
    tables = (Line,)

    @applies
    def noted(self, tx: Transaction, events: Sequence[Recorded[Noted]]) -> None:
        for recorded in events:
            line = {"book": recorded.meta.aggregate_id, "sequence": recorded.meta.sequence, "text": recorded.event.text}
            tx.execute(insert(tx.table(Line)), line)
            if recorded.event.text == "bad line":
                raise ValueError(recorded.event.text)


class Boards(Rows[Board], of=Shelf):
    @applies
    def noted(self, row: Board, event: Noted) -> None:
        row.total += event.number
        if event.text == "bad board":
            raise ValueError(event.text)


APP = App("books", aggregates=[Book, Shelf], projections=[Pages, Words, Lines, Boards])
OF = {"Pages": "Book", "Words": "Book", "Lines": "Book", "Boards": "Shelf"}
CLASSES = {"Book": Book, "Shelf": Shelf}
POISON = {"bad page": {"Pages"}, "bad word": {"Words"}, "bad line": {"Lines"}, "bad board": {"Boards"}}
POISON |= {"unreadable": set(OF), "unheard of": set(OF)}

Note = tuple[str, int]
Unnumbered = tuple[str, str, list[Note]]
"""A commit without its sequence numbers: aggregate, id, notes."""


class Owner(ReadSide):
    """A read side that keeps rows in memory between batches, as the actors do, until a failure or a restart."""

    def claim(self) -> None:
        super().claim()
        self.kept: dict[tuple[str, str], tuple[list[Any], int]] = {}

    def fold(self, commits: Sequence[Commit]) -> Folded:
        folded = Folded(self.plan)
        for key, own, _ in batch_of(commits):
            if key not in self.kept:
                with self.engine.connect() as connection:
                    stored, _ = self.writer.load_rows(connection, key[0], [key[1]])
                self.kept[key] = (stored[key[1]], -1)
            rows, last = self.kept[key]
            self.kept[key] = (rows, self.plan.fold(*key, rows, own, folded, None if last < 0 else last))
        return folded

    def project(self, commits: Sequence[Commit]) -> list[HandlerFailed]:
        failures = super().project(commits)
        for failure in failures:
            self.kept.pop(failure.aggregate, None)
        return failures

    def unseen(self, commits: Sequence[Commit]) -> list[Commit]:
        """Return the commits not folded yet, as the projector does after reading from the lowest checkpoint."""
        return [
            commit for commit in commits if not self.position.folded(self.subjects.partition(*commit[1:3]), commit[0])
        ]

    def empty(self) -> None:
        """Empty the tables, which is faster than making a new database."""
        with self.engine.begin() as connection:
            connection.execute(checkpoint.update().values(sequence=0))
            connection.execute(delete(dead_letter))
            for made in self.generations:
                for table in made.tables.values():
                    connection.execute(delete(table))
        self.claim()

    def found(self) -> dict[str, Any]:
        """Return the content of all tables."""
        with self.engine.connect() as connection:
            letters = connection.execute(select(dead_letter)).all()
        return {
            "pages": {page.book: (page.notes, page.total, page.last) for page in self.rows(Page)},
            "words": {(word.word, word.even): (word.times, word.sum) for word in self.rows(Word)},
            "lines": [(line.book, line.sequence, line.text) for line in self.rows(Line)],
            "boards": {board.shelf: board.total for board in self.rows(Board)},
            "letters": Counter(
                (letter.projection, letter.aggregate_id, letter.sequence, letter.payload) for letter in letters
            ),
        }


def numbered(unnumbered: Sequence[Unnumbered], versions: Counter[tuple[str, str]], after: int) -> list[Commit]:
    """Return the commits as the log returns them, with gaps in the stream's sequence."""
    commits = []
    for place, (aggregate, key, notes) in enumerate(unnumbered, 1):
        made = envelopes(CLASSES[aggregate], [Noted(*note) for note in notes], versions[aggregate, key])
        versions[aggregate, key] += len(notes)
        for envelope, (text, _) in zip(made, notes, strict=True):
            if text == "unreadable":
                envelope.data = msgspec.Raw(b'{"text":5}')
            if text == "unheard of":
                envelope.type = "Unheard"
        commits.append((after + 3 * place, aggregate, key, made))
    return commits


def plainly_folded(unnumbered: Sequence[Unnumbered], commits: Sequence[Commit]) -> dict[str, Any]:
    """Return the expected content of the tables, folding one event after the other."""
    pages: dict[str, tuple[int, int, str | None]] = {}
    words: dict[tuple[str, bool], tuple[int, int]] = {}
    lines, letters = [], []
    boards: Counter[str] = Counter()
    parked: set[tuple[str, str]] = set()
    for (aggregate, key, notes), (place, _, _, events) in zip(unnumbered, commits, strict=True):
        for (text, number), envelope in zip(notes, events, strict=True):
            parked |= {(name, key) for name in POISON.get(text, ()) if OF[name] == aggregate}
            for name in [name for name, of in OF.items() if of == aggregate]:
                if (name, key) in parked:
                    letters.append((name, key, envelope.sequence, b"%d" % place))
                elif name == "Pages" and text == "torn":
                    pages.pop(key, None)
                elif name == "Pages":
                    count, total, _ = pages.get(key, (0, 10, None))
                    pages[key] = (count + 1, total + number, text)
                elif name == "Words":
                    times, summed = words.get((text, number % 2 == 0), (0, 0))
                    words[text, number % 2 == 0] = (times + 1, summed + number)
                elif name == "Lines":
                    lines.append((key, envelope.sequence, text))
                else:
                    boards[key] += number
    found = {"pages": pages, "words": words, "lines": sorted(lines), "boards": dict(boards)}
    return {**found, "letters": Counter(letters)}


notes = st.tuples(st.sampled_from(["one", 'tw"o\\', "thrée\n", "torn"]), st.integers(-(2**20), 2**20))
bad_notes = st.tuples(st.sampled_from(sorted(POISON)), st.integers(0, 9))
# books and shelves have different ids, so that the plain fold can use the id as its only key
keys = st.sampled_from(
    [("Book", book) for book in ("a", "b b", "ç", "d.*>")] + [("Shelf", shelf) for shelf in ("x", "y")]
)


def batches(note: st.SearchStrategy[Note]) -> st.SearchStrategy[list[list[Unnumbered]]]:
    unnumbered = st.builds(lambda key, notes: (*key, notes), keys, st.lists(note, min_size=1, max_size=3))
    return st.lists(st.lists(unnumbered, min_size=1, max_size=6), min_size=1, max_size=5)


deaths = st.sampled_from(["none", "before the write", "within the write", "after the write", "twice"])


@pytest.fixture
def owner(engine: Engine) -> Owner:
    return Owner(engine, APP)


# the engine is the only fixture, and each example empties its tables
some = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def die(owner: Owner, batch: Sequence[Commit], death: str) -> None:
    """Crash somewhere in the middle of a batch, and start from the stored rows."""
    if death == "after the write":
        owner.project(batch)
    elif death != "none":
        write = owner.freeze(batch, owner.fold(batch))
        if death != "before the write":
            with owner.engine.connect() as connection:
                owner.writer.attempt(connection, write)
                connection.rollback()
    if death != "none":
        owner.claim()
    if death == "twice":
        owner.claim()


def check(owner: Owner, script: Sequence[Sequence[Unnumbered]], fates: Sequence[str]) -> None:
    owner.empty()
    versions: Counter[tuple[str, str]] = Counter()
    unnumbered: list[Unnumbered] = []
    log: list[Commit] = []
    for place, batch in enumerate(script):
        unnumbered += batch
        log += numbered(batch, versions, log[-1][0] if log else 0)
        die(owner, owner.unseen(log), fates[place % len(fates)])
        if rest := owner.unseen(log):
            owner.project(rest)
        assert owner.found() == plainly_folded(unnumbered, log)


@some
@given(script=batches(notes), fates=st.lists(deaths, min_size=1, max_size=5))
def test_any_batches_and_crashes_give_what_a_plain_fold_gives(
    owner: Owner, script: list[list[Unnumbered]], fates: list[str]
) -> None:
    check(owner, script, fates)
    with owner.engine.connect() as connection:
        assert connection.execute(select(dead_letter)).all() == []


@some
@given(script=batches(notes | bad_notes), fates=st.lists(deaths, min_size=1, max_size=5))
def test_poison_parks_exactly_the_events_behind_it_for_its_projection(
    owner: Owner, script: list[list[Unnumbered]], fates: list[str]
) -> None:
    check(owner, script, fates)


@some
@given(script=batches(notes | bad_notes), one_by_one=st.booleans())
def test_the_cut_into_batches_changes_nothing(owner: Owner, script: list[list[Unnumbered]], one_by_one: bool) -> None:
    unnumbered = [commit for batch in script for commit in batch]
    found = []
    for cut in (script, [unnumbered], [[commit] for commit in unnumbered]) if one_by_one else (script, [unnumbered]):
        check(owner, cut, ["none"])
        found.append(owner.found())
    assert all(tables == found[0] for tables in found)


@some
@given(script=batches(notes), lost=st.sets(st.integers(0, 3)), behind=st.booleans())
def test_a_stale_epoch_never_writes(owner: Owner, script: list[list[Unnumbered]], lost: set[int], behind: bool) -> None:
    owner.empty()
    versions: Counter[tuple[str, str]] = Counter()
    *before, last = script
    log: list[Commit] = []
    for batch in before:
        log += numbered(batch, versions, log[-1][0] if log else 0)
        owner.project(owner.unseen(log))
    log += numbered(last, versions, log[-1][0] if log else 0)
    batch = owner.unseen(log)
    write = owner.freeze(batch, owner.fold(batch))
    touched = {owner.subjects.partition(*commit[1:3]) for commit in batch}
    claim(owner.engine, APP.name, APP.projections, lost)
    if behind and lost & touched:
        newer = Owner.__new__(Owner)
        newer.__dict__.update(owner.__dict__)
        newer.claim()
        newer.project(newer.unseen(log))
    stood = owner.found()
    if lost & touched:
        with pytest.raises(Fenced):
            owner.writer.commit(write)
        assert owner.found() == stood
    else:
        owner.writer.commit(write)
        assert owner.found() == plainly_folded([commit for batch in script for commit in batch], log)


def test_an_odd_event_of_an_aggregate_without_projections_is_passed_over(engine: Engine) -> None:
    side = ReadSide(engine, App("books", aggregates=[Book, Shelf], projections=[Pages]))
    odd, fine = numbered([("Shelf", "x", [("unheard of", 1)]), ("Book", "a", [("one", 1)])], Counter(), 0)
    side.project([odd, fine])
    assert [row.book for row in side.rows(Page)] == ["a"]


# subjects

ids = st.text(max_size=80) | st.text("abcXYZ019_-.~*>% /é名\t\n\x00\x7f\ud800", max_size=300)
names = st.sampled_from(["Thing", "Thin", "T", "Thing_1"])


@settings(max_examples=150)
@given(name=names, id=ids, partitions=st.integers(1, 4096))
def test_any_id_is_refused_or_comes_back_from_its_subject(name: str, id: str, partitions: int) -> None:
    subjects = Subjects("app", partitions)
    try:
        address = subjects.address(name, id)
    except InvalidId:
        return
    assert subjects.parse(address.subject) == address
    assert (address.aggregate, address.id) == (name, id)
    assert 0 <= address.partition < partitions
    app, kind, partition, aggregate, token = address.subject.split(".")
    assert (app, kind, partition, aggregate) == ("app", "evt", str(address.partition), name)
    assert token.isascii()
    assert not set(token) & set(".*> \t\r\n\0")
    assert 0 < len(token) <= MAX_TOKEN
    again = Subjects("app", partitions)
    assert again.partition(name, id) == again.address(name, id).partition == address.partition


@settings(max_examples=150)
@given(first=st.tuples(names, ids), second=st.tuples(names, ids), partitions=st.integers(1, 64))
def test_distinct_aggregates_have_distinct_subjects(
    first: tuple[str, str], second: tuple[str, str], partitions: int
) -> None:
    subjects = Subjects("app", partitions)
    try:
        assert (subjects.address(*first).subject == subjects.address(*second).subject) == (first == second)
    except InvalidId:
        pass


tokens = st.text("0123456789²٣x%4aAfF-_", max_size=6) | st.text(max_size=6)


@settings(max_examples=500)
@given(partition=tokens | st.integers(0, 3).map(str), name=names | tokens, token=tokens)
def test_any_subject_is_one_that_address_gives_or_refused(partition: str, name: str, token: str) -> None:
    subjects = Subjects("app", 4)
    subject = f"app.evt.{partition}.{name}.{token}"
    try:
        address = subjects.parse(subject)
    except Exception as error:
        assert type(error) is InvalidId
        return
    assert subjects.address(address.aggregate, address.id) == address
