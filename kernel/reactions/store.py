"""What a policy or an effect keeps in SQL: where it stands, what is parked, and what its commands have come to.

Its checkpoints and dead letters stand beside those of the projections, as generation 0 of its name, and are fenced in
the same way: an owner with an older epoch can't write.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

import orjson
from sqlalchemy import Connection, Engine, Row, delete, exists, func, insert, select, text, update

from aggregates.reacting import DeclaredReaction
from projections.bookkeeping import ADVANCE
from projections.checkpoints import Move
from projections.contention import outlast_contention
from projections.database import reads
from projections.errors import Fenced, SchemaError
from projections.generations import FENCE, PAUSED, lock_checkpoints
from projections.parked import Key
from projections.tables import checkpoint, dead_letter, reaction, rejection, stream, timer

NUMBER = 0
"""Generation number of the checkpoints and dead letters of policies and effects."""

Rejections = dict[str, dict[str, str]]
"""Why commands were rejected, by the event's id, and by the place among what is owed for it."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """An owner's claim on partitions of one policy or effect.

    Attributes:
        epoch: higher than that of any earlier claim. It may write only while the checkpoints carry it.
        positions: stream sequence up to which it has reacted, by partition.
        parked: aggregates whose events wait behind a dead letter.
        waiting: those of them that wait for a newer program, and have not failed.
        rejected: commands for events beyond the checkpoints that were rejected.
    """

    epoch: int
    positions: dict[int, int]
    parked: set[Key]
    waiting: set[Key]
    rejected: Rejections


@dataclass(slots=True)
class ReactionWrite:
    """What some batches have come to, for one transaction.

    Attributes:
        moves: steps of the checkpoints.
        letters: rows of dead letters.
        timers: set and cancelled ones, in the order of their events.
    """

    moves: list[Move] = field(default_factory=list)
    letters: list[dict[str, Any]] = field(default_factory=list)
    timers: list[dict[str, Any]] = field(default_factory=list)


def register(engine: Engine, declared: Sequence[DeclaredReaction], partitions: int, last: int) -> list[tuple[str, int]]:
    """Let policies and effects that have never run begin, each where it says.

    Args:
        last: stream sequence of the log's last commit.

    Returns:
        name of each new one, and the stream sequence after which it begins.

    Raises:
        SchemaError: a name belongs to another kind.
    """
    begun = []
    with engine.begin() as connection:
        # workers that start together come one after the other
        connection.execute(select(stream.c.app).order_by(stream.c.app).with_for_update())
        known = {row.name: row.kind for row in connection.execute(select(reaction.c.name, reaction.c.kind))}
        for each in declared:
            if known.get(each.name, each.kind) != each.kind:
                raise SchemaError(
                    f"{each.name} has run as {known[each.name]} on this database, and is declared as {each.kind}: give "
                    f"it another name"
                )
            if each.name in known:
                continue
            began = last if each.start == "now" else 0
            created = datetime.now(UTC).isoformat(timespec="seconds")
            connection.execute(insert(reaction).values(name=each.name, kind=each.kind, began=began, created=created))
            connection.execute(
                insert(checkpoint),
                [
                    {"projection": each.name, "generation": NUMBER, "partition": number, "sequence": began, "epoch": 0}
                    for number in range(partitions)
                ],
            )
            begun.append((each.name, began))
    return begun


def read_known(engine: Engine) -> list[tuple[str, str]]:
    """Return kind and name of each policy and effect that has run on the database."""
    with reads(engine).connect() as connection:
        rows = connection.execute(select(reaction.c.kind, reaction.c.name).order_by(reaction.c.name))
        return [(row.kind, row.name) for row in rows]


def claim(engine: Engine, app: str, name: str, partitions: Collection[int]) -> Claimed | None:
    """Put a new epoch on these partitions: it fences the previous owner. Return None if a person has paused it.

    Raises:
        Fenced: the policy or effect has been dropped meanwhile.
    """
    return outlast_contention(partial(_claim, engine, app, name, sorted(partitions)))


def _claim(engine: Engine, app: str, name: str, partitions: Sequence[int]) -> Claimed | None:
    with engine.begin() as connection:
        # the row's lock makes two simultaneous claims take one epoch after the other
        connection.execute(update(stream).where(stream.c.app == app).values(epoch=stream.c.epoch + 1))
        epoch = int(connection.scalar(select(stream.c.epoch).where(stream.c.app == app)) or 0)
        epochs = lock_checkpoints(connection, name, NUMBER, partitions)
        if len(epochs) != len(partitions):
            raise Fenced(f"{name} has no checkpoints: it was dropped")
        if PAUSED in epochs.values():
            return None
        own = _own(name, partitions)
        connection.execute(update(checkpoint).where(*own).values(epoch=epoch))
        rows = connection.execute(select(checkpoint.c.partition, checkpoint.c.sequence).where(*own))
        positions = {row.partition: row.sequence for row in rows}
        parked, waiting = _load_parked(connection, name, partitions)
        return Claimed(epoch, positions, parked, waiting, _load_rejected(connection, name, positions))


def _own(name: str, partitions: Collection[int]) -> tuple[Any, ...]:
    return (
        checkpoint.c.projection == name,
        checkpoint.c.generation == NUMBER,
        checkpoint.c.partition.in_(sorted(partitions)),
    )


def letters_of(name: str) -> tuple[Any, ...]:
    """Return the conditions for the dead letters of a policy or an effect."""
    return dead_letter.c.projection == name, dead_letter.c.generation == NUMBER


def _load_parked(connection: Connection, name: str, partitions: Collection[int]) -> tuple[set[Key], set[Key]]:
    rows = connection.execute(
        select(dead_letter.c.aggregate, dead_letter.c.aggregate_id, func.max(dead_letter.c.attempts).label("attempts"))
        .where(*letters_of(name), dead_letter.c.partition.in_(sorted(partitions)))
        .group_by(dead_letter.c.aggregate, dead_letter.c.aggregate_id)
    ).all()
    return (
        {(row.aggregate, row.aggregate_id) for row in rows},
        {(row.aggregate, row.aggregate_id) for row in rows if not row.attempts},
    )


def _load_rejected(connection: Connection, name: str, positions: dict[int, int]) -> Rejections:
    lowest = min(positions.values(), default=0)
    rows = connection.execute(
        select(rejection)
        .where(rejection.c.policy == name, rejection.c.stream_sequence > lowest)
        .where(rejection.c.partition.in_(sorted(positions)))
    )
    return _by_event(row for row in rows if row.stream_sequence > positions[row.partition])


def _by_event(rows: Iterable[Row[Any]]) -> Rejections:
    found: Rejections = {}
    for row in rows:
        found.setdefault(row.event_id, {})[row.place] = row.reason
    return found


def read_rejected(engine: Engine, policy: str, sequences: Collection[int]) -> Rejections:
    """Return which commands for the events at these stream sequences were rejected."""
    with reads(engine).connect() as connection:
        own = rejection.c.policy == policy, rejection.c.stream_sequence.in_(sorted(set(sequences)))
        return _by_event(connection.execute(select(rejection).where(*own)))


_TIMER = """
    INSERT INTO eskernel_timer
      (policy, name, partition, stream_sequence, place, due, attempt, attempts, error, owed)
    {given}
    ON CONFLICT (policy, name) DO UPDATE SET partition = excluded.partition,
      stream_sequence = excluded.stream_sequence, place = excluded.place, due = excluded.due,
      attempt = excluded.due, attempts = 0, error = '', owed = excluded.owed
    WHERE (eskernel_timer.stream_sequence, eskernel_timer.place) < (excluded.stream_sequence, excluded.place)"""
_SET_TIMERS = {
    "sqlite": _TIMER.format(
        given="""SELECT :policy, value->>0, value->>1, value->>2, value->>3, value->>4, value->>4, 0, '', value->>5
        FROM json_each(:timers) WHERE true"""
    ),
    "postgresql": _TIMER.format(
        given="""SELECT :policy, given->>0, CAST(given->>1 AS int), CAST(given->>2 AS bigint),
          CAST(given->>3 AS bigint), CAST(given->>4 AS bigint), CAST(given->>4 AS bigint), 0, '', given->>5
        FROM json_array_elements(CAST(:timers AS json)) AS given"""
    ),
}
"""Sets and cancels timers: of two changes to the same timer that of the later event wins, in whatever order they come,
since two partitions may be at different places in the log."""


def write(engine: Engine, name: str, epoch: int, done: ReactionWrite) -> None:
    """Move the checkpoints, and store what belongs to them, in one transaction.

    Raises:
        Fenced: a checkpoint has changed since this owner's last write. Nothing was written.
        sqlalchemy.exc.DBAPIError: the database failed, and nothing was written.
    """
    outlast_contention(partial(_write, engine, name, epoch, done))


def _write(engine: Engine, name: str, epoch: int, done: ReactionWrite) -> None:
    dialect = engine.dialect.name
    with engine.begin() as connection:
        if done.moves:
            moves = {"moves": orjson.dumps(sorted(done.moves)).decode(), "epoch": epoch}
            moved = connection.execute(text(ADVANCE[dialect]), moves).rowcount
            if moved != len(done.moves):
                raise Fenced(f"{name}: a checkpoint has another owner by now, or was paused")
        moving = {partition for _, _, partition, _, _ in done.moves}
        if others := {each["partition"] for each in done.timers} - moving:
            epochs = lock_checkpoints(connection, name, NUMBER, sorted(others))
            if any(epochs.get(partition) != epoch for partition in others):
                raise Fenced(f"{name}: a checkpoint has another owner by now, or was paused")
        if done.letters:
            connection.execute(insert(dead_letter), done.letters)
        set_timers(connection, name, done.timers)


def set_timers(connection: Connection, policy: str, timers: Sequence[dict[str, Any]]) -> None:
    """Set and cancel timers."""
    if not timers:
        return
    # the last change of each, and in the order of their names, so that two owners don't meet in a deadlock
    in_order = sorted(timers, key=lambda each: (each["stream_sequence"], each["place"]))
    latest = {each["name"]: each for each in in_order}
    given = [
        [each[column] for column in ("name", "partition", "stream_sequence", "place", "due", "owed")]
        for _, each in sorted(latest.items())
    ]
    statement = text(_SET_TIMERS[connection.dialect.name])
    connection.execute(statement, {"policy": policy, "timers": orjson.dumps(given).decode()})


def check_epoch(connection: Connection, name: str, epoch: int, partition: int) -> None:
    """Keep a partition's checkpoint from changing until the transaction ends, or raise `Fenced`."""
    if lock_checkpoints(connection, name, NUMBER, [partition]).get(partition) != epoch:
        raise Fenced(f"{name}: partition {partition} has another owner by now, or was paused")


