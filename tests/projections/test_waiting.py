"""Aggregates with events of a newer program wait for it, and go on with it: each event once, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import Engine, select

from aggregates.commit import Decision, decode, encode
from kernel import App
from projections import Fenced, dead_letters, exclusions
from projections.errors import HandlerFailed
from projections.exclusions import load_parked
from projections.fold import Folded, Plan
from projections.tables import dead_letter
from projections.unit_of_work import Write
from projections.waiting import fold_postponed, postponed
from tests.conftest import Commit, ReadSide, batch_of
from tests.programs import Close, Deposit, Program, program


class Log:
    """The commits of a pretended log, decided by whatever program."""

    def __init__(self) -> None:
        self.commits: list[Commit] = []
        self.stored: dict[int, bytes] = {}
        self._versions: dict[str, int] = {}

    def decide(self, given: Program, aggregate_id: str, *commands: Any) -> Commit:
        declared = given.app.type_of(given.account)
        cell = declared.cls(id=aggregate_id)
        events = []
        for command in commands:
            event = declared.handlers[type(command)].function(cell, command)
            events.append(declared.event_types[type(event)].encode(event))
        before = self._versions.get(aggregate_id, 0)
        at = len(self.commits) + 1
        self.stored[at] = encode("/bank", aggregate_id, [Decision("", events)], before, "2013-01-01T12:00:00Z")
        self._versions[aggregate_id] = before + len(events)
        self.commits.append((at, declared.name, aggregate_id, decode(self.stored[at])))
        return self.commits[-1]


class Worker(ReadSide):
    """A worker with a program, on a database that other programs may have written."""

    def __init__(self, engine: Engine, app: App, log: Log) -> None:
        self.log = log
        super().__init__(engine, app)

    def as_of(self, app: App) -> Worker:
        """Return a worker with another program, which takes the partitions over."""
        other = Worker.__new__(Worker)
        other.__dict__.update(self.__dict__)
        other.app = app
        other.claim()
        return other

    def claim(self) -> None:
        super().claim()
        self.resumed = fold_postponed(self.writer, range(self.partitions))
        with self.engine.connect() as connection:
            load_parked(connection, self.writer.plan, self.writer.generations)

    def freeze(self, commits: Sequence[Commit], folded: Folded) -> Write:
        for _, aggregate, aggregate_id, _ in commits:
            self.position.touch(self.subjects.partition(aggregate, aggregate_id))
        moves = self.position.moves(self.generations, commits[-1][0])
        return self.writer.freeze(
            folded,
            moves,
            lambda it: (self.subjects.partition(*it.aggregate), self.log.stored[it.stream_sequence]),
            batch_of(commits),
        )

    def decide(self, given: Program, aggregate_id: str, *amounts: int) -> list[HandlerFailed]:
        """Have a program decide a deposit, or a closing for 0, and project it."""
        commands = [Deposit(amount) if amount else Close() for amount in amounts]
        return self.project([self.log.decide(given, aggregate_id, *commands)])

    def everything(self, given: Program) -> Any:
        balance, amount, line = given.models
        return (
            [(row.account, row.amount) for row in self.rows(balance)],
            [(row.amount, row.times) for row in self.rows(amount)],
            [(row.account, row.sequence, row.amount) for row in self.rows(line)],
        )


OLD, NEW, NEWEST = program("bank"), program("bank", version=2), program("bank", version=2, closes=True)


@pytest.fixture
def worker(engine: Engine) -> Worker:
    return Worker(engine, OLD.app, Log())


def reasons(engine: Engine) -> list[tuple[str, int]]:
    assert dead_letters.counts(engine) == (0, 0)
    return [(waiting.why.split(",")[0].split(":")[0], waiting.aggregates) for waiting in postponed(engine)]


def test_an_aggregate_waits_and_goes_on_with_the_program_that_can_read_it(worker: Worker, engine: Engine) -> None:
    worker.decide(OLD, "a", 1)
    assert worker.decide(NEW, "a", 2, 3) == []
    worker.decide(OLD, "b", 5)
    assert worker.decide(NEW, "a", 4) == []
    assert worker.everything(OLD) == ([("a", 1), ("b", 5)], [(1, 1), (5, 1)], [("a", 1, 1), ("b", 1, 5)])
    assert reasons(engine) == [("stored Deposited has schema version 2", 1)]
    assert [waiting.newer for waiting in dead_letters.waiting(engine)] == [True] * 3

    again = worker.as_of(OLD.app)
    assert again.resumed == []
    again.decide(OLD, "a", 6)

    newer = worker.as_of(NEW.app)
    assert [(it.aggregate_id, it.folded, it.left) for it in newer.resumed] == [("a", 4, 0)] * 3
    whole = (
        [("a", 16), ("b", 5)],
        [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1)],
        [("a", 1, 1), ("a", 2, 2), ("a", 3, 3), ("a", 4, 4), ("a", 5, 6), ("b", 1, 5)],
    )
    assert newer.everything(NEW) == whole
    assert (reasons(engine), newer.plan.parked) == ([], {})
    # taken back, the older program goes on: what it could not read is folded already
    old = worker.as_of(OLD.app)
    assert old.decide(OLD, "a", 7) == []
    assert old.everything(OLD)[0] == [("a", 23), ("b", 5)]


def test_what_a_program_can_read_only_in_part_waits_with_the_rest(worker: Worker, engine: Engine) -> None:
    for name in ("a", "b"):
        worker.decide(NEW, name, 2)
        worker.decide(NEWEST, name, 0)
        worker.decide(OLD, name, 3)
    assert reasons(engine) == [("stored Deposited has schema version 2", 2)]
    newer = worker.as_of(NEW.app)
    assert {(it.folded, it.left) for it in newer.resumed} == {(1, 2)}
    assert reasons(engine) == [("Account has no event named 'Closed'", 2)]
    assert newer.everything(NEW)[0] == [("a", 2), ("b", 2)]
    assert newer.decide(OLD, "a", 4) == []
    newest = worker.as_of(NEWEST.app)
    assert newest.everything(NEWEST)[0] == [("a", 9), ("b", 5)]
    assert [(row.account, row.closed) for row in newest.rows(NEWEST.models[0])] == [("a", 1), ("b", 1)]
    assert reasons(engine) == []


def test_an_event_that_no_projection_handles_need_not_be_readable(engine: Engine) -> None:
    known = program("bank", closes=True).app
    for declared in known.projections:
        declared.handlers[:] = [handler for handler in declared.handlers if handler.function.__name__ != "closed"]
    worker = Worker(engine, known, Log())
    closed = worker.log.decide(NEWEST, "a", Close())
    closed[3][0].dataversion = 2
    assert worker.project([closed]) == []
    assert reasons(engine) == []


def test_a_partition_of_another_owner_is_not_folded_on(worker: Worker, engine: Engine) -> None:
    worker.decide(NEW, "a", 2)
    newer = worker.as_of(OLD.app)
    newer.app = NEW.app
    ReadSide.claim(newer)
    before = worker.everything(OLD)
    worker.as_of(OLD.app)
    with pytest.raises(Fenced):
        fold_postponed(newer.writer, range(4))
    assert worker.everything(OLD) == before
    assert reasons(engine) == [("stored Deposited has schema version 2", 1)]


def test_only_the_claimed_partitions_are_folded_on(worker: Worker, engine: Engine) -> None:
    names = [f"a{number}" for number in range(20)]
    for name in names:
        worker.decide(NEW, name, 2)
    newer = worker.as_of(OLD.app)
    newer.app = NEW.app
    ReadSide.claim(newer)
    own = {name for name in names if newer.subjects.partition("Account", name) in (1, 2)}
    assert {it.aggregate_id for it in fold_postponed(newer.writer, (1, 2))} == own
    assert len(own) not in (0, 20)
    assert reasons(engine) == [("stored Deposited has schema version 2", 20 - len(own))]


def test_many_go_on_in_several_transactions(worker: Worker, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("projections.waiting.CHUNK", 3)
    names = [f"a{number}" for number in range(10)]
    worker.project([worker.log.decide(NEW, name, Deposit(2), Deposit(1)) for name in names])
    newer = worker.as_of(NEW.app)
    assert newer.everything(NEW)[0] == [(name, 3) for name in names]
    assert newer.everything(NEW)[1] == [(1, 10), (2, 10)]
    assert reasons(engine) == []


@pytest.mark.parametrize("name", ["Balances", "Amounts", "Lines"])
def test_an_event_that_fails_when_it_is_readable_parks_its_aggregate_and_no_other(
    worker: Worker, engine: Engine, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for aggregate_id in ("a", "b", "c"):
        worker.decide(NEW, aggregate_id, 2, 3, 4)
    newer = worker.as_of(OLD.app)
    newer.app = NEW.app
    ReadSide.claim(newer)
    (index,) = [index for index, declared in enumerate(NEW.app.projections) if declared.name == name]
    fail_at(newer, index, "b", 2, monkeypatch)
    assert {
        (it.projection, it.aggregate_id): (it.folded, it.left) for it in fold_postponed(newer.writer, range(4))
    } == {
        (declared.name, key): (1, 2) if (declared.name, key) == (name, "b") else (3, 0)
        for declared in NEW.app.projections
        for key in ("a", "b", "c")
    }
    assert dead_letters.counts(engine) == (1, 0)
    assert postponed(engine) == []
    (waiting,) = dead_letters.waiting(engine)
    assert (waiting.projection, waiting.aggregate_id, waiting.sequence, waiting.events) == (name, "b", 2, 2)
    assert (waiting.newer, waiting.attempts) == (False, 1)
    assert "not today" in waiting.error
    with engine.connect() as connection:
        assert set(connection.scalars(select(dead_letter.c.attempts))) == {1}
    monkeypatch.undo()
    newer = worker.as_of(NEW.app)
    retried = dead_letters.retry(engine, plan_of(NEW.app, name, engine), name, "Account", "b", None)
    assert (retried.folded, retried.left) == (2, 0)
    assert newer.everything(NEW) == (
        [("a", 9), ("b", 9), ("c", 9)],
        [(2, 3), (3, 3), (4, 3)],
        [(key, place, amount) for key in ("a", "b", "c") for place, amount in ((1, 2), (2, 3), (3, 4))],
    )


def plan_of(app: App, name: str, engine: Engine) -> Plan:
    """Return a plan of one projection."""
    return exclusions.plan_of(app.plan(engine.dialect), name)


def fail_at(worker: Worker, index: int, aggregate_id: str, sequence: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have one projection fail at an event."""
    plan, run = worker.plan, worker.plan._run

    def running(steps: Any, key: Any, rows: Any, decoded: Any, folded: Any) -> None:
        _, envelope, at = decoded
        for step in steps:
            if (step[0], key[1], envelope.sequence) == (index, aggregate_id, sequence):
                plan.fail_step(index, key, rows, envelope, at, folded, ValueError("not today"))
            else:
                run([step], key, rows, decoded, folded)

    monkeypatch.setattr(plan, "_run", running)


