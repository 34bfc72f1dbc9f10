"""Dead letters: retried in order, skipped with a reason, and never in the way of other aggregates."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import Engine, insert
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import Aggregate, applies, event
from aggregates.commit import Decision
from aggregates.declaration import declare
from kernel import App
from projections import (
    DROP,
    Drop,
    Fenced,
    NoSuchLetter,
    Recorded,
    Rows,
    Sql,
    Tallies,
    Tally,
    Transaction,
    dead_letters,
    exclusions,
)
from projections.fold import Folded
from projections.retrying import retry_all
from projections.stored_letters import StoredLetter
from tests.conftest import Commit, ReadSide, batch_of, envelopes
from tests.histories import encode

BROKEN: set[str] = set()
"""Texts that handlers fail on at the moment."""


@event
class Written:
    text: str


class Story(Aggregate):
    @applies
    def written(self, event: Written) -> None:
        pass


class Base(DeclarativeBase):
    pass


class Length(Base):
    __tablename__ = "lengths"
    story: Mapped[str] = mapped_column(primary_key=True)
    events: Mapped[int] = mapped_column(default=0)
    last: Mapped[str | None]


class Total(Base):
    __tablename__ = "story_totals"
    text: Mapped[str] = mapped_column(primary_key=True)
    times: Mapped[int] = mapped_column(default=0)


class Sentence(Base):
    __tablename__ = "sentences"
    story: Mapped[str] = mapped_column(primary_key=True)
    place: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


def stumble(name: str, text: str) -> None:
    if f"{name} {text}" in BROKEN:
        raise ValueError(f"{name} can't take {text}")
    if f"slow {name} {text}" in BROKEN:
        raise TimeoutError(f"{name} waited for {text}")


class Lengths(Rows[Length], of=Story):
    @applies
    def written(self, row: Length, event: Written) -> None:
        row.events += 1
        stumble("row", event.text)
        row.last = event.text


class Totals(Tallies[Total], of=Story):
    @applies
    def written(self, tally: Tally[Total], event: Written) -> None:
        stumble("tally", event.text)
        tally[event.text].times += 1


class Sentences(Sql, of=Story):
    tables = (Sentence,)

    @applies
    def written(self, tx: Transaction, events: Sequence[Recorded[Written]]) -> None:
        for recorded in events:
            stumble("sql", recorded.event.text)
            values = {"story": recorded.meta.aggregate_id, "place": recorded.meta.sequence, "text": recorded.event.text}
            tx.execute(insert(tx.table(Sentence)).values(**values))


class End(Base):
    __tablename__ = "ends"
    story: Mapped[str] = mapped_column(primary_key=True)


class Ends(Rows[End], of=Story):
    """One row for each story that has not ended."""

    @applies
    def written(self, row: End, event: Written) -> Drop | None:
        return DROP if event.text == "end" else None


@pytest.fixture
def side(engine: Engine) -> StorySide:
    BROKEN.clear()
    return StorySide(engine, App("stories", aggregates=[Story], projections=[Lengths, Totals, Sentences]))


class StorySide(ReadSide):
    """Keeps the commits' bytes, so that dead letters hold them as in a service."""

    stored: dict[int, bytes]

    def freeze(self, commits: Sequence[Commit], folded: Folded) -> Any:
        for _, aggregate, aggregate_id, _ in commits:
            self.position.touch(self.subjects.partition(aggregate, aggregate_id))
        moves = self.position.moves(self.generations, commits[-1][0])
        return self.writer.freeze(
            folded,
            moves,
            lambda letter: (self.subjects.partition(*letter.aggregate), self.stored[letter.stream_sequence]),
            batch_of(commits),
        )

    def commit_of(self, at: int, story: str, texts: Sequence[str], after: int = 0) -> Commit:
        """Return a commit, and store its bytes."""
        if not hasattr(self, "stored"):
            self.stored = {}
        names = {declared.cls: (declared.name, declared.version) for declared in declare(Story).events.values()}
        written = [Written(text) for text in texts]
        self.stored[at] = encode(
            "/stories/Story", story, names, [Decision("c", written)], after, "2013-01-01T12:00:00Z"
        )
        return at, "Story", story, envelopes(Story, written, after)

    def retry(self, name: str, story: str, pause: float | None = None) -> dead_letters.Retried:
        plan = exclusions.plan_of(self.app.plan(self.engine.dialect), name)
        return dead_letters.retry(self.engine, plan, name, "Story", story, pause)

    def skip(self, name: str, story: str, reason: str = "because") -> StoredLetter:
        plan = exclusions.plan_of(self.app.plan(self.engine.dialect), name)
        return dead_letters.skip(self.engine, plan, "Story", story, "me", reason)


