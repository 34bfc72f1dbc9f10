"""Writes a folded batch: rows and checkpoints in one transaction, fenced by the owner's epoch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache, partial
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Any

import orjson
from sqlalchemy import Connection, Engine, insert, text

from projections import blame
from projections.blame import Suspect
from projections.bookkeeping import ADVANCE, KEEP, KEPT
from projections.bulk import Bulk
from projections.contention import outlast_contention
from projections.database import is_infrastructure
from projections.errors import Fenced, HandlerFailed, reason
from projections.exclusions import without_known_garbage
from projections.fold import Commits, Folded, Plan
from projections.generations import Generation
from projections.heads import MARK
from projections.parked import Key, Letter, Parked
from projections.projection import Recorded, Transaction
from projections.recount import recount
from projections.row_codec import Row
from projections.tables import dead_letter

logger = logging.getLogger("eskernel.projections")

Batch = Sequence[tuple[Key, Commits, frozenset[int]]]
"""The commits of each aggregate in a batch, and the projections that have folded them already."""
StoredCommit = Callable[[Letter], tuple[int, bytes]]
"""Returns the partition and the stored bytes of a dead letter's commit."""


@dataclass(slots=True)
class Write:
    """A batch ready to be written. Later folds don't change it.

    Attributes:
        moves: checkpoints to advance: projection, generation, partition, sequence before, sequence after.
        batch: what was folded.
        letter: returns where a dead letter of the batch is from.
        ids, rows: changed rows and the ids of their aggregates, by projection.
        dropped: ids of the aggregates whose rows are deleted, by projection.
        tallies: increments, by projection.
        calls: events for `Sql` handlers in stream order, by projection.
        kept: sequences of aggregates without a row, by projection.
        suspects: rows to be made again.
        careful: projections whose rows are known to contain some that are refused.
        letters: rows for the dead letter table.
        waiting_from: sequence of the first of them, by projection and aggregate.
        lettered: number of dead letters that were written, without those that wait for a newer program.
    """

    moves: list[tuple[str, int, int, int, int]]
    batch: Batch = ()
    letter: StoredCommit = lambda _: (0, b"")
    ids: dict[int, list[str]] = field(default_factory=dict)
    rows: dict[int, list[Row]] = field(default_factory=dict)
    dropped: dict[int, list[str]] = field(default_factory=dict)
    tallies: dict[int, list[Row]] = field(default_factory=dict)
    calls: dict[int, list[Recorded[Any]]] = field(default_factory=dict)
    kept: dict[int, dict[str, int]] = field(default_factory=dict)
    suspects: list[Suspect] = field(default_factory=list)
    careful: set[int] = field(default_factory=set)
    letters: list[dict[str, Any]] = field(default_factory=list)
    waiting_from: dict[tuple[int, Key], int] = field(default_factory=dict)
    lettered: int = 0


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A stored row that can't be read: its aggregate has to be parked for the projection."""

    index: int
    aggregate: Key
    error: str


_in_stream_order, _handler = attrgetter("_stream_sequence"), attrgetter("_place")


def one_line(error: str) -> str:
    """Return an error's text in a form that every database accepts."""
    return error.replace("\0", "\\0").encode(errors="backslashreplace").decode()[:4_000]


@lru_cache(1)
def _now(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).isoformat(timespec="seconds")