def check_owner(engine: Engine, name: str, epoch: int, partitions: Collection[int]) -> None:
    """Raise `Fenced` if another owner has claimed these partitions, or a person has paused or changed something."""
    with reads(engine).connect() as connection:
        other = select(checkpoint.c.partition).where(*_own(name, partitions), checkpoint.c.epoch != epoch).limit(1)
        if connection.execute(other).first() is not None:
            raise Fenced(f"{name}: a checkpoint has another owner by now, or was paused")


def record_rejection(engine: Engine, epoch: int, row: dict[str, Any]) -> None:
    """Record that a command was rejected, before anything follows from it.

    Raises:
        Fenced: the partition has another owner by now, whose copy of the command may have been taken.
    """

    def record() -> None:
        with engine.begin() as connection:
            check_epoch(connection, row["policy"], epoch, row["partition"])
            known = select(rejection.c.place).where(
                rejection.c.policy == row["policy"],
                rejection.c.event_id == row["event_id"],
                rejection.c.place == row["place"],
            )
            if connection.execute(known).first() is None:
                connection.execute(insert(rejection).values(**row))

    outlast_contention(record)


def rejections(engine: Engine, name: str | None = None, limit: int = 100) -> list[dict[str, Any]]:
    """Return the newest rejected commands of one policy, or of all."""
    query = select(rejection).order_by(rejection.c.rejected.desc(), rejection.c.stream_sequence.desc()).limit(limit)
    if name is not None:
        query = query.where(rejection.c.policy == name)
    with reads(engine).connect() as connection:
        return [{str(key): value for key, value in row.items()} for row in connection.execute(query).mappings()]