def lengths(side: ReadSide) -> list[tuple[str, int, str | None]]:
    return [(row.story, row.events, row.last) for row in side.rows(Length)]


def park(side: StorySide, name: str, kind: str) -> None:
    """Let story b fail at its second event for one projection: its third event waits, and story a goes on."""
    BROKEN.add(f"{kind} bad")
    side.project(
        [
            side.commit_of(1, "b", ["good"]),
            side.commit_of(2, "a", ["good"]),
            side.commit_of(3, "b", ["bad", "later"], 1),
        ]
    )
    side.project([side.commit_of(4, "b", ["last"], 3), side.commit_of(5, "a", ["more"], 1)])
    (waiting,) = dead_letters.waiting(side.engine)
    assert (waiting.projection, waiting.aggregate_id, waiting.sequence, waiting.events) == (name, "b", 2, 3)
    assert (waiting.attempts, waiting.next_attempt) == (1, None)


KINDS = [("Lengths", "row"), ("Totals", "tally"), ("Sentences", "sql")]


def everything(side: ReadSide) -> Any:
    return (
        lengths(side),
        [(row.text, row.times) for row in side.rows(Total)],
        [(row.story, row.place, row.text) for row in side.rows(Sentence)],
    )


WHOLE = (
    [("a", 2, "more"), ("b", 4, "last")],
    [("bad", 1), ("good", 2), ("last", 1), ("later", 1), ("more", 1)],
    [("a", 1, "good"), ("a", 2, "more"), ("b", 1, "good"), ("b", 2, "bad"), ("b", 3, "later"), ("b", 4, "last")],
)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_retry_folds_what_waits_in_order_and_the_aggregate_goes_on(side: StorySide, name: str, kind: str) -> None:
    park(side, name, kind)
    BROKEN.clear()
    assert side.retry(name, "b") == dead_letters.Retried(name, "Story", "b", 3, 0, "")
    assert dead_letters.waiting(side.engine) == []
    assert everything(side) == WHOLE
    side.claim()
    assert side.plan.parked == {}
    assert side.project([side.commit_of(6, "b", ["again"], 4)]) == []
    assert ("b", 5, "again") in lengths(side)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_retry_stops_at_the_first_event_that_fails_again(side: StorySide, name: str, kind: str) -> None:
    park(side, name, kind)
    before = everything(side)
    assert side.retry(name, "b").folded == 0
    assert everything(side) == before
    (waiting,) = dead_letters.waiting(side.engine)
    assert (waiting.events, waiting.attempts) == (3, 2)
    BROKEN.clear()
    BROKEN.add(f"{kind} last")
    retried = side.retry(name, "b")
    assert (retried.folded, retried.left) == (2, 1)
    assert "can't take last" in retried.error
    (waiting,) = dead_letters.waiting(side.engine)
    assert (waiting.sequence, waiting.events, waiting.attempts) == (4, 1, 1)
    assert "can't take last" in waiting.error
    side.claim()
    assert side.plan.parked[("Story", "b")].popitem()[1].since == 4


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_skip_leaves_out_the_head_and_keeps_who_and_why(side: StorySide, name: str, kind: str) -> None:
    park(side, name, kind)
    letter = side.skip(name, "b", "ticket 4711")
    assert letter.event is not None
    assert (letter.sequence, letter.event["data"]) == (2, {"text": "bad"})
    (kept,) = dead_letters.skipped(side.engine)
    assert (kept["who"], kept["reason"], kept["sequence"], kept["projection"]) == ("me", "ticket 4711", 2, name)
    assert kept["skipped"]
    assert side.retry(name, "b") == dead_letters.Retried(name, "Story", "b", 2, 0, "")
    side.claim()
    assert side.project([side.commit_of(6, "b", ["again"], 4)]) == []
    assert dead_letters.waiting(side.engine) == []
    expected = {
        "Lengths": ("b", 4, "again"),
        "Totals": [("again", 1), ("good", 2), ("last", 1), ("later", 1), ("more", 1)],
        "Sentences": [1, 3, 4, 5],
    }[name]
    found = {
        "Lengths": lengths(side)[1],
        "Totals": [(row.text, row.times) for row in side.rows(Total)],
        "Sentences": [row.place for row in side.rows(Sentence) if row.story == "b"],
    }[name]
    assert found == expected


