"""Writes a folded batch: rows and checkpoints in one transaction, fenced by the owner's epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import orjson
from sqlalchemy import Connection, Engine, TextClause, insert, select, text
from sqlalchemy.exc import DBAPIError

from aggregates.commit import Envelope
from projections.bulk import Bulk, key_parameters
from projections.database import is_infrastructure
from projections.errors import UNKNOWN, Fenced, HandlerFailed, KeyRefused
from projections.fold import Folded, Letter, Parked, Plan
from projections.generations import Generation
from projections.projection import Recorded, Transaction
from projections.tables import dead_letter

Groups = Sequence[tuple[tuple[str, str], Sequence[tuple[int, Sequence[Envelope]]]]]
_ADVANCE = {
    "sqlite": """
        UPDATE eskernel_checkpoint SET sequence = given.value->>4
        FROM json_each(:moves) AS given
        WHERE projection = given.value->>0 AND generation = given.value->>1 AND partition = given.value->>2
          AND sequence = given.value->>3 AND epoch = :epoch""",
    "postgresql": """
        UPDATE eskernel_checkpoint SET sequence = CAST(given->>4 AS bigint)
        FROM jsonb_array_elements(CAST(:moves AS jsonb)) AS given
        WHERE projection = given->>0 AND generation = CAST(given->>1 AS int) AND partition = CAST(given->>2 AS int)
          AND sequence = CAST(given->>3 AS bigint) AND epoch = :epoch""",
}


_KEEP = {
    "sqlite": """
        INSERT INTO eskernel_sequence (projection, generation, aggregate_id, sequence)
        SELECT :projection, :generation, value->>0, value->>1 FROM json_each(:kept) WHERE true
        ON CONFLICT (projection, generation, aggregate_id) DO UPDATE SET sequence = excluded.sequence""",
    "postgresql": """
        INSERT INTO eskernel_sequence (projection, generation, aggregate_id, sequence)
        SELECT :projection, :generation, given->>0, CAST(given->>1 AS bigint)
        FROM jsonb_array_elements(CAST(:kept AS jsonb)) AS given
        ON CONFLICT (projection, generation, aggregate_id) DO UPDATE SET sequence = excluded.sequence""",
}
_KEPT = {
    "sqlite": """
        SELECT aggregate_id, sequence FROM eskernel_sequence WHERE projection = :projection
        AND generation = :generation AND aggregate_id IN (SELECT value FROM json_each(:ids))""",
    "postgresql": """
        SELECT aggregate_id, sequence FROM eskernel_sequence WHERE projection = :projection
        AND generation = :generation
        AND aggregate_id IN (SELECT value FROM json_array_elements_text(CAST(:ids AS json)))""",
}


@dataclass(slots=True)
class Write:
    """A batch ready to be written. Later folds don't change it.

    Attributes:
        moves: checkpoints to advance: projection, generation, partition, sequence before, sequence after.
        statements: statements to execute, in order: projection's index, statement, list of parameters.
        sql: `Sql` handlers to call: projection's index, handler's function, events.
        letters: rows for the dead letter table.
    """

    moves: list[tuple[str, int, int, int, int]]
    statements: list[tuple[int, TextClause, list[dict[str, Any]]]] = field(default_factory=list)
    sql: list[tuple[int, Callable[..., Any], list[Recorded[Any]]]] = field(default_factory=list)
    letters: list[dict[str, Any]] = field(default_factory=list)


def one_line(error: str) -> str:
    """Return an error's text in a form that every database accepts."""
    return error.replace("\0", "\\0")[:4_000]


