"""Generations: copies of a projection's tables. Each build fills a new generation beside the old one. A view with the
model's name shows the live generation, and a cut-over moves the view. No table is ever altered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import BigInteger, Column, Connection, MetaData, Table, delete, func, insert, inspect, select, update
from sqlalchemy.sql.elements import quoted_name

from projections.declaration import DeclaredProjection
from projections.errors import SchemaError
from projections.records import SEQUENCE
from projections.tables import checkpoint, dead_letter, projection, sequence

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
        tables: physical tables by the model's table name.
    """

    projection: DeclaredProjection
    number: int
    tables: dict[str, Table]

    @property
    def name(self) -> str:
        """The projection's name."""
        return self.projection.name


def generation(declared: DeclaredProjection, number: int) -> Generation:
    """Return the description of a generation, whether its tables exist or not."""
    metadata = MetaData()
    tables = {}
    for model in declared.models:
        pattern: Table = model.__table__  # type: ignore[attr-defined]
        copied = pattern.to_metadata(metadata, name=f"{pattern.name}__{number}")
        for index in copied.indexes:
            index.name = quoted_name(f"{index.name}__{number}", quote=None)
        for constraint in copied.constraints:
            if isinstance(constraint.name, str):
                constraint.name = f"{constraint.name}__{number}"
        for column in copied.columns:
            column.autoincrement = pattern.columns[column.name].autoincrement
        if declared.kind == "rows":
            copied.append_column(Column(SEQUENCE, BigInteger, nullable=False, server_default="0"))
        tables[pattern.name] = copied
    return Generation(declared, number, tables)


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


def create(connection: Connection, declared: DeclaredProjection, partitions: Sequence[int]) -> Generation:
    """Create the tables of a new generation. It is empty, and its checkpoints are at the beginning of the log.

    Raises:
        SchemaError: a table of that name exists already.
    """
    last = connection.scalar(select(func.max(projection.c.generation)).where(projection.c.name == declared.name)) or 0
    made = generation(declared, last + 1)
    for table in made.tables.values():
        if inspect(connection).has_table(table.name):
            raise SchemaError(f"table {table.name} exists already, and the kernel did not create it; rename or drop it")
        table.create(connection)
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


def positions(connection: Connection, made: Generation) -> dict[int, int]:
    """Return how far the generation has folded: stream sequence by partition."""
    rows = connection.execute(
        select(checkpoint.c.partition, checkpoint.c.sequence).where(
            checkpoint.c.projection == made.name, checkpoint.c.generation == made.number
        )
    )
    return {row.partition: row.sequence for row in rows}


def retire_live(connection: Connection, name: str) -> dict[int, int]:
    """Fence the live generation, if there is one, and return how far it has folded: stream sequence by partition."""
    where = (checkpoint.c.projection == name) & checkpoint.c.generation.in_(
        select(projection.c.generation).where(projection.c.name == name, projection.c.state == "live")
    )
    connection.execute(update(checkpoint).where(where).values(epoch=RETIRED_EPOCH))
    rows = connection.execute(select(checkpoint.c.partition, checkpoint.c.sequence).where(where))
    folded = {row.partition: row.sequence for row in rows}
    connection.execute(
        update(projection).where(projection.c.name == name, projection.c.state == "live").values(state="retired")
    )
    return folded


def show(connection: Connection, made: Generation) -> None:
    """Make the generation live: point the views at it. It is part of the cut-over's transaction.

    Raises:
        SchemaError: a table has the name of a view.
    """
    quote = connection.dialect.identifier_preparer.quote
    for name, table in made.tables.items():
        if inspect(connection).has_table(name) and name not in inspect(connection).get_view_names():
            raise SchemaError(
                f"a table named {name} exists, and the kernel did not create it, but the projection's view needs this "
                "name; rename or drop the table"
            )
        columns = ", ".join(quote(column.name) for column in table.columns if column.name != SEQUENCE)
        connection.exec_driver_sql(f"DROP VIEW IF EXISTS {quote(name)}")
        connection.exec_driver_sql(f"CREATE VIEW {quote(name)} AS SELECT {columns} FROM {quote(table.name)}")
    connection.execute(
        update(projection)
        .where(projection.c.name == made.name, projection.c.generation == made.number)
        .values(state="live")
    )


def drop(connection: Connection, declared: DeclaredProjection, number: int) -> None:
    """Drop a generation that no view shows, with its checkpoints and its dead letters."""
    for table in generation(declared, number).tables.values():
        table.drop(connection, checkfirst=True)
    for kernel_table, column in (
        (checkpoint, checkpoint.c.projection),
        (dead_letter, dead_letter.c.projection),
        (sequence, sequence.c.projection),
        (projection, projection.c.name),
    ):
        kernel_columns: Any = kernel_table.c
        connection.execute(delete(kernel_table).where(column == declared.name, kernel_columns.generation == number))


def numbers(connection: Connection, name: str, state: str) -> list[int]:
    """Return the numbers of a projection's generations in a state, oldest first."""
    found = connection.scalars(
        select(projection.c.generation)
        .where(projection.c.name == name, projection.c.state == state)
        .order_by(projection.c.generation)
    )
    return list(found)
