"""Generations: copies of a projection's tables. Each build fills a new generation beside the old one. A view with the
model's name shows the live generation, and a cut-over moves the view. No table is ever altered."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
PAUSED = -3
"""Epoch of a checkpoint of a projection that a person has paused. No owner claims it."""


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


def create(
    connection: Connection, declared: DeclaredProjection, partitions: Sequence[int], code: str | None = None
) -> Generation:
    """Create the tables of a new generation. It is empty, and its checkpoints are at the beginning of the log.

    Args:
        code: fingerprint of the program that builds it: only the same program may go on with a build.

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
            created=now(),
            code=code,
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


def now() -> str:
    """Return the present time as it is stored."""
    return datetime.now(UTC).isoformat(timespec="seconds")


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


def fence(connection: Connection, made: Generation, partitions: Sequence[int]) -> None:
    """Have the owners of the partitions start again from the database."""
    connection.execute(
        update(checkpoint)
        .where(
            checkpoint.c.projection == made.name,
            checkpoint.c.generation == made.number,
            checkpoint.c.partition.in_(partitions),
            checkpoint.c.epoch != PAUSED,
        )
        .values(epoch=FENCE)
    )


def retire_live(connection: Connection, name: str) -> dict[int, int]:
    """Fence the live generation, if there is one, and return how far it has folded: stream sequence by partition.

    Programs that declare its version claim it again, and keep it up to date beside the one that readers see then.
    """
    where = (checkpoint.c.projection == name) & checkpoint.c.generation.in_(
        select(projection.c.generation).where(projection.c.name == name, projection.c.state == "live")
    )
    for number in numbers(connection, name, "live"):
        lock_checkpoints(connection, name, number)
    connection.execute(update(checkpoint).where(where).values(epoch=FENCE))
    rows = connection.execute(select(checkpoint.c.partition, checkpoint.c.sequence).where(where))
    folded = {row.partition: row.sequence for row in rows}
    connection.execute(
        update(projection)
        .where(projection.c.name == name, projection.c.state == "live")
        .values(state="retired", retired=now())
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
    for view in _abandoned(connection, made.name, made.views):
        views.check_droppable(connection, view, f"projection {made.name} no longer has this table")


def shown(table: Table) -> list[str]:
    """Return the columns that a view of the table shows."""
    return [column.name for column in table.columns if column.name != SEQUENCE]


def views_of(connection: Connection, made: Generation) -> list[View]:
    """Return the views that `show` replaces or drops."""
    return all_views(connection, made.name, made.views)


def all_views(connection: Connection, name: str, shown: Collection[View]) -> list[View]:
    """Return the views that are replaced or dropped when a generation with these views is shown."""
    return [*shown, *_abandoned(connection, name, shown)]


def _abandoned(connection: Connection, name: str, shown: Collection[View]) -> list[View]:
    """Return the views of other generations whose tables a projection does not have in the one that is shown."""
    # a frozen table has a view of its own, which no cut-over touches
    frozen = {*numbers(connection, name, "frozen"), *numbers(connection, name, "freezing")}
    gone = {before.view for before in recorded(connection, name) if before.generation not in frozen} - set(shown)
    of_others = select(generation_table.c.schema, generation_table.c.view).where(generation_table.c.projection != name)
    kept = {View(schema or None, name) for schema, name in connection.execute(of_others)}
    return sorted(gone - kept, key=str)


def show(connection: Connection, made: Generation) -> None:
    """Make the generation live: point the views at it. It is part of the cut-over's transaction.

    Grants, comments, and views that others have built on these views stay.

    Raises:
        SchemaError: a table has the name of a view, or a view can't be replaced or dropped because others depend on it.
    """
    show_tables(connection, made.name, made.number, made.views)


def show_tables(connection: Connection, name: str, number: int, tables: Mapping[View, Table]) -> None:
    """Point the views at the tables of a generation, as `show` does, whether the program knows its models or not."""
    for view, table in tables.items():
        views.replace(connection, view, table, shown(table))
    own = {before.physical for before in recorded(connection, name)}
    for view in _abandoned(connection, name, tables):
        views.check_droppable(connection, view, f"projection {name} no longer has this table")
        views.drop(connection, view, own.__contains__)
    connection.execute(
        update(projection)
        .where(projection.c.name == name, projection.c.generation == number)
        .values(state="live", retired=None, code=None)
    )


def stored_tables(connection: Connection, name: str, number: int) -> dict[View, Table]:
    """Return the tables of a generation by the view that shows them, with the columns that they have."""
    there = inspect(connection)
    return {
        found.view: Table(
            found.physical,
            MetaData(),
            *(Column(column["name"], column["type"]) for column in there.get_columns(found.physical)),
        )
        for found in recorded(connection, name, number)
    }


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