def forget_rejections(engine: Engine, before: str) -> None:
    """Delete what was rejected before a time, as far as its policy has passed the event for good."""
    passed = (
        select(func.min(checkpoint.c.sequence))
        .where(checkpoint.c.projection == rejection.c.policy, checkpoint.c.generation == NUMBER)
        .scalar_subquery()
    )
    needed = (
        exists().where(
            dead_letter.c.projection == rejection.c.policy,
            dead_letter.c.generation == NUMBER,
            dead_letter.c.stream_sequence == rejection.c.stream_sequence,
        ),
        exists().where(
            timer.c.policy == rejection.c.policy,
            timer.c.attempts > 0,
            timer.c.stream_sequence == rejection.c.stream_sequence,
        ),
    )
    with engine.begin() as connection:
        old = rejection.c.rejected < before, rejection.c.stream_sequence <= passed
        connection.execute(delete(rejection).where(*old, *(~each for each in needed)))


# what people do


def pause(engine: Engine, name: str, paused: bool) -> None:
    """Have nobody react for a policy or an effect, or let it go on from where it was."""
    with engine.begin() as connection:
        lock_checkpoints(connection, name, NUMBER)
        own = checkpoint.c.projection == name, checkpoint.c.generation == NUMBER
        connection.execute(update(checkpoint).where(*own).values(epoch=PAUSED if paused else FENCE))