def test_after_skipping_everything_the_next_event_is_no_gap(side: StorySide) -> None:
    park(side, "Lengths", "row")
    for _ in range(3):
        side.skip("Lengths", "b")
    side.claim()
    assert side.plan.parked == {}
    assert side.project([side.commit_of(6, "b", ["again"], 4)]) == []
    assert lengths(side)[1] == ("b", 2, "again")


@pytest.mark.parametrize("act", ["retry", "skip"])
def test_the_owner_of_the_partition_meets_the_fence_after_a_change(side: StorySide, act: str) -> None:
    park(side, "Lengths", "row")
    batch = [side.commit_of(6, "b", ["again"], 4)]
    late = side.freeze(batch, side.fold(batch))
    BROKEN.clear()
    side.retry("Lengths", "b") if act == "retry" else side.skip("Lengths", "b")
    with pytest.raises(Fenced):
        side.writer.commit(late)
    side.claim()
    side.project(batch)
    assert lengths(side)[1] == (("b", 5, "again") if act == "retry" else ("b", 1, "good"))


def test_a_retry_that_folds_nothing_disturbs_no_other_aggregate(side: StorySide) -> None:
    park(side, "Lengths", "row")
    side.retry("Lengths", "b")
    side.project([side.commit_of(6, "a", ["on"], 2)])
    assert lengths(side)[0] == ("a", 3, "on")


def test_only_transient_failures_are_retried_automatically(side: StorySide) -> None:
    BROKEN.add("slow row bad")
    side.writer.retry_after = 30.0
    before = time.time()
    side.project([side.commit_of(1, "b", ["good"])])
    side.project([side.commit_of(2, "b", ["bad", "later"], 1)])
    (waiting,) = dead_letters.waiting(side.engine)
    assert waiting.next_attempt is not None
    assert before + 30 <= waiting.next_attempt <= time.time() + 30
    assert dead_letters.due(side.engine, before) == []
    assert dead_letters.due(side.engine, time.time() + 31) == [waiting]
    side.retry("Lengths", "b", pause=60.0)
    (waiting,) = dead_letters.waiting(side.engine)
    assert waiting.attempts == 2
    assert waiting.next_attempt is not None
    assert waiting.next_attempt > time.time() + 50
    side.retry("Lengths", "b", pause=None)
    (waiting,) = dead_letters.waiting(side.engine)
    assert (waiting.attempts, waiting.next_attempt) == (3, None)


def test_letters_are_shown_with_their_events_and_bytes(side: StorySide) -> None:
    park(side, "Lengths", "row")
    found = dead_letters.letters(side.engine, "Lengths", "Story", "b")
    assert [(letter.sequence, letter.stream_sequence) for letter in found] == [(2, 3), (3, 3), (4, 4)]
    assert [letter.event["data"]["text"] for letter in found if letter.event] == ["bad", "later", "last"]
    assert found[0].payload == side.stored[3]


