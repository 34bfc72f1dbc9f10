"""Generations: copies of a projection's tables. Each build fills a new generation beside the old one. A view with the
model's name shows the live generation, and a cut-over moves the view. No table is ever altered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    ForeignKeyConstraint,
    MetaData,
    Table,
    delete,
    func,
    insert,
    inspect,
    select,
    update,
)  # fmt: skip
from sqlalchemy.exc import CompileError, DBAPIError, IdentifierError
from sqlalchemy.sql.elements import quoted_name

from projections import views
from projections.database import is_infrastructure
from projections.declaration import DeclaredProjection
from projections.errors import SchemaError
from projections.naming import physical_name, quoted, table_of
from projections.records import SEQUENCE
from projections.tables import checkpoint, dead_letter, generation_table, projection, sequence
from projections.views import View

FENCE = -2
"""Epoch of a checkpoint after a change that its owner did not make: the owner is fenced, and reads its state again."""
LAYOUT = 2
"""Layout of a generation's tables. Generations with an older layout are rebuilt at start. 2: rows have a sequence."""
RETIRED_EPOCH = -1
"""Epoch of a checkpoint after a cut-over. No owner ever has it, so a worker that still writes the old generation is
fenced."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One copy of a projection's tables.

    Attributes:
        number: number of the copy, from 1, never reused.
        tables: physical tables by the model's table name, with the schema if the model has one.
    """

    projection: DeclaredProjection
    number: int
    tables: dict[str, Table]

    @property
    def name(self) -> str:
        """The projection's name."""
        return self.projection.name

    @property
    def views(self) -> dict[View, Table]:
        """The physical tables by the view that shows them."""
        patterns = map(table_of, self.projection.models)
        return {View(pattern.schema, pattern.name): self.tables[pattern.key] for pattern in patterns}


@dataclass(frozen=True, slots=True)
class Recorded:
    """A table of a generation, as the database has it recorded."""

    generation: int
    view: View
    physical: str


def generation(declared: DeclaredProjection, number: int) -> Generation:
    """Return the description of a generation, whether its tables exist or not."""
    metadata = MetaData()
    tables = {}
    for model in declared.models:
        pattern = table_of(model)
        # always in the connection's own schema: only the view is in the model's
        copied = pattern.to_metadata(metadata, name=physical_name(pattern.key, number), schema=None)  # type: ignore[arg-type]
        for index in copied.indexes:
            index.name = quoted_name(physical_name(str(index.name), number), quote=None)
        for constraint in copied.constraints:
            if isinstance(constraint.name, str):
                constraint.name = physical_name(constraint.name, number)
        for column in copied.columns:
            column.autoincrement = pattern.columns[column.key].autoincrement
        if declared.kind == "rows":
            copied.append_column(Column(SEQUENCE, BigInteger, nullable=False, server_default="0"))
        tables[pattern.key] = copied
    _point_foreign_keys(declared, tables, number)
    return Generation(declared, number, tables)


def _point_foreign_keys(declared: DeclaredProjection, tables: dict[str, Table], number: int) -> None:
    """Make the foreign keys between the projection's tables refer to those of the same generation."""
    for model in declared.models:
        pattern = table_of(model)
        copied = tables[pattern.key]
        for constraint in list(copied.foreign_key_constraints):
            copied.constraints.discard(constraint)
            for element in constraint.elements:
                element.parent.foreign_keys.discard(element)
                copied.foreign_keys.discard(element)
        for constraint in pattern.foreign_key_constraints:
            referred = constraint.referred_table
            target = tables.get(referred.key)
            if target is None:  # a table of the user's own; only its name and its columns' names are needed
                target = copied.metadata.tables.get(referred.key)
            if target is None:
                columns = [Column(column.name, column.type, key=column.key) for column in referred.columns]
                target = Table(referred.name, copied.metadata, *columns, schema=referred.schema)
            named = isinstance(constraint.name, str)
            copied.append_constraint(
                ForeignKeyConstraint(
                    [copied.columns[key] for key in constraint.column_keys],
                    [target.columns[element.column.key] for element in constraint.elements],
                    name=physical_name(str(constraint.name), number) if named else None,
                    onupdate=constraint.onupdate,
                    ondelete=constraint.ondelete,
                    deferrable=constraint.deferrable,
                    initially=constraint.initially,
                    use_alter=constraint.use_alter,
                    match=constraint.match,
                )
            )


