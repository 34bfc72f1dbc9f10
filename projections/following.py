"""Which generation of a projection a program keeps up to date, and which ones have to be built for it.

A program keeps up to date the generation of the version that it declares: the one that readers see, or one beside it.
So an old and a new program run side by side, each with tables of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from operator import attrgetter
from typing import Any

from sqlalchemy import Connection, Dialect, Engine, func, inspect, select, update
from sqlalchemy.schema import CreateTable

from aggregates.declaration import AggregateType
from aggregates.fingerprint import fingerprint_code
from projections.declaration import DeclaredProjection
from projections.errors import Fenced
from projections.generations import (
    FENCE,
    LAYOUT,
    PAUSED,
    Generation,
    generation,
    is_built,
    lock_checkpoints,
    now,
    numbers,
    positions,
)
from projections.naming import table_of
from projections.tables import checkpoint, projection, stream

STATES = ("live", "ready", "retired")
"""States of generations that are kept up to date, the first choice first."""


@dataclass(frozen=True, slots=True)
class Missing:
    """What the database lacks for a program.

    Attributes:
        build: projections that have to be built and shown.
        show: generations that are built, and are to be shown: a `prepare` has made them.
        behind: projections of which readers see a newer version, with that version.
        resumable: numbers of unfinished generations that the same program has begun to build, by projection.
    """

    build: list[DeclaredProjection] = field(default_factory=list)
    show: list[Generation] = field(default_factory=list)
    behind: dict[str, int] = field(default_factory=dict)
    resumable: dict[str, int] = field(default_factory=dict)


def followed(connection: Connection, declared: DeclaredProjection) -> Generation | None:
    """Return the generation of the declared version that is to be kept up to date, or None if there is none."""
    rows = connection.execute(
        select(projection.c.generation, projection.c.state).where(
            projection.c.name == declared.name,
            projection.c.version == declared.version,
            projection.c.layout == LAYOUT,
            projection.c.state.in_(STATES),
        )
    ).all()
    if not rows:
        return None
    first = min(rows, key=lambda row: (STATES.index(row.state), -row.generation))
    return generation(declared, first.generation)


def live_version(connection: Connection, name: str) -> int:
    """Return the version of a projection that readers see; 0 if they see none."""
    query = select(projection.c.version).where(projection.c.name == name, projection.c.state == "live")
    return connection.scalar(query) or 0


def find_missing(
    connection: Connection, projections: Sequence[DeclaredProjection], types: Sequence[AggregateType[Any]] = ()
) -> Missing:
    """Compare the generations of the database with what a program declares.

    Only a higher version than the one that readers see is built and shown by itself. A program with a lower one never
    takes the view back: it may be an old worker that was started again in the middle of a deployment. And a version
    that readers saw before stays beside the present one: somebody has rolled it back.

    Args:
        types: the app's aggregates; without them, nothing is resumable.
    """
    found = Missing()
    for declared in projections:
        version = live_version(connection, declared.name)
        if version > declared.version:
            found.behind[declared.name] = version
            continue
        if version == declared.version:
            if not is_built(connection, declared):
                found.build.append(declared)
        elif (made := followed(connection, declared)) is None or not has_tables(connection, made):
            found.build.append(declared)
        elif made.number in numbers(connection, declared.name, "ready"):
            if types and _is_of_other_code(connection, made, types):
                found.build.append(declared)
            else:
                found.show.append(made)
    for declared in found.build if types else ():
        unfinished = connection.execute(
            select(projection.c.generation, projection.c.code).where(
                projection.c.name == declared.name,
                projection.c.version == declared.version,
                projection.c.layout == LAYOUT,
                projection.c.state == "building",
            )
        ).all()
        code = code_of(declared, types, connection.dialect)
        for row in unfinished:
            if code and row.code == code and has_tables(connection, generation(declared, row.generation)):
                found.resumable[declared.name] = row.generation
    return found


def _is_of_other_code(connection: Connection, made: Generation, types: Sequence[AggregateType[Any]]) -> bool:
    """Return whether a generation was built by a program whose code differs, though its version is the same."""
    own = (projection.c.name == made.name) & (projection.c.generation == made.number)
    stored = connection.scalar(select(projection.c.code).where(own))
    code = code_of(made.projection, types, connection.dialect)
    return bool(stored and code and stored != code)


def has_tables(connection: Connection, made: Generation) -> bool:
    """Return whether all tables of a generation exist."""
    return all(inspect(connection).has_table(table.name) for table in made.tables.values())


def code_of(declared: DeclaredProjection, types: Sequence[AggregateType[Any]], dialect: Dialect) -> str:
    """Return a fingerprint of all that a projection's rows follow from but the log; empty if it can't be had."""
    codes = [fingerprint_code(known, [type(declared.instance)]) for known in types if known.name in declared.aggregates]
    if None in codes:
        return ""
    hashed = blake2b(b"".join(code or b"" for code in codes), digest_size=32)
    for model in declared.models:
        hashed.update(str(CreateTable(table_of(model)).compile(dialect=dialect)).encode())
    return hashed.hexdigest()


def take(connection: Connection, app: str, made: Sequence[Generation]) -> tuple[int, dict[int, int]]:
    """Take generations from whoever writes them, to go on with them.

    Returns:
        the epoch that their checkpoints carry now, and how far all of them have folded: stream sequence by partition.

    Raises:
        Fenced: one was dropped, or they stand at different places.
    """
    connection.execute(update(stream).where(stream.c.app == app).values(epoch=stream.c.epoch + 1))
    epoch = int(connection.scalar(select(stream.c.epoch).where(stream.c.app == app)) or 0)
    places: list[dict[int, int]] = []
    for each in sorted(made, key=attrgetter("name")):
        lock_checkpoints(connection, each.name, each.number)
        own = (checkpoint.c.projection == each.name) & (checkpoint.c.generation == each.number)
        connection.execute(update(checkpoint).where(own).values(epoch=epoch))
        places.append(positions(connection, each))
    if not places[0] or any(place != places[0] for place in places):
        raise Fenced(f"generations of {', '.join(each.name for each in made)} were dropped, or moved, meanwhile")
    return epoch, places[0]


def set_ready(engine: Engine, made: Sequence[Generation]) -> None:
    """Note that generations are built, and not shown yet. Programs that declare their versions keep them up to date."""
    with engine.begin() as connection:
        for each in sorted(made, key=attrgetter("name")):
            lock_checkpoints(connection, each.name, each.number)
            own = (projection.c.name == each.name) & (projection.c.generation == each.number)
            connection.execute(update(projection).where(own, projection.c.state == "building").values(state="ready"))
            stored = (checkpoint.c.projection == each.name) & (checkpoint.c.generation == each.number)
            connection.execute(update(checkpoint).where(stored).values(epoch=FENCE))


def fence_all(connection: Connection, name: str, number: int) -> None:
    """Have all owners of a generation start again from the database. What a person has paused stays paused."""
    own = (checkpoint.c.projection == name) & (checkpoint.c.generation == number)
    connection.execute(update(checkpoint).where(own, checkpoint.c.epoch != PAUSED).values(epoch=FENCE))


def newest_retired(connection: Connection, name: str) -> set[int]:
    """Return the newest retired generation of each version of a projection, but of the one that readers see."""
    query = (
        select(projection.c.version, func.max(projection.c.generation))
        .where(projection.c.name == name, projection.c.state == "retired")
        .where(projection.c.version != live_version(connection, name))
        .group_by(projection.c.version)
    )
    return {number for _, number in connection.execute(query)}


def beside_of(connection: Connection, made: Generation) -> list[int]:
    """Return the other generations of the same version that programs may keep up to date, oldest first."""
    query = select(projection.c.generation).where(
        projection.c.name == made.name,
        projection.c.version == made.projection.version,
        projection.c.state.in_(("ready", "retired")),
        projection.c.generation != made.number,
    )
    return sorted(connection.scalars(query))


def expired(connection: Connection, name: str, retention: float, kept: Collection[tuple[str, int]]) -> list[int]:
    """Return the numbers of a projection's generations that readers left more than `retention` seconds ago.

    Args:
        kept: names and versions whose generations stay, however old they are.
    """
    before = (datetime.now(UTC) - timedelta(seconds=retention)).isoformat(timespec="seconds")
    query = select(projection.c.generation, projection.c.version).where(
        projection.c.name == name, projection.c.state == "retired", projection.c.retired < before
    )
    return [row.generation for row in connection.execute(query) if (name, row.version) not in kept]


def retire_ready(connection: Connection, made: Generation) -> None:
    """Retire what was made ready of the version that readers see now: they will not see it any more."""
    version = select(projection.c.version).where(projection.c.name == made.name, projection.c.generation == made.number)
    own = (projection.c.name == made.name) & (projection.c.state == "ready")
    connection.execute(
        update(projection)
        .where(own, projection.c.version == version.scalar_subquery())
        .values(state="retired", retired=now(), code=None)
    )


def unfinished(connection: Connection, declared: DeclaredProjection) -> list[int]:
    """Return the unfinished generations of the declared version and of older ones, and lock them.

    A later version may be what another program prepares.
    """
    query = select(projection.c.generation).where(
        projection.c.name == declared.name,
        projection.c.state == "building",
        projection.c.version <= declared.version,
    )
    return list(connection.scalars(query.order_by(projection.c.generation).with_for_update()))