def test_an_event_that_does_not_wait_cannot_be_retried_or_skipped(side: StorySide) -> None:
    park(side, "Lengths", "row")
    for act in (side.retry, side.skip):
        with pytest.raises(NoSuchLetter, match="dead-letters list"):
            act("Lengths", "a")
        with pytest.raises(NoSuchLetter):
            act("Totals", "b")


def test_quarantined_bytes_are_skipped_by_their_place(side: StorySide) -> None:
    batch = [side.commit_of(1, "a", ["good"])]
    write = side.freeze(batch, side.fold(batch))
    write.letters += [side.writer.garbage(at, "stories.evt.1.Story.x", 1, b"\xff", "not a commit") for at in (7, 8)]
    side.writer.commit(write)
    assert [(letter.projection, letter.stream_sequence) for letter in dead_letters.waiting(side.engine)] == [
        ("", 7),
        ("", 8),
    ]
    assert dead_letters.counts(side.engine) == (0, 2)
    left = dead_letters.skip_quarantined(side.engine, 8, "me", "noise")
    assert (left.payload, left.event) == (b"\xff", None)
    assert [letter.stream_sequence for letter in dead_letters.waiting(side.engine)] == [7]
    with pytest.raises(NoSuchLetter):
        dead_letters.skip_quarantined(side.engine, 8, "me", "noise")


# sequences


@pytest.mark.parametrize(("after", "message"), [(3, "event 4 after 2"), (1, "event 2 after 2")], ids=["gap", "repeat"])
def test_a_gap_or_a_repeat_is_noticed_however_long_the_aggregate_slept(
    side: StorySide, after: int, message: str
) -> None:
    side.project([side.commit_of(1, "b", ["one", "two"])])
    side.claim()  # nothing is in memory now
    (failure,) = side.project([side.commit_of(2, "b", ["odd"], after), side.commit_of(3, "a", ["good"])])
    assert failure.kind == "sequence"
    assert message in failure.error
    assert lengths(side) == [("a", 1, "good"), ("b", 2, "two")]
    assert {letter.projection for letter in dead_letters.waiting(side.engine)} == {"Lengths", "Totals", "Sentences"}
    assert side.retry("Lengths", "b").left == 1
    side.skip("Lengths", "b")
    side.claim()
    assert lengths(side)[1] == ("b", 2, "two")


@pytest.mark.parametrize("projections", [[Totals], [Sentences], [Ends], [Ends, Totals]], ids=str)
def test_a_gap_is_noticed_where_there_is_no_row_to_tell(engine: Engine, projections: list[Any]) -> None:
    BROKEN.clear()
    side = StorySide(engine, App("stories", aggregates=[Story], projections=projections))
    side.project([side.commit_of(1, "b", ["one", "end"]), side.commit_of(2, "a", ["one"])])
    side.claim()
    (failure,) = side.project([side.commit_of(3, "b", ["odd"], 3), side.commit_of(4, "a", ["two"], 1)])
    assert (failure.kind, failure.aggregate) == ("sequence", ("Story", "b"))
    name = projections[0].__name__
    assert side.retry(name, "b").left == 1
    side.skip(name, "b")
    side.claim()
    for other in projections[1:]:
        side.skip(other.__name__, "b")
    side.claim()
    assert side.project([side.commit_of(5, "b", ["next"], 4)]) == []


def test_the_sequence_column_is_not_in_the_view(side: StorySide) -> None:
    side.project([side.commit_of(1, "b", ["one", "two"])])
    with side.engine.connect() as connection:
        assert list(connection.exec_driver_sql("SELECT * FROM lengths").keys()) == ["story", "events", "last"]
        assert connection.exec_driver_sql("SELECT eskernel_sequence FROM lengths__1").scalar() == 2