class Writer:
    """Writes the live generations of a plan's projections.

    Args:
        generations: the generation to write of each projection, in the plan's order.
        epoch: the epoch that the checkpoints must carry; otherwise the writer is fenced.
        alone: nobody else writes the tables.
        retry_after: seconds until the first automatic retry after a transient failure of a handler; 0 for no retry.
        absent: projections that have no tables, or whose tables are not written.
    """

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        generations: Sequence[Generation],
        epoch: int,
        retry_after: float = 1.0,
        alone: bool = False,
        absent: Collection[int] = (),
    ) -> None:
        self.retry_after, self.absent = retry_after, absent
        self.engine = engine
        self.plan = plan
        self.generations = list(generations)
        self.epoch = epoch
        self._advance = text(ADVANCE[engine.dialect.name])
        self._keep = text(KEEP[engine.dialect.name])
        self._kept = text(KEPT[engine.dialect.name])
        self.bulks = [
            Bulk(codec, next(iter(g.tables.values())), engine.dialect, alone) if codec is not None else None
            for codec, g in zip(plan.codecs, generations, strict=True)
        ]

    def bulk(self, index: int) -> Bulk:
        """Return the statements of a projection of rows or tallies."""
        bulk = self.bulks[index]
        assert bulk is not None, "an Sql projection writes its tables itself"
        return bulk

    def freeze(
        self, folded: Folded, moves: list[tuple[str, int, int, int, int]], letter: StoredCommit, batch: Batch
    ) -> Write:
        """Turn a folded batch into what is sent to the database.

        A row with a value that can't be sent becomes a suspect. Call `park_suspects` before anything else is folded.

        Args:
            batch: what was folded.
        """
        write = Write(moves, batch, letter)
        for index, bulk in enumerate(self.bulks):
            if kept := folded.kept[index]:
                write.kept[index] = dict(kept)
            if bulk is None:
                if calls := folded.calls[index]:
                    # those of a commit are in order
                    write.calls[index] = sorted(calls, key=_in_stream_order)
            elif bulk.codec.counting:
                increments = folded.tallies[index]
                if index in folded.recounted:
                    increments = recount(self.plan, index, batch)
                if increments:
                    rows, refused = bulk.carry_sums(increments.values())
                    write.tallies[index] = bulk.in_order(rows)
                    if refused:
                        write.careful.add(index)
            elif folded.rows[index] or folded.undone[index]:
                self._freeze_rows(index, bulk, folded, write)
        for made in reversed(folded.letters):
            write.waiting_from[made.projection, made.aggregate] = made.sequence
        write.letters = [self.letter_row(made, *letter(made)) for made in folded.letters]
        return write

    def _freeze_rows(self, index: int, bulk: Bulk, folded: Folded, write: Write) -> None:
        changed = folded.rows[index]
        dropped = [key for key, row in changed.items() if row is None]
        if dropped:
            write.dropped[index] = dropped
            changed = {key: row for key, row in changed.items() if row is not None}
        ids = list(changed)
        if bulk.codec.ids_of(changed.values()) == ids:
            rows, refused = bulk.carry(changed.values())
        else:
            rows, refused = bulk.carry_own(changed)
        if refused:
            write.suspects += [Suspect(index, ids[place], why) for place, why in refused.items()]
            ids = [key for place, key in enumerate(ids) if place not in refused]
        if rows:
            if bulk.many_writers:
                pairs = sorted(zip(ids, rows, strict=True), key=itemgetter(0))
                ids, rows = [key for key, _ in pairs], [row for _, row in pairs]
            write.ids[index], write.rows[index] = ids, rows
        for aggregate_id, since in folded.undone[index].items():
            write.suspects.append(Suspect(index, aggregate_id, "", since))

    def park_suspects(self, write: Write) -> None:
        """Park the aggregates of rows that can't be sent, so that nothing is folded into them any more.

        Call it when the batch is certainly written: one that is folded again must find the plan as it was.
        """
        suspects = [suspect for suspect in write.suspects if not suspect.since]
        if suspects:
            starts = {key: commits[0][1][0].sequence for key, commits, _ in reversed(write.batch)}
            for suspect in suspects:
                key = self.plan.projections[suspect.index].row_type, suspect.aggregate_id
                self.plan.parked.add(key, suspect.index, Parked(starts[key], suspect.error))

    def letter_row(self, letter: Letter, partition: int, payload: bytes) -> dict[str, Any]:
        """Return the row of the dead letter table for an event."""
        made = self.generations[letter.projection]
        return {
            "projection": made.name,
            "generation": made.number,
            "partition": partition,
            "aggregate": letter.aggregate[0],
            "aggregate_id": letter.aggregate[1],
            "stream_sequence": letter.stream_sequence,
            "sequence": letter.sequence,
            "payload": payload,
            "error": one_line(letter.error),
            "failed": _now(int(time.time())),
            "attempts": 0 if letter.waits else 1,
            "next_attempt": time.time() + self.retry_after if letter.transient and self.retry_after else None,
        }

    def garbage(self, stream_sequence: int, subject: str, partition: int, payload: bytes, why: str) -> dict[str, Any]:
        """Return a row of the dead letter table for a message that is not a commit of the app: it is quarantined."""
        return {
            "projection": "",
            "generation": 0,
            "partition": partition,
            "aggregate": "",
            "aggregate_id": subject,
            "stream_sequence": stream_sequence,
            "sequence": 0,
            "payload": payload,
            "error": one_line(why),
            "failed": _now(int(time.time())),
            "attempts": 1,
            "next_attempt": None,
        }

    def commit(self, write: Write) -> list[HandlerFailed]:
        """Write the batch in its own transaction.

        What the database refuses is not written. The aggregates to blame are parked in the same transaction, each from
        the first event that can't be written on.

        Returns:
            the aggregates that were parked. The caller must park them in its plan, and forget their records.

        Raises:
            Fenced: a checkpoint has changed since this writer's last write. Nothing was written.
            sqlalchemy.exc.DBAPIError: the database failed, and nothing was written; the same write can be tried again.
        """
        return outlast_contention(partial(self._commit, write))

    def _commit(self, write: Write) -> list[HandlerFailed]:
        try:
            with self.engine.begin() as connection:
                return self.apply(connection, write)
        except Exception as error:
            if isinstance(error, Fenced) or is_infrastructure(error):
                raise
            logger.debug("the batch is written with care: %s", reason(error))
        with self.engine.begin() as connection:
            return self.apply(connection, write, careful=True)

    def attempt(self, connection: Connection, write: Write) -> list[HandlerFailed]:
        """Write the batch as `commit` does, but in a transaction that the caller commits."""
        return outlast_contention(partial(self._attempt, connection, write))

    def _attempt(self, connection: Connection, write: Write) -> list[HandlerFailed]:
        try:
            with connection.begin_nested():
                failures = self.apply(connection, write)
                # at the caller's commit it would be too late to find out whom to blame
                blame.Care(self, connection, write).check_at_once()
                return failures
        except Exception as error:
            if isinstance(error, Fenced) or is_infrastructure(error):
                raise
        with connection.begin_nested():
            return self.apply(connection, write, careful=True)

    def apply(self, connection: Connection, write: Write, careful: bool = False) -> list[HandlerFailed]:
        """Write the batch in a transaction that the caller commits.

        Args:
            careful: find out what the database refuses, as `commit` does. Otherwise the transaction fails at it.

        Returns:
            the aggregates that were parked.
        """
        if write.moves:
            moved = connection.execute(
                self._advance, {"moves": orjson.dumps(write.moves).decode(), "epoch": self.epoch}
            ).rowcount
            if moved != len(write.moves):
                raise Fenced(
                    f"{len(write.moves) - moved} of {len(write.moves)} checkpoints have changed since the last write "
                    f"of epoch {self.epoch}"
                )
        care = blame.Care(self, connection, write)
        if careful:
            care.check_at_once()
        for index in range(len(self.bulks)):
            if careful or index in write.careful:
                care.write(index)
            else:
                self._write(connection, write, index, care)
        for index, kept in care.kept.items():
            if kept:
                self.keep(connection, index, kept)
        letters = write.letters + [self.letter_row(letter, *write.letter(letter)) for letter in care.letters]
        if any(not letter["projection"] for letter in letters):
            letters = without_known_garbage(connection, letters)
        if letters:
            connection.execute(insert(dead_letter), letters)
        write.lettered = sum(letter["attempts"] > 0 for letter in letters)
        return care.failures

    def _write(self, connection: Connection, write: Write, index: int, care: blame.Care) -> None:
        if self.plan.projections[index].kind == "rows":
            dropped, rows = care.rows_of(index)
            if dropped:
                self.delete(connection, index, dropped)
            if rows:
                self.put(connection, index, [row for _, row in rows], [key for key, _ in rows])
        if tallies := write.tallies.get(index):
            self.add(connection, index, tallies)
        if calls := write.calls.get(index):
            self.call(connection, index, calls)

    def delete(self, connection: Connection, index: int, ids: Sequence[str]) -> None:
        """Delete the rows of aggregates."""
        bulk = self.bulk(index)
        connection.execute(bulk.delete, bulk.key_parameters(sorted(ids)))

    def put(self, connection: Connection, index: int, rows: Sequence[Row], ids: Sequence[str]) -> None:
        """Write the rows of aggregates."""
        if self.bulk(index).replaces:
            self.delete(connection, index, ids)
        self.insert(connection, index, rows)

    def insert(self, connection: Connection, index: int, rows: Sequence[Row]) -> None:
        """Write rows. If the table `replaces`, none of them may be there."""
        bulk = self.bulk(index)
        for parameters in bulk.parameters(rows):
            connection.execute(bulk.upsert, parameters)

    def add(self, connection: Connection, index: int, rows: Sequence[Row]) -> None:
        """Add increments to counters."""
        bulk = self.bulk(index)
        for parameters in bulk.parameters(rows):
            connection.execute(bulk.add, parameters)

    def call(self, connection: Connection, index: int, calls: Sequence[Recorded[Any]]) -> None:
        """Call `Sql` handlers with events in stream order: one call for all successive events of a handler."""
        declared = self.plan.projections[index]
        tx = Transaction(connection, self.generations[index].tables, declared.foreign)
        for place, run in groupby(calls, _handler) if len(declared.handlers) > 1 else ((0, calls),):
            try:
                declared.handlers[place].function(declared.instance, tx, list(run))
            except Exception as error:
                cause = error.__cause__ or error.__context__
                if cause is not None and is_infrastructure(cause):
                    raise cause from error  # the handler made an error of its own from it
                raise

    def keep(self, connection: Connection, index: int, kept: dict[str, int]) -> None:
        """Store the sequences of aggregates without a row."""
        made = self.generations[index]
        parameters = {
            "projection": made.name,
            "generation": made.number,
            "kept": orjson.dumps(sorted(kept.items())).decode(),
        }
        connection.execute(self._keep, parameters)

    def load_rows(
        self, connection: Connection, aggregate: str, ids: Sequence[str]
    ) -> tuple[dict[str, list[Any]], list[Unreadable]]:
        """Return the stored records of these aggregates, by id and then by projection; None where there is no row.

        Returns:
            the records, and the rows that can't be read, which are None among the records.
        """
        loaded: dict[str, list[Any]] = {aggregate_id: [None] * len(self.bulks) for aggregate_id in ids}
        unreadable: list[Unreadable] = []
        for index in self.plan.row_indexes[aggregate]:
            if index in self.absent:
                continue
            found, failed = self.bulk(index).load(connection, ids)
            for aggregate_id, row in found.items():
                loaded[aggregate_id][index] = row
            unreadable += [
                Unreadable(index, (aggregate, aggregate_id), f"its stored row can't be read: {reason(error)}")
                for aggregate_id, error in failed.items()
            ]
        return loaded, unreadable

    def load_kept(self, connection: Connection, aggregate: str, rows: dict[str, list[Any]]) -> dict[str, int]:
        """Return the stored sequences of these aggregates, if their keeper has no row: 0 if none was folded.

        An aggregate is left out if that is unknown.

        Args:
            rows: the result of `load_rows`.
        """
        keeper = self.plan.keepers.get(aggregate)
        if keeper is None:
            return {}
        made = self.generations[keeper]
        ids = {self.plan.kept_id((aggregate, key)): key for key, records in rows.items() if records[keeper] is None}
        if not ids:
            return {}
        parameters = {"projection": made.name, "generation": made.number, "ids": orjson.dumps([*ids, MARK]).decode()}
        stored = {row[0]: row[1] for row in connection.execute(self._kept, parameters)}
        complete = stored.pop(MARK, None) is not None
        kept = {ids[stored_id]: last for stored_id, last in stored.items()}
        return dict.fromkeys(ids.values(), 0) | kept if complete else kept