def live_generation(connection: Connection, declared: DeclaredProjection) -> Generation | None:
    """Return the generation that the view shows, or None if it has another version or layout than this program."""
    row = connection.execute(
        select(projection.c.generation, projection.c.version, projection.c.layout).where(
            projection.c.name == declared.name, projection.c.state == "live"
        )
    ).first()
    if row is None or (row.version, row.layout) != (declared.version, LAYOUT):
        return None
    return generation(declared, row.generation)


def is_built(connection: Connection, declared: DeclaredProjection) -> bool:
    """Return whether the projection has a live generation of its version, and all of its tables exist."""
    live = live_generation(connection, declared)
    return live is not None and all(inspect(connection).has_table(table.name) for table in live.tables.values())


def create(connection: Connection, declared: DeclaredProjection, partitions: Sequence[int]) -> Generation:
    """Create the tables of a new generation. It is empty, and its checkpoints are at the beginning of the log.

    Raises:
        SchemaError: a table of that name exists already.
    """
    made = generation(declared, _next_number(connection, declared))
    for table in made.tables.values():
        if inspect(connection).has_table(table.name):
            raise SchemaError(f"table {table.name} exists already, and the kernel did not create it; rename or drop it")
    create_tables(connection, made)
    connection.execute(
        insert(generation_table),
        [
            {"projection": made.name, "generation": made.number, "schema": view.schema or "", "view": view.name,
             "physical": table.name}
            for view, table in made.views.items()
        ],
    )  # fmt: skip
    connection.execute(
        insert(projection).values(
            name=declared.name,
            generation=made.number,
            version=declared.version,
            layout=LAYOUT,
            state="building",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
    )
    connection.execute(
        insert(checkpoint),
        [
            {"projection": declared.name, "generation": made.number, "partition": p, "sequence": 0, "epoch": 0}
            for p in partitions
        ],
    )
    return made


def _next_number(connection: Connection, declared: DeclaredProjection) -> int:
    """Return a number that the projection, and another one that has filled a table of this name, never had."""
    own = select(func.max(projection.c.generation)).where(projection.c.name == declared.name)
    last: int = connection.scalar(own) or 0
    for view in generation(declared, 0).views:
        same = select(func.max(generation_table.c.generation)).where(
            generation_table.c.schema == (view.schema or ""), generation_table.c.view == view.name
        )
        last = max(last, connection.scalar(same) or 0)
    return last + 1


def create_tables(connection: Connection, made: Generation) -> None:
    """Create the tables of a generation.

    Raises:
        SchemaError: the database refuses a table.
    """
    own = list(made.tables.values())
    try:
        own[0].metadata.create_all(connection, tables=own)
    except (DBAPIError, CompileError, IdentifierError) as error:
        if isinstance(error, DBAPIError) and is_infrastructure(error):
            raise
        why = str(error.orig) if isinstance(error, DBAPIError) else str(error)
        raise SchemaError(
            f"the database refuses the tables of projection {made.name}: {' '.join(why.split())}; correct the model"
        ) from error


def positions(connection: Connection, made: Generation) -> dict[int, int]:
    """Return how far the generation has folded: stream sequence by partition."""
    rows = connection.execute(
        select(checkpoint.c.partition, checkpoint.c.sequence).where(
            checkpoint.c.projection == made.name, checkpoint.c.generation == made.number
        )
    )
    return {row.partition: row.sequence for row in rows}


def lock_checkpoints(
    connection: Connection, name: str, number: int, partitions: Sequence[int] | None = None
) -> dict[int, int]:
    """Lock the checkpoints of a generation until the transaction ends, in an order that all writers share.

    Args:
        partitions: only those; None for all.

    Returns:
        the epoch of each partition.
    """
    query = select(checkpoint.c.partition, checkpoint.c.epoch).where(
        checkpoint.c.projection == name, checkpoint.c.generation == number
    )
    if partitions is not None:
        query = query.where(checkpoint.c.partition.in_(partitions))
    rows = connection.execute(query.order_by(checkpoint.c.partition).with_for_update())
    return {row.partition: row.epoch for row in rows}


def retire_live(connection: Connection, name: str) -> dict[int, int]:
    """Fence the live generation, if there is one, and return how far it has folded: stream sequence by partition."""
    where = (checkpoint.c.projection == name) & checkpoint.c.generation.in_(
        select(projection.c.generation).where(projection.c.name == name, projection.c.state == "live")
    )
    for number in numbers(connection, name, "live"):
        lock_checkpoints(connection, name, number)
    connection.execute(update(checkpoint).where(where).values(epoch=RETIRED_EPOCH))
    rows = connection.execute(select(checkpoint.c.partition, checkpoint.c.sequence).where(where))
    folded = {row.partition: row.sequence for row in rows}
    connection.execute(
        update(projection).where(projection.c.name == name, projection.c.state == "live").values(state="retired")
    )
    return folded


def recorded(connection: Connection, name: str, number: int | None = None) -> list[Recorded]:
    """Return the tables of a projection's generations, or of one of them, whether the program knows it or not."""
    query = select(generation_table).where(generation_table.c.projection == name)
    if number is not None:
        query = query.where(generation_table.c.generation == number)
    return [
        Recorded(row.generation, View(row.schema or None, row.view), row.physical)
        for row in connection.execute(query.order_by(generation_table.c.generation, generation_table.c.view))
    ]


def check_replaceable(connection: Connection, made: Generation) -> None:
    """Raise the `SchemaError` that `show` would raise for this generation, before it is built.

    Raises:
        SchemaError: a table has the name of a view, or a view can't be replaced or dropped because others depend on it.
    """
    for view, table in made.views.items():
        views.check_replaceable(connection, view, table, shown(table))
    for view in _abandoned(connection, made):
        views.check_droppable(connection, view, f"projection {made.name} no longer has this table")


def shown(table: Table) -> list[str]:
    """Return the columns that a view of the table shows."""
    return [column.name for column in table.columns if column.name != SEQUENCE]


def views_of(connection: Connection, made: Generation) -> list[View]:
    """Return the views that `show` replaces or drops."""
    return [*made.views, *_abandoned(connection, made)]


def _abandoned(connection: Connection, made: Generation) -> list[View]:
    """Return the views of earlier generations whose tables the projection no longer has."""
    gone = {before.view for before in recorded(connection, made.name)} - set(made.views)
    of_others = select(generation_table.c.schema, generation_table.c.view).where(
        generation_table.c.projection != made.name
    )
    kept = {View(schema or None, name) for schema, name in connection.execute(of_others)}
    return sorted(gone - kept, key=str)


def show(connection: Connection, made: Generation) -> None:
    """Make the generation live: point the views at it. It is part of the cut-over's transaction.

    Grants, comments, and views that others have built on these views stay.

    Raises:
        SchemaError: a table has the name of a view, or a view can't be replaced or dropped because others depend on it.
    """
    for view, table in made.views.items():
        views.replace(connection, view, table, shown(table))
    own = {before.physical for before in recorded(connection, made.name)}
    for view in _abandoned(connection, made):
        views.check_droppable(connection, view, f"projection {made.name} no longer has this table")
        views.drop(connection, view, own.__contains__)
    connection.execute(
        update(projection)
        .where(projection.c.name == made.name, projection.c.generation == made.number)
        .values(state="live")
    )


def drop(connection: Connection, declared: DeclaredProjection, number: int) -> None:
    """Drop a generation that no view shows, with its checkpoints and its dead letters."""
    adopt(connection, [declared])
    drop_generation(connection, declared.name, number)


def drop_generation(connection: Connection, name: str, number: int) -> None:
    """Drop a generation that no view shows, whether the program knows its projection or not.

    Raises:
        SchemaError: others have built on its tables.
    """
    tables = [table.physical for table in recorded(connection, name, number)]
    among = [View(None, table) for table in tables]
    for table in tables:
        if found := views.dependents(connection, View(None, table), among):
            raise SchemaError(f"table {table} can't be dropped; these depend on it: {', '.join(found)}")
    if connection.dialect.name == "postgresql":
        if tables:  # all at once, since they may refer to each other
            views.execute(connection, f"DROP TABLE IF EXISTS {', '.join(map(quoted, tables))}")
    else:
        for table in tables:
            views.execute(connection, f"DROP TABLE IF EXISTS {quoted(table)}")
    for kernel_table, column in (
        (checkpoint, checkpoint.c.projection),
        (dead_letter, dead_letter.c.projection),
        (sequence, sequence.c.projection),
        (generation_table, generation_table.c.projection),
        (projection, projection.c.name),
    ):
        kernel_columns: Any = kernel_table.c
        connection.execute(delete(kernel_table).where(column == name, kernel_columns.generation == number))


def adopt(connection: Connection, projections: Sequence[DeclaredProjection]) -> None:
    """Record the tables of generations that a program before this list of tables has made."""
    listed = select(generation_table.c.projection, generation_table.c.generation)
    known = {(row.projection, row.generation) for row in connection.execute(listed)}
    every = [
        (row.name, row.generation) for row in connection.execute(select(projection.c.name, projection.c.generation))
    ]
    unlisted = [key for key in every if key not in known]
    if not unlisted:
        return
    there = set(inspect(connection).get_table_names())
    by_name = {declared.name: declared for declared in projections}
    rows = []
    for name, number in unlisted:
        if name in by_name:
            own = generation(by_name[name], number).views
            rows += [(name, number, view, table.name) for view, table in own.items() if table.name in there]
    for name, number in _shown_by_no_other(connection, {key for key in unlisted if key[0] not in by_name}):
        for table_name in sorted(there - {row[3] for row in rows}):
            view = View(None, table_name.rpartition("__")[0])
            # a table without this column may be the user's own; it is left alone
            if (
                table_name == f"{view.name}__{number}"
                and SEQUENCE in {column["name"] for column in inspect(connection).get_columns(table_name)}
                and views.shows(connection, view) == table_name
            ):
                numbered = {own: f"{view.name}__{own}" for own in (key[1] for key in unlisted if key[0] == name)}
                rows += [(name, own, view, table) for own, table in numbered.items() if table in there]
    for name, number, view, physical in rows:
        connection.execute(
            insert(generation_table).values(
                projection=name, generation=number, schema=view.schema or "", view=view.name, physical=physical
            )
        )


def _shown_by_no_other(connection: Connection, unlisted: set[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return the live generations among these whose number no other one has: only their views tell whose they are."""
    live = select(projection.c.name, projection.c.generation).where(projection.c.state == "live")
    found = [(row.name, row.generation) for row in connection.execute(live) if (row.name, row.generation) in unlisted]
    return [key for key in found if [number for _, number in found].count(key[1]) == 1]


def numbers(connection: Connection, name: str, state: str, *, lock: bool = False) -> list[int]:
    """Return the numbers of a projection's generations in a state, oldest first.

    Args:
        lock: wait for a cut-over that is under way, and let none begin before the transaction ends.
    """
    query = (
        select(projection.c.generation)
        .where(projection.c.name == name, projection.c.state == state)
        .order_by(projection.c.generation)
    )
    return list(connection.scalars(query.with_for_update() if lock else query))
