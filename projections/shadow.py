"""A second copy of projections' tables, in temporary tables of one connection: it is hidden, and nothing stays.

On this connection, temporary tables stand before the kernel's own tables of the same names: checkpoints, dead letters
and sequences. So the code that writes any generation writes this one too, and touches nothing that exists.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Date,
    DateTime,
    DefaultClause,
    Engine,
    ForeignKeyConstraint,
    MetaData,
    Table,
    Time,
    insert,
    inspect,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ENUM
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import AddConstraint, CreateIndex, CreateTable, sort_tables_and_constraints
from sqlalchemy.sql.elements import False_, Null, True_
from sqlalchemy.types import NullType, TypeEngine

from projections import exclusions, views
from projections.comparison import TableComparison, compare, count_rows
from projections.database import reads
from projections.declaration import DeclaredProjection
from projections.errors import SchemaError
from projections.fold import Plan
from projections.generations import Generation, generation, numbers, positions, recorded
from projections.heads import mark_keepers
from projections.naming import quoted
from projections.postgresql import keeps_session
from projections.records import SEQUENCE
from projections.tables import checkpoint, dead_letter, projection, sequence

_POOLER = (
    "a pooler gives each transaction another session, and this needs temporary tables: name the database itself with "
    "--database"
)
_MAY_CREATE = """
SELECT current_database(), current_user, has_database_privilege(current_database(), 'TEMPORARY')"""
_TEMPORARY_FIRST = """
SELECT set_config('search_path', concat_ws(', ', 'pg_temp', nullif(current_setting('search_path'), '')), false)"""
"""They stand first by themselves, unless a path was set that names them last."""
_CONSTANT = re.compile(
    r"\s*(?:[-+]?\d[\d.]*(?:e[-+]?\d+)?|'(?:[^']|'')*'|true|false|null)\s*(?:::[\w \[\]]+)?", re.IGNORECASE
)
"""A default as SQL that is one number or one text."""
NUMBER = 0
"""Number of the generation that is folded: no generation of the database has it."""


@dataclass(frozen=True, slots=True)
class _Copied:
    """One table of a live generation, as it was at the beginning, beside the one that is folded."""

    index: int
    view: str
    stored: Table
    folded: Table
    keys: list[str]
    names: list[str]
    added: list[str]
    removed: list[str]


class Shadow:
    """The live tables of projections as they were at one moment, and empty ones for what the log leads to.

    Args:
        connection: its temporary tables hold both. It belongs to no pool. Close it when done.

    Attributes:
        until: how far the live generations had folded each partition at that moment.
        made: the empty generations, in the plan's order.
        live: version and number of each live generation; 0 where there is none.
    """

    def __init__(self, connection: Connection, made: list[Generation], until: dict[int, int]) -> None:
        self.connection, self.made, self.until = connection, made, until
        self.live: list[tuple[int, int]] = []
        self._tables: list[_Copied] = []
        self._gone: list[tuple[int, str, int]] = []

    def compare(self, index: int, *, sequences: bool) -> list[TableComparison]:
        """Compare the tables of one projection.

        Args:
            sequences: compare the sequence of each row's last event too.
        """
        found = []
        for copied in self._tables:
            if copied.index == index:
                names = [name for name in copied.names if sequences or name != SEQUENCE]
                compared = compare(self.connection, copied.view, copied.stored, copied.folded, copied.keys, names)
                compared.added.extend(copied.added)
                compared.removed.extend(copied.removed)
                found.append(compared)
        known = {copied.folded.name for copied in self._tables}
        for view, table in self.made[index].views.items():
            if table.name not in known:
                rows = count_rows(self.connection, table)
                found.append(TableComparison(str(view), 0, 0, rows if self.live[index][1] else 0, 0, folded=rows))
        found.extend(TableComparison(view, rows, 0, 0, rows) for of, view, rows in self._gone if of == index)
        self.connection.rollback()
        return found

    def close(self) -> None:
        """Drop everything, with the connection."""
        self.connection.close()


def open_shadow(
    engine: Engine,
    plan: Plan,
    projections: Sequence[DeclaredProjection],
    *,
    same: bool,
    end: Mapping[int, int],
    unshown: Mapping[str, int] | None = None,
) -> Shadow | None:
    """Copy the live tables at one moment, and make empty ones beside the copies.

    None: the live projections are at different places of the log, as after a pause, or a moment after a rebuild. Each
    has to be compared by itself.

    Args:
        plan: is given the aggregates that were parked then, if `same`, and the events that a person has skipped.
        projections: all of the app's.
        same: the live generations must be of the program's own versions. Otherwise there may be none.
        end: of the log, by partition: up to there projections without a live generation are folded.
        unshown: numbers of generations to copy instead of the live ones, by projection.

    Raises:
        SchemaError: a projection has no live generation, or one of another version.
    """
    connection = reads(engine).connect()
    # whatever becomes of this work: no other user of the pool may get a connection whose tables hide the kernel's own
    connection.detach()
    try:
        if connection.dialect.name == "postgresql":
            with connection.begin():
                if not keeps_session(connection):
                    # before there is a table: the session that it would stay in is another client's afterwards
                    raise SchemaError(_POOLER)
                name, user, may = connection.exec_driver_sql(_MAY_CREATE).one()
                if not may:
                    raise SchemaError(
                        f"{user} may not create temporary tables in {name}, in which the log is folded: "
                        f"GRANT TEMPORARY ON DATABASE {quoted(name)} TO {quoted(user)}"
                    )
        else:
            # otherwise its temporary tables have a fraction of the memory that the others have
            connection.exec_driver_sql("PRAGMA temp.cache_size=-65536")
            connection.rollback()
        with connection.begin():
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                connection.exec_driver_sql(_TEMPORARY_FIRST)
            shadow = _copy(connection, plan, projections, same, end, unshown or {})
        if shadow is None:
            connection.close()
            return None
        _check_session(connection)
        _protect(connection)
        return shadow
    except BaseException:
        connection.close()
        raise


def _copy(
    connection: Connection,
    plan: Plan,
    projections: Sequence[DeclaredProjection],
    same: bool,
    end: Mapping[int, int],
    unshown: Mapping[str, int],
) -> Shadow | None:
    live = [
        (declared.version, unshown[declared.name]) if declared.name in unshown else _live(connection, declared, same)
        for declared in plan.projections
    ]
    reached = [
        positions(connection, Generation(declared, number, {}))
        for declared, (_, number) in zip(plan.projections, live, strict=True)
        if number
    ] or [dict(end)]
    if any(place != reached[0] for place in reached):
        return None
    exclusions.load_skipped(connection, plan)
    if same:
        stored = [
            Generation(declared, number, {}) for declared, (_, number) in zip(plan.projections, live, strict=True)
        ]
        exclusions.load_parked(connection, plan, stored)
    made = [_without_others(generation(declared, NUMBER)) for declared in plan.projections]
    shadow = Shadow(connection, made, reached[0])
    shadow.live = live
    copies: list[tuple[int, str, Table, Table, set[str]]] = []
    place = 0
    for index, (declared, (_, number)) in enumerate(zip(plan.projections, live, strict=True)):
        for before in recorded(connection, declared.name, number):
            folded = made[index].views.get(before.view)
            if folded is None:
                physical = Table(before.physical, MetaData())
                shadow._gone.append((index, str(before.view), count_rows(connection, physical)))
                continue
            there = inspect(connection)
            keys = set(there.get_pk_constraint(before.physical)["constrained_columns"])
            types = {found["name"]: found["type"] for found in there.get_columns(before.physical)}
            stored_table = Table(f"eskernel_stored_{place}", MetaData(), *starmap(Column, types.items()))
            views.execute(
                connection, f"CREATE TEMPORARY TABLE {stored_table.name} AS SELECT * FROM {quoted(before.physical)}"
            )
            copies.append((index, str(before.view), stored_table, folded, keys))
            place += 1
    # from here on the kernel's own tables are the temporary ones
    for table in (projection, checkpoint, sequence, dead_letter):
        _create_temporary(connection, table)
    for own in made:
        _create_tables(connection, own)
        rows = [
            {"projection": own.name, "generation": NUMBER, "partition": partition, "sequence": 0, "epoch": 0}
            for partition in reached[0]
        ]
        connection.execute(insert(checkpoint), rows)
    for index, view, stored_table, folded, keys in copies:
        copied = _copied(connection, plan.projections[index], index, view, stored_table, folded, keys)
        shadow._tables.append(copied)
    mark_keepers(connection, projections, made, new=True)
    return shadow


def _live(connection: Connection, declared: DeclaredProjection, same: bool) -> tuple[int, int]:
    found = numbers(connection, declared.name, "live")
    if not found and not same:
        return 0, 0
    if not found:
        raise SchemaError(f"{declared.name} has not been built; start the service, or rebuild the projection")
    version = connection.scalar(
        select(projection.c.version).where(projection.c.name == declared.name, projection.c.generation == found[0])
    )
    if same and version != declared.version:
        raise SchemaError(
            f"readers see version {version} of {declared.name}, and this program declares version {declared.version}; "
            "compare them with `eskernel rehearse`"
        )
    return int(version or 0), found[0]


def _without_others(made: Generation) -> Generation:
    """Take away foreign keys to tables of others: a temporary table can't refer to them."""
    own = {table.name for table in made.tables.values()}
    for table in made.tables.values():
        for constraint in list(table.foreign_key_constraints):
            if constraint.elements[0].column.table.name not in own:
                _drop_foreign_key(table, constraint)
    return made


