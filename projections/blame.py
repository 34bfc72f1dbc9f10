"""Finds out which aggregates are to blame when a batch can't be written, and writes all the others.

The database is asked, with savepoints, about ever smaller parts of what it refused: the cost grows with the number of
bad rows, and only with the logarithm of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from aggregates.commit import Envelope
from projections.bulk import Bulk
from projections.codec import Refused
from projections.errors import FailureKind, HandlerFailed, reason
from projections.faults import may_pass
from projections.fold import Commits, Folded
from projections.parked import Key, Letter
from projections.projection import Recorded
from projections.recount import check_again, events_of, others_than
from projections.row_by_row import How, refused_rows
from projections.row_codec import Row
from projections.savepoints import BLOCK, Savepoints

if TYPE_CHECKING:
    from projections.unit_of_work import Write, Writer


@dataclass(frozen=True, slots=True)
class Suspect:
    """A row that can't be written as it was folded: its aggregate is parked from an event of the batch on.

    Attributes:
        since: sequence of that event, 0 if it is still to be found.
    """

    index: int
    aggregate_id: str
    error: str
    since: int = 0


@dataclass(slots=True)
class _Search:
    """The search for the event from which on a row is refused.

    Attributes:
        states: the row after so many events: None where there is none, a text where it can't be sent.
        bad: after so many events it is refused.
        good: after so many it is not.
    """

    aggregate_id: str
    states: Sequence[Row | str | None]
    bad: int
    good: int = 0

    @property
    def middle(self) -> Row | str | None:
        """The state to try."""
        return self.states[(self.good + self.bad) // 2]

    @property
    def state(self) -> Row | str | None:
        """The last state that is not refused."""
        return self.states[self.good]

    def halve(self, bad: bool) -> None:
        """Note whether the state that was tried is refused."""
        middle = (self.good + self.bad) // 2
        self.good, self.bad = (self.good, middle) if bad else (middle, self.bad)


class Added(NamedTuple):
    """What one event adds to one entry of a tally.

    Attributes:
        sequence: the event's place in its aggregate.
        record: the entry's increments.
    """

    sequence: int
    aggregate: Key
    record: Any


class Care:
    """Writes one batch with care, in one transaction.

    Attributes:
        failures: the aggregates that were parked.
        letters: their events of the batch.
        kept: sequences of aggregates without a row, to be stored.
    """

    def __init__(self, writer: Writer, connection: Connection, write: Write) -> None:
        self._writer, self._connection, self._batch = writer, connection, write.batch
        self._write, self._plan = write, writer.plan
        self._savepoints = Savepoints(connection)
        self._apart = writer.plan.apart()
        self.failures: list[HandlerFailed] = []
        self.letters: list[Letter] = []
        self._commits: dict[Key, list[tuple[Commits, frozenset[int]]]] = {}
        self.kept = {index: dict(kept) for index, kept in write.kept.items()}
        self._since: dict[tuple[int, Key], int] = dict(write.waiting_from)

    def check_at_once(self) -> None:
        """Have constraints checked with each statement, which otherwise are checked at the commit."""
        if self._connection.dialect.name == "postgresql":
            self._connection.exec_driver_sql("SET CONSTRAINTS ALL IMMEDIATE")

    def write(self, index: int) -> None:
        """Write what one projection has folded, as far as the database takes it."""
        kind = self._plan.projections[index].kind
        if kind == "rows":
            self._write_rows(index)
        elif kind == "tallies":
            self._write_tallies(index)
        elif calls := self._write.calls.get(index):
            self._call(index, calls, set())

    # rows

    def rows_of(self, index: int) -> tuple[list[str], list[tuple[str, Row]]]:
        """Return the ids whose rows are deleted, and the rows to write with their ids.

        Rows that are made again come first, since their events came before what parked them.
        """
        write = self._write
        dropped = list(write.dropped.get(index, ()))
        again: list[tuple[str, Row]] = []
        suspects = [suspect for suspect in write.suspects if suspect.index == index]
        if suspects:
            stored, _ = self._writer.bulk(index).load(self._connection, [suspect.aggregate_id for suspect in suspects])
        for suspect in suspects:
            key = self._plan.projections[index].row_type, suspect.aggregate_id
            events = self._events(index, key)
            states = self._states(index, key, stored.get(suspect.aggregate_id), events, suspect.since)
            good = next((place for place, state in enumerate(states) if isinstance(state, str)), len(states)) - 1
            if good < len(events) and not (suspect.since and good == len(states) - 1):
                failure = HandlerFailed(index, key, events[good][1].sequence, suspect.error or str(states[good + 1]))
                self._park(failure)
            state = states[good]
            if good and state is None:
                dropped.append(suspect.aggregate_id)
                self._keep(index, key, events[good - 1][1].sequence)
            elif good:
                again.append((suspect.aggregate_id, state))  # type: ignore[arg-type]
        rows = zip(write.ids.get(index, ()), write.rows.get(index, ()), strict=True)
        return dropped, [*again, *rows]

    def _write_rows(self, index: int) -> None:
        dropped, pairs = self.rows_of(index)
        refused = self._savepoints.refused(dropped, lambda keys: self._writer.delete(self._connection, index, keys))
        causes = {dropped[place]: error for place, error in refused.items()}

        def insert(part: Sequence[tuple[str, Row]]) -> None:
            self._writer.insert(self._connection, index, [row for _, row in part])

        while pairs:
            # where rows are deleted before they are written, the refused rows have to stay as they were
            savepoint = self._connection.begin_nested()
            if self._writer.bulk(index).replaces:
                self._writer.delete(self._connection, index, [key for key, _ in pairs])
            refused = self._savepoints.refused(pairs, insert, partial(self._put_singly, index, "upsert"))
            causes |= {pairs[place][0]: error for place, error in refused.items()}
            if not refused or not self._writer.bulk(index).replaces:
                savepoint.commit()
                break
            savepoint.rollback()
            pairs = [pair for place, pair in enumerate(pairs) if place not in refused]
        if causes:
            self._make_again(index, causes)

    def _put_singly(
        self, index: int, how: How, pairs: Sequence[tuple[str, Row]], *, keep: bool = True
    ) -> dict[int, Exception]:
        rows = [row for _, row in pairs]
        return refused_rows(self._connection, self._writer.bulk(index), rows, how, keep=keep)

    def _make_again(self, index: int, causes: dict[str, Exception]) -> None:
        """Write rows up to the events from which on the database refuses them, and park the aggregates there."""
        bulk = self._writer.bulk(index)
        stored, _ = bulk.load(self._connection, list(causes))
        name = self._plan.projections[index].row_type
        searches = []
        for aggregate_id in causes:
            key = name, aggregate_id
            until = self._since.get((index, key), 0)
            states = self._states(index, key, stored.get(aggregate_id), self._events(index, key), until)
            searches.append(_Search(aggregate_id, states, len(states) - 1))
        self._search(index, searches)
        again = [search for search in searches if search.good and search.state is not None]
        pairs: list[tuple[str, Row]] = [(search.aggregate_id, search.state) for search in again]  # type: ignore[misc]

        def put(part: Sequence[tuple[str, Row]]) -> None:
            self._writer.put(self._connection, index, [row for _, row in part], [key for key, _ in part])

        # alone each of them was accepted
        refused = self._savepoints.refused(pairs, put, partial(self._put_singly, index, "put"))
        late = {again[place].aggregate_id for place in refused}
        for search in searches:
            if search.aggregate_id in late:
                search.good, search.bad = 0, search.good
                self._search(index, [search])
                if search.good and search.state is not None:
                    put([(search.aggregate_id, search.state)])
            self._conclude(index, search, causes[search.aggregate_id])

    def _conclude(self, index: int, search: _Search, cause: Exception) -> None:
        key = self._plan.projections[index].row_type, search.aggregate_id
        events = self._events(index, key)
        sequence = events[search.good][1].sequence
        failure = HandlerFailed(index, key, sequence, reason(cause), "refused", may_pass(cause))
        failure.__cause__ = cause
        self._park(failure)
        if search.good and search.state is None:
            self._writer.delete(self._connection, index, [search.aggregate_id])
            self._keep(index, key, events[search.good - 1][1].sequence)

    def _keep(self, index: int, key: Key, sequence: int) -> None:
        """Keep the sequence of an aggregate whose row is deleted, if this projection is where it is kept."""
        if self._plan.keeps(key[0]) and self._plan.keepers.get(key[0]) == index:
            self.kept.setdefault(index, {})[self._plan.kept_id(key)] = sequence

    def _states(
        self, index: int, key: Key, stored: Any, commits: list[tuple[int, Envelope]], until: int
    ) -> list[Row | str | None]:
        """Return the row after each event, from what is stored: None where there is none, a text if it is refused."""
        apart, others, bulk = self._apart, others_than(self._plan, index), self._writer.bulk(index)
        apart.parked.clear()
        folded = Folded(apart)
        rows: list[Any] = [None] * len(self._plan.projections)
        rows[index] = stored
        states: list[Row | str | None] = [None]
        for stream_sequence, envelope in commits:
            if until and envelope.sequence >= until:
                break
            apart.fold(*key, rows, [(stream_sequence, [envelope])], folded, None, others)
            if rows[index] is None:
                states.append(apart.parked[key][index].error if key in apart.parked else None)
                continue
            carried, refused = bulk.carry_own({key[1]: rows[index]})
            states.append(refused[0] if refused else carried[0])
        return states

    def _search(self, index: int, searches: Sequence[_Search]) -> None:
        """Find out after how many events each row can still be written. After all of them it can't."""
        while open_ := [search for search in searches if search.bad - search.good > 1]:
            rows = [search for search in open_ if search.middle is not None and not isinstance(search.middle, str)]
            pairs: list[tuple[str, Row]] = [(search.aggregate_id, search.middle) for search in rows]  # type: ignore[misc]
            refused = self._put_singly(index, "put", pairs, keep=False) if pairs else {}
            wrong = {rows[place].aggregate_id for place in refused}
            for search in open_:
                bad = search.aggregate_id in wrong or isinstance(search.middle, str)
                if search.middle is None:
                    delete = partial(self._writer.delete, self._connection, index, [search.aggregate_id])
                    bad = self._savepoints.attempt(delete, keep=False) is not None
                search.halve(bad)

    # tallies

    def _write_tallies(self, index: int) -> None:
        bulk = self._writer.bulk(index)
        if not self._write.tallies.get(index) and index not in self._write.careful:
            return
        rows = self._write.tallies.get(index, [])
        add = partial(self._writer.add, self._connection, index, rows)
        if index not in self._write.careful and self._savepoints.attempt(add) is None:
            return
        added = list(self._added(index))
        while True:
            entries = self._entries(bulk, added)
            entries = {key: entries[key] for key in bulk.in_order(list(entries))}
            rows, refused = bulk.carry_sums(record for own in entries.values() for record in [_sum(bulk, own)])
            wrong: dict[Row, Exception] = {list(entries)[place]: Refused(why) for place, why in refused.items()}
            keys = [key for key in entries if key not in wrong]
            savepoint = self._connection.begin_nested()
            wrong |= {
                keys[place]: error
                for place, error in self._savepoints.refused(
                    rows,
                    partial(self._writer.add, self._connection, index),
                    lambda part: refused_rows(self._connection, bulk, part, "add"),
                ).items()
            }
            if not wrong:
                savepoint.commit()
                return
            savepoint.rollback()
            for key, error in wrong.items():
                found = self._first_bad(index, bulk, entries[key])
                transient = may_pass(error)
                self._park(HandlerFailed(index, found.aggregate, found.sequence, reason(error), "refused", transient))
            since = self._since
            added = [
                addition
                for addition in added
                if addition.sequence < since.get((index, addition.aggregate), addition.sequence + 1)
            ]

    def _added(self, index: int) -> Iterator[Added]:
        """Yield what each event adds, in stream order. Park the aggregates of events that add what can't be carried."""
        plan, others, bulk = self._plan.apart(), others_than(self._plan, index), self._writer.bulk(index)
        rows: list[Any] = [None] * len(plan.projections)
        parked: set[Key] = set()
        events = sorted(events_of(self._plan, index, self._batch), key=lambda event: (event[1], event[2].sequence))
        for key, stream_sequence, envelope in events:
            if key in parked:
                continue
            folded = Folded(plan)
            plan.fold(*key, rows, [(stream_sequence, [envelope])], folded, None, others)
            check_again(folded)
            records = list(folded.tallies[index].values())
            _, refused = bulk.carry(records)
            if refused:
                parked.add(key)
                self._park(HandlerFailed(index, key, envelope.sequence, next(iter(refused.values()))))
                continue
            for record in records:
                yield Added(envelope.sequence, key, record)

    def _entries(self, bulk: Bulk, added: Sequence[Added]) -> dict[Row, list[Added]]:
        entries: dict[Row, list[Added]] = {}
        for addition in added:
            rows, _ = bulk.carry([addition.record])
            entries.setdefault(tuple(rows[0][: bulk.codec.columns.keys]), []).append(addition)
        return entries

    def _first_bad(self, index: int, bulk: Bulk, added: Sequence[Added]) -> Added:
        """Return the first event after which an entry can't be written. After all of them it can't."""
        good, bad = 0, len(added)
        while bad - good > 1:
            middle = (good + bad) // 2
            rows, refused = bulk.carry([_sum(bulk, added[:middle])])
            if refused or self._savepoints.attempt(
                partial(self._writer.add, self._connection, index, rows), keep=False
            ):
                bad = middle
            else:
                good = middle
        return added[bad - 1]

    # handlers of Sql projections

    def _call(self, index: int, calls: Sequence[Recorded[Any]], parked: set[Key], block: int = BLOCK) -> None:
        """Call handlers with as many events at once as go through. Park the aggregates of the other events."""
        calls = [call for call in calls if (call._aggregate, call._aggregate_id) not in parked]
        if not calls:
            return
        error = self._savepoints.attempt(partial(self._call_and_check, index, calls), of_kernel=False)
        if error is None:
            return
        if len(calls) == 1:
            call = calls[0]
            key, sequence = (call._aggregate, call._aggregate_id), call.meta.sequence
            transient = isinstance(error, self._plan.transient) or may_pass(error)
            kind: FailureKind = "refused" if isinstance(error, DBAPIError) else "handler"
            why = f"{type(error).__name__}: {_said(error)}"
            failure = HandlerFailed(index, key, sequence, why, kind, transient)
            failure.__cause__ = error
            parked.add(key)
            self._park(failure)
            return
        size = block if len(calls) > block else (len(calls) + 1) // 2
        for start in range(0, len(calls), size):
            self._call(index, calls[start : start + size], parked, block)

    def _call_and_check(self, index: int, calls: Sequence[Recorded[Any]]) -> None:
        """Call handlers, and check then what is otherwise checked at the commit: a handler may rely on that."""
        postgres = self._connection.dialect.name == "postgresql"
        if postgres:
            self._connection.exec_driver_sql("SET CONSTRAINTS ALL DEFERRED")
        self._writer.call(self._connection, index, calls)
        if postgres:
            self.check_at_once()

    def _events(self, index: int, key: Key) -> list[tuple[int, Envelope]]:
        """Return the events of an aggregate that a projection has not folded before, in order."""
        if not self._commits:
            for of, commits, skip in self._batch:
                self._commits.setdefault(of, []).append((commits, skip))
        return [
            (stream_sequence, envelope)
            for commits, skip in self._commits[key]
            if index not in skip
            for stream_sequence, envelopes in commits
            for envelope in envelopes
        ]

    def _park(self, failure: HandlerFailed) -> None:
        """Make dead letters of the aggregate's events from the failed one on, unless they are."""
        index, key, since = failure.projection, failure.aggregate, failure.sequence
        before = self._since.get((index, key), 0)
        if before and before <= since:
            return
        self._since[index, key] = since
        self.failures.append(failure)
        events = self._events(index, key)
        for stream_sequence, envelope in events:
            sequence = envelope.sequence
            if since <= sequence and (not before or sequence < before):
                transient = failure.transient and sequence == since
                self.letters.append(Letter(index, key, sequence, stream_sequence, failure.error, transient))
        kept, stored = self.kept.get(index, {}), self._plan.kept_id(key)
        if stored in kept:
            kept[stored] = since - 1
            if since <= events[0][1].sequence:
                del kept[stored]


def _sum(bulk: Bulk, added: Sequence[Added]) -> Any:
    return bulk.codec.total([addition.record for addition in added])


def _said(error: Exception) -> object:
    return error.orig if isinstance(error, DBAPIError) else error