def test_a_retry_by_hand_keeps_what_is_not_readable_waiting(worker: Worker, engine: Engine) -> None:
    worker.decide(NEW, "a", 2)
    worker.decide(NEWEST, "a", 0)
    for app, folded in ((OLD.app, 0), (NEW.app, 1), (NEWEST.app, 1)):
        for name in ("Balances", "Amounts", "Lines"):
            retried = dead_letters.retry(engine, plan_of(app, name, engine), name, "Account", "a", None)
            assert retried.folded == folded
            assert dead_letters.counts(engine) == (0, 0)
    assert dead_letters.waiting(engine) == []


def test_what_is_parked_stays_parked_whatever_waits_behind_it(worker: Worker, engine: Engine) -> None:
    worker.decide(OLD, "a", 1)
    failure = HandlerFailed(0, ("Account", "a"), 2, "ValueError: not today", "handler")
    worker.plan.park(failure)
    worker.decide(OLD, "a", 2)
    worker.decide(NEW, "a", 3)
    assert dead_letters.counts(engine) == (1, 0)
    newer = worker.as_of(NEW.app)
    assert {it.projection for it in newer.resumed} == {"Amounts", "Lines"}
    assert dead_letters.counts(engine) == (1, 0)
    assert newer.everything(NEW)[0] == [("a", 1)]
    dead_letters.retry(engine, plan_of(NEW.app, "Balances", engine), "Balances", "Account", "a", None)
    assert newer.everything(NEW)[0] == [("a", 6)]


def test_projections_that_stand_apart_wait_each_at_its_own_place(worker: Worker) -> None:
    """A projection has folded further than the others, with the newer program."""
    worker.decide(OLD, "a", 1)
    commits = [worker.log.decide(NEW, "a", Deposit(2)), worker.log.decide(NEW, "a", Deposit(3))]
    own = [(at, events) for at, _, _, events in commits]
    for split in (0, 1, 2):
        plan = worker.app.plan(worker.engine.dialect)
        folded = Folded(plan)
        rows = [plan.makers[0]("a"), None, None]
        rows[0].eskernel_sequence = 1 + split
        for some, skip in ((own[:split], frozenset({0})), (own[split:], frozenset[int]())):
            if some:
                plan.fold("Account", "a", rows, some, folded, None, skip)
        wanted = {(index, sequence) for index in range(3) for sequence in (2, 3)}
        wanted -= {(0, sequence) for sequence in (2, 3)[:split]}
        assert {(letter.projection, letter.sequence) for letter in folded.letters} == wanted
        assert all(letter.waits for letter in folded.letters)
        assert len(folded.letters) == len(wanted)