class Writer:
    """Writes the live generations of a plan's projections.

    Args:
        generations: the generation to write of each projection, in the plan's order.
        epoch: the epoch that the checkpoints must carry; otherwise the writer is fenced.
        retry_after: seconds until the first automatic retry after a transient failure of a handler; 0 for no retry.
    """

    def __init__(
        self, engine: Engine, plan: Plan, generations: Sequence[Generation], epoch: int, retry_after: float = 1.0
    ) -> None:
        self.retry_after = retry_after
        self.engine = engine
        self.plan = plan
        self.generations = list(generations)
        self.epoch = epoch
        self._advance = text(_ADVANCE[engine.dialect.name])
        self._keep = text(_KEEP[engine.dialect.name])
        self._kept = text(_KEPT[engine.dialect.name])
        self._bulk = [
            Bulk(p.columns, next(iter(g.tables.values())), engine.dialect) if p.columns is not None else None
            for p, g in zip(plan.projections, generations, strict=True)
        ]

    def freeze(
        self,
        folded: Folded,
        moves: list[tuple[str, int, int, int, int]],
        letter: Callable[[Letter], tuple[int, bytes]],
    ) -> Write:
        """Turn a folded batch into statements and parameters.

        Args:
            letter: returns the partition and the stored bytes of a dead letter.

        Raises:
            HandlerFailed: a row has a value that can't be sent to the database; its event isn't known (`UNKNOWN`).
        """
        write = Write(moves)
        for index, bulk in enumerate(self._bulk):
            if kept := folded.kept[index]:
                write.statements.append((index, self._keep, [self.keeping(index, kept)]))
            if bulk is None:
                for handler, events in zip(self.plan.projections[index].handlers, folded.events[index], strict=True):
                    if events:
                        write.sql.append((index, handler.function, events))
                continue
            if rows := folded.rows[index]:
                kept = {key: row for key, row in rows.items() if row is not None}
                if kept:
                    write.statements.append((index, bulk.upsert, self._parameters(index, bulk, kept)))
                if len(kept) < len(rows):
                    dropped = [key for key, row in rows.items() if row is None]
                    write.statements.append((index, bulk.delete, [key_parameters(dropped)]))
            if increments := folded.tallies[index]:
                try:
                    write.statements.append((index, bulk.add, bulk.parameters(increments.values())))
                except Exception as error:
                    why = f"{type(error).__name__}: {error}"
                    raise KeyRefused(index, self.plan.projections[index].aggregate, None, why) from error
        if folded.letters:
            write.letters = [self._letter_row(waiting, *letter(waiting)) for waiting in folded.letters]
        return write

    def keeping(self, index: int, kept: dict[str, int]) -> dict[str, Any]:
        """Return the parameters of the statement that stores the sequences of aggregates without a row."""
        made = self.generations[index]
        return {"projection": made.name, "generation": made.number, "kept": orjson.dumps(list(kept.items())).decode()}

    def keep(self, connection: Connection, index: int, kept: dict[str, int]) -> None:
        """Store the sequences of aggregates without a row."""
        connection.execute(self._keep, self.keeping(index, kept))

    def _parameters(self, index: int, bulk: Bulk, rows: dict[str, Any]) -> list[dict[str, str]]:
        try:
            return bulk.parameters(rows.values())
        except Exception:
            for key, row in rows.items():
                try:
                    bulk.parameters([row])
                except Exception as error:
                    why = f"{type(error).__name__}: {error}"
                    raise HandlerFailed(index, (self.plan.projections[index].aggregate, key), UNKNOWN, why) from error
            raise

    def blame(self, failure: HandlerFailed, groups: Groups) -> HandlerFailed:
        """Complete a failure with the aggregate to park and the event to park it from.

        For a refused tally entry it is the last aggregate of the batch that added to the entry. If the event isn't
        known, it is the aggregate's first event of the batch.

        Args:
            groups: the batch: the commits of each aggregate (type, id).
        """
        if isinstance(failure, KeyRefused):
            bulk = self._bulk[failure.projection]
            assert bulk is not None
            others = frozenset(range(len(self.plan.projections))) - {failure.projection}
            rows: list[Any] = [None] * len(self.plan.projections)
            for aggregate, commits in reversed(groups):
                if aggregate[0] == failure.aggregate[0]:
                    alone = Folded(self.plan)
                    self.plan.fold(*aggregate, rows, commits, alone, None, others)
                    if any(bulk.key(entry) == failure.key for entry in alone.tallies[failure.projection].values()):
                        failure.aggregate = aggregate
                        break
        if failure.sequence == UNKNOWN:
            commits = next(commits for aggregate, commits in groups if aggregate == failure.aggregate)
            failure.sequence = commits[0][1][0].sequence
        return failure

    def _letter_row(self, letter: Letter, partition: int, payload: bytes) -> dict[str, Any]:
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
            "failed": datetime.now(UTC).isoformat(timespec="seconds"),
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
            "failed": datetime.now(UTC).isoformat(timespec="seconds"),
            "attempts": 1,
            "next_attempt": None,
        }

    def commit(self, write: Write) -> None:
        """Write the batch in its own transaction: completely or not at all.

        Raises:
            Fenced: a checkpoint has changed since this writer's last write.
            HandlerFailed: an `Sql` handler raised, or the database refuses a row that a handler made.
            sqlalchemy.exc.DBAPIError: the database failed; the same write can be tried again.
        """
        try:
            with self.engine.begin() as connection:
                self.apply(connection, write)
        except DBAPIError as error:
            if not is_infrastructure(error):
                self.find_refused(write, error)
            raise

    def find_refused(self, write: Write, error: DBAPIError) -> None:
        """Raise `HandlerFailed` for the row that the database refuses. The search writes rows, and rolls them back."""
        with self.engine.connect() as connection:
            for index, statement, parameters in write.statements:
                bulk, aggregate = self._bulk[index], self.plan.projections[index].aggregate
                if bulk is None or statement is bulk.delete or statement is self._keep:
                    continue
                for key, parameter in bulk.one_by_one(parameters):
                    try:
                        with connection.begin_nested():
                            connection.execute(statement, parameter)
                    except DBAPIError as refused:
                        if is_infrastructure(refused):
                            raise
                        if statement is bulk.add:
                            text_ = orjson.dumps(key).decode()
                            raise KeyRefused(index, aggregate, text_, str(refused.orig)) from error
                        raise HandlerFailed(index, (aggregate, key[0]), UNKNOWN, str(refused.orig)) from error
            connection.rollback()

    def apply(self, connection: Connection, write: Write) -> None:
        """Write the batch in a transaction that the caller commits. It raises the errors of `commit`."""
        if write.moves:
            moved = connection.execute(
                self._advance, {"moves": orjson.dumps(write.moves).decode(), "epoch": self.epoch}
            ).rowcount
            if moved != len(write.moves):
                raise Fenced(
                    f"{len(write.moves) - moved} of {len(write.moves)} checkpoints have changed since the last write "
                    f"of epoch {self.epoch}"
                )
        for _, statement, parameters in write.statements:
            for parameter in parameters:
                connection.execute(statement, parameter)
        for index, function, events in write.sql:
            self._call(connection, index, function, events)
        if write.letters:
            connection.execute(insert(dead_letter), write.letters)

    def _call(
        self, connection: Connection, index: int, function: Callable[..., Any], events: list[Recorded[Any]]
    ) -> None:
        tx = Transaction(connection, self.generations[index].tables)
        instance, aggregate = self.plan.projections[index].instance, self.plan.projections[index].aggregate
        try:
            with connection.begin_nested():
                function(instance, tx, events)
            return
        except Exception as error:
            if is_infrastructure(error):
                raise
        # call the handler with one event at a time, to find the event that it fails at
        for recorded in events:
            try:
                with connection.begin_nested():
                    function(instance, tx, [recorded])
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                key, transient = (aggregate, recorded.meta.aggregate_id), isinstance(error, self.plan.transient)
                raise HandlerFailed(index, key, recorded.meta.sequence, why, "handler", transient) from error

    def load_rows(self, connection: Connection, aggregate: str, ids: Sequence[str]) -> dict[str, list[Any]]:
        """Return the stored records of these aggregates, by id and then by projection; None where there is no row."""
        loaded: dict[str, list[Any]] = {aggregate_id: [None] * len(self._bulk) for aggregate_id in ids}
        for index in self.plan.row_indexes[aggregate]:
            bulk = self._bulk[index]
            assert bulk is not None
            for key, row in bulk.load(connection, ids, self.plan.makers[index]).items():
                loaded[key][index] = row
        return loaded

    def load_kept(self, connection: Connection, aggregate: str, rows: dict[str, list[Any]]) -> dict[str, int]:
        """Return the stored sequences of these aggregates, if their keeper has no row.

        Args:
            rows: the result of `load_rows`.
        """
        keeper = self.plan.keepers.get(aggregate)
        if keeper is None:
            return {}
        made = self.generations[keeper]
        bare = [aggregate_id for aggregate_id, records in rows.items() if records[keeper] is None]
        if not bare:
            return {}
        parameters = {"projection": made.name, "generation": made.number, "ids": orjson.dumps(bare).decode()}
        return {row[0]: row[1] for row in connection.execute(self._kept, parameters)}

    def load_parked(self, connection: Connection) -> None:
        """Replace the plan's parked aggregates by those that wait behind the stored dead letters."""
        index_of = {(g.name, g.number): index for index, g in enumerate(self.generations)}
        self.plan.parked.clear()
        for row in connection.execute(select(dead_letter).order_by(dead_letter.c.id)):
            index = index_of.get((row.projection, row.generation))
            if index is not None and row.sequence > 0:
                # not transient: the stored letter itself has the time of the next attempt
                parked = Parked(row.sequence, row.error, waits=not row.attempts)
                self.plan.parked.add((row.aggregate, row.aggregate_id), index, parked)