def _drop_foreign_key(table: Table, constraint: ForeignKeyConstraint) -> None:
    table.constraints.discard(constraint)
    for element in constraint.elements:
        element.parent.foreign_keys.discard(element)
        table.foreign_keys.discard(element)


def _typed(connection: Connection, stored: Table, folded: Table) -> Table:
    """Return the stored table with the types that the program declares, where it has the same ones in the database."""
    known = {column.name: column.type for column in folded.columns}
    there = {found["name"]: _spelt(found["type"], connection) for found in inspect(connection).get_columns(folded.name)}
    columns = []
    for column in stored.columns:
        same = column.name in known and there[column.name] == _spelt(column.type, connection)
        columns.append(Column(column.name, known[column.name] if same else column.type))
    return Table(stored.name, MetaData(), *columns)


def _spelt(type_: TypeEngine[Any], connection: Connection) -> str:
    return "" if isinstance(type_, NullType) else type_.compile(dialect=connection.dialect)


def _copied(
    connection: Connection,
    declared: DeclaredProjection,
    index: int,
    view: str,
    stored: Table,
    folded: Table,
    primary: set[str],
) -> _Copied:
    there = set(stored.columns.keys())
    made = {str(column.name) for column in folded.columns if declared.kind == "sql" and _is_made_by_database(column)}
    keys = [str(column.name) for column in folded.primary_key.columns]
    if made.intersection(keys) or primary != set(keys):
        keys = []
    own = [str(column.name) for column in folded.columns if column.name not in made]
    return _Copied(
        index,
        view,
        _typed(connection, stored, folded),
        Table(folded.name, MetaData(), *(Column(str(column.name), column.type) for column in folded.columns)),
        keys,
        [name for name in own if name in there and name not in keys],
        [str(column.name) for column in folded.columns if column.name not in there and column.name != SEQUENCE],
        sorted(there - {column.name for column in folded.columns} - {SEQUENCE}),
    )