def is_paused(engine: Engine, name: str) -> bool:
    """Return whether a person has paused a policy or an effect."""
    with reads(engine).connect() as connection:
        own = checkpoint.c.projection == name, checkpoint.c.generation == NUMBER, checkpoint.c.epoch == PAUSED
        return connection.execute(select(checkpoint.c.partition).where(*own).limit(1)).first() is not None


def go_back(engine: Engine, name: str, after: int) -> None:
    """Have an effect handle again what comes after a stream sequence; its dead letters of these events are dropped."""
    with engine.begin() as connection:
        lock_checkpoints(connection, name, NUMBER)
        own = checkpoint.c.projection == name, checkpoint.c.generation == NUMBER
        back = (*own, checkpoint.c.sequence > after)
        connection.execute(update(checkpoint).where(*back).values(sequence=after))
        connection.execute(update(checkpoint).where(*own, checkpoint.c.epoch != PAUSED).values(epoch=FENCE))
        connection.execute(delete(dead_letter).where(*letters_of(name), dead_letter.c.stream_sequence > after))


def drop(engine: Engine, name: str) -> None:
    """Forget a policy or an effect: where it stands, its dead letters, timers and rejections."""
    with engine.begin() as connection:
        lock_checkpoints(connection, name, NUMBER)
        connection.execute(delete(checkpoint).where(checkpoint.c.projection == name, checkpoint.c.generation == NUMBER))
        connection.execute(delete(dead_letter).where(*letters_of(name)))
        for table in ("eskernel_timer", "eskernel_rejection"):
            connection.execute(text(f"DELETE FROM {table} WHERE policy = :name"), {"name": name})
        connection.execute(delete(reaction).where(reaction.c.name == name))