def test_a_model_may_not_use_the_kernels_column() -> None:
    class Other(DeclarativeBase):
        pass

    class Wrong(Other):
        __tablename__ = "wrong"
        story: Mapped[str] = mapped_column(primary_key=True)
        eskernel_sequence: Mapped[int] = mapped_column(default=0)

    class Wrongs(Rows[Wrong], of=Story):
        @applies
        def written(self, row: Wrong, event: Written) -> None:
            pass

    with pytest.raises(Exception, match="kernel's own"):
        App("stories", aggregates=[Story], projections=[Wrongs])


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_second_retry_follows_what_was_folded_between_the_two(side: StorySide, name: str, kind: str) -> None:
    park(side, name, kind)
    BROKEN.clear()
    assert side.retry(name, "b").left == 0
    side.claim()
    assert side.project([side.commit_of(6, "b", ["between"], 4)]) == []
    BROKEN.add(f"{kind} worse")
    side.project([side.commit_of(7, "b", ["worse"], 5)])
    BROKEN.clear()
    retried = side.retry(name, "b")
    assert (retried.left, retried.error) == (0, "")


def test_many_are_retried_together_and_each_gets_as_far_as_alone(side: StorySide) -> None:
    """Some of them fail again at once, some later, and one of them was skipped before."""
    BROKEN.update({"row bad", "row worse", "tally bad"})
    names = [f"s{number}" for number in range(6)]
    texts = ["bad", "fine", "worse", "end"]
    side.project([side.commit_of(at, name, texts) for at, name in enumerate(names, 1)])
    side.skip("Lengths", "s5")
    BROKEN.clear()
    BROKEN.add("row worse")
    parked = dead_letters.waiting(side.engine)
    done = retry_all(side.engine, side.app.plan(side.engine.dialect), parked)
    found = {(tried.projection, tried.aggregate_id): (tried.folded, tried.left) for tried in done}
    assert {found["Lengths", name] for name in names[:5]} == {(2, 2)}
    assert found["Lengths", "s5"] == (1, 2)
    assert {found["Totals", name] for name in names} == {(4, 0)}
    BROKEN.clear()
    side.claim()
    done = retry_all(side.engine, side.app.plan(side.engine.dialect), dead_letters.waiting(side.engine))
    assert {(tried.folded, tried.left) for tried in done} == {(2, 0)}
    assert dead_letters.waiting(side.engine) == []
    assert {row.events for row in side.rows(Length)} == {3, 4}
    assert {row.text: row.times for row in side.rows(Total)} == dict.fromkeys(("bad", "fine", "worse", "end"), 6)


def test_an_aggregate_whose_beginning_is_missing_is_parked(side: StorySide) -> None:
    """Its first events were purged or removed from the log: there is no row, and its first event is not number 1."""
    side.project([side.commit_of(1, "whole", ["a"]), side.commit_of(2, "headless", ["c"], 2)])
    assert {(waiting.aggregate_id, waiting.sequence) for waiting in dead_letters.waiting(side.engine)} == {
        ("headless", 3)
    }
    (error,) = {waiting.error for waiting in dead_letters.waiting(side.engine)}
    assert "first event is number 3" in error
    side.claim()
    side.project([side.commit_of(3, "whole", ["b"], 1), side.commit_of(4, "late", ["b"], 1)])
    assert {waiting.aggregate_id for waiting in dead_letters.waiting(side.engine)} == {"headless", "late"}
    assert lengths(side) == [("whole", 2, "b")]


def test_a_projection_that_did_not_keep_sequences_blames_nobody_for_a_missing_beginning(engine: Engine) -> None:
    """The projection that kept them was removed: the other one can't know what came before."""
    BROKEN.clear()
    side = StorySide(engine, App("stories", aggregates=[Story], projections=[Lengths, Totals]))
    side.project([side.commit_of(1, "a", ["x"])])
    fewer = App("stories", aggregates=[Story], projections=[Totals])
    side.app = fewer
    side.claim()
    side.project([side.commit_of(2, "a", ["y"], 1)])
    assert dead_letters.waiting(engine) == []
    assert {row.text for row in side.rows(Total)} == {"x", "y"}