def _is_made_by_database(column: Column[Any]) -> bool:
    """Return whether another pass over the log may give another value."""
    return (
        column is column.table.autoincrement_column
        or (column.server_default is not None and not _is_constant(column))
        or any(_is_made_by_database(key.column) for key in column.foreign_keys)
    )


def _is_constant(column: Column[Any]) -> bool:
    """Return whether the database gives the column the same value at all times, if a handler gives it none."""
    default = column.server_default
    if not isinstance(default, DefaultClause) or isinstance(column.type, Date | DateTime | Time):
        return False  # a moment's default may be the text 'now'
    if isinstance(default.arg, str):
        return True
    return isinstance(default.arg, True_ | False_ | Null) or bool(_CONSTANT.fullmatch(str(default.arg)))


def _create_tables(connection: Connection, made: Generation) -> None:
    """Create the tables of a generation, those first to which others refer."""
    own = list(made.tables.values())
    late: list[ForeignKeyConstraint] = []
    for table, constraints in sort_tables_and_constraints(own):  # type: ignore[no-untyped-call]
        if table is not None:
            _create_temporary(connection, table, list(constraints))
        elif connection.dialect.name == "postgresql":
            late = list(constraints)
    for constraint in late:
        connection.execute(AddConstraint(constraint))


def _create_types(connection: Connection, table: Table) -> None:
    """Create the enumerations of a table: those of the database may have other names for the same type."""
    for column in table.columns:
        impl: Any = column.type.dialect_impl(connection.dialect)
        impl = getattr(impl, "item_type", impl).dialect_impl(connection.dialect)
        if isinstance(impl, ENUM) and impl.schema is None:
            there = text("SELECT to_regtype(:name)")
            if connection.scalar(there, {"name": f"pg_temp.{quoted(impl.name)}"}) is None:
                ENUM(*impl.enums, name=impl.name, schema="pg_temp").create(connection, checkfirst=False)


def _create_temporary(
    connection: Connection, table: Table, foreign_keys: Sequence[ForeignKeyConstraint] | None = None
) -> None:
    inline = foreign_keys if connection.dialect.name == "postgresql" else None
    if connection.dialect.name == "postgresql":
        _create_types(connection, table)
    connection.execute(CreateTemporaryTable(table, include_foreign_key_constraints=inline))
    for index in table.indexes:
        connection.execute(CreateIndex(index))


class CreateTemporaryTable(CreateTable):
    """`CREATE TEMPORARY TABLE`."""


@compiles(CreateTemporaryTable)
def _compile_temporary(element: CreateTemporaryTable, compiler: Any, **options: Any) -> str:
    created: str = compiler.visit_create_table(element, **options)
    return created.replace("CREATE TABLE", "CREATE TEMPORARY TABLE", 1)


def _protect(connection: Connection) -> None:
    """Have the database refuse whatever is not done to temporary tables: handlers may write to others too."""
    if connection.dialect.name == "postgresql":
        with connection.begin():
            connection.exec_driver_sql("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
        return
    driver: Any = connection.connection.dbapi_connection
    writes = {sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE}

    def authorize(action: int, table: str | None, _two: str | None, name: str | None, _trigger: str | None) -> int:
        # a table-valued function such as json_each is declared as if it were a new table
        declared = action != sqlite3.SQLITE_DELETE and table == "sqlite_master"
        refused = action in writes and name != "temp" and not declared
        return sqlite3.SQLITE_DENY if refused else sqlite3.SQLITE_OK

    driver.set_authorizer(authorize)


def is_protected(error: DBAPIError) -> bool:
    """Return whether a statement was refused since it would have changed something that is not temporary."""
    denied = getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_AUTH
    return denied or getattr(error.orig, "sqlstate", None) == "25006"


def _check_session(connection: Connection) -> None:
    """Make sure that the next transaction is in the same session."""
    if connection.dialect.name == "postgresql":
        with connection.begin():
            there = connection.exec_driver_sql("SELECT to_regclass('pg_temp.eskernel_checkpoint')").scalar()
        if there is None:
            raise SchemaError(_POOLER)
