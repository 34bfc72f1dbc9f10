"""Compares the database with the program: tables with their models, and projections with the app's declarations.

The declared tables are created beside the real ones, in a transaction that is rolled back. So the database itself says
what a model means, and it refuses what it can't store before anything is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine, Enum, select, text

from projections import views
from projections.adoption import adopt
from projections.declaration import DeclaredProjection
from projections.errors import SchemaError
from projections.following import followed, has_tables, live_version
from projections.generations import (
    Generation,
    check_replaceable,
    create_tables,
    drop_generation,
    generation,
    live_generation,
    recorded,
)  # fmt: skip
from projections.naming import database_problems, quoted
from projections.tables import projection
from projections.views import View

_FROZEN = ("freezing", "frozen")
_TRIAL = 0
"""Number of the generation that is created to be compared, and rolled back."""
_COLUMNS = """
SELECT a.attname AS name, format_type(a.atttypid, a.atttypmod)
    || CASE WHEN a.attcollation <> t.typcollation THEN ' COLLATE ' || l.collname ELSE '' END AS type,
    NOT a.attnotnull AS nullable,
    concat(a.attidentity, a.attgenerated, pg_get_expr(d.adbin, d.adrelid)) AS default
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
LEFT JOIN pg_collation l ON l.oid = a.attcollation
LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = to_regclass(:table) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum"""
_CONSTRAINTS = """
SELECT pg_get_constraintdef(oid) FROM pg_constraint
WHERE conrelid = to_regclass(:table) AND contype IN ('p', 'u', 'c', 'f', 'x')"""
_INDEXES = """
SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = to_regclass(:table)
AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid AND contype IN ('p', 'u', 'x'))"""


@dataclass(frozen=True, slots=True)
class Shape:
    """A table as the database describes it, without the names that depend on the generation.

    Attributes:
        columns: type, whether it may be null, and default, by name.
        constraints: keys, checks and unique indexes.
        indexes: other indexes.
    """

    columns: dict[str, tuple[str, bool, str]]
    constraints: frozenset[str]
    indexes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Orphan:
    """A projection of the database that the app does not declare.

    Attributes:
        generations: numbers of its generations.
        views: its views, which no longer change.
        tables: the physical tables of all its generations.
    """

    name: str
    version: int
    generations: list[int]
    views: list[View]
    tables: list[str]


@dataclass(frozen=True, slots=True)
class Examination:
    """What the comparison has found.

    Attributes:
        equal: projections whose tables are those of their models.
        to_build: projections that the next start builds, each with the reason.
        behind: projections of which readers see a newer version, by name: nothing is built for them.
        problems: what prevents a start: one sentence each, with what to do.
        orphans: projections that the app no longer declares.
        dependents: what others have built on a view, by the view's name.
    """

    equal: list[str] = field(default_factory=list)
    to_build: dict[str, str] = field(default_factory=dict)
    behind: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    orphans: list[Orphan] = field(default_factory=list)
    dependents: dict[str, list[str]] = field(default_factory=dict)


def examine(connection: Connection, projections: Sequence[DeclaredProjection]) -> Examination:
    """Compare a migrated database with the declared projections. The caller rolls the transaction back."""
    found = Examination(problems=database_problems(connection.dialect.name, projections))
    adopt(connection, projections)
    found.orphans.extend(orphans(connection, projections))
    owners = {view: orphan for orphan in found.orphans for view in orphan.views}
    if not found.problems:
        for declared in projections:
            _examine(connection, declared, owners, found)
    return found


def prepare(engine: Engine, projections: Sequence[DeclaredProjection]) -> Examination:
    """Make the database ready for a start: list older tables, protect the views, and compare it with the program.

    Raises:
        SchemaError: the database does not fit the program; all reasons.
    """
    with engine.begin() as connection:
        adopt(connection, projections)
        for declared in projections:
            if (live := live_generation(connection, declared)) is not None:
                for view in live.views:
                    views.protect(connection, view)
    with engine.connect() as connection:
        found = examine(connection, projections)
        connection.rollback()
    if found.problems:
        raise SchemaError("\n".join(found.problems))
    return found


def names(connection: Connection) -> list[str]:
    """Return the names of all projections of the database."""
    return sorted(set(connection.scalars(select(projection.c.name))))


def orphans(connection: Connection, projections: Sequence[DeclaredProjection]) -> list[Orphan]:
    """Return the projections of the database that are not among these."""
    declared = {known.name for known in projections}
    by_name: dict[str, list[Any]] = {}
    for row in connection.execute(select(projection).order_by(projection.c.name, projection.c.generation)):
        if row.name not in declared:
            by_name.setdefault(row.name, []).append(row)
    found = []
    for name, rows in by_name.items():
        tables = recorded(connection, name)
        own = {table.physical for table in tables}
        there = sorted({table.view for table in tables if views.shows(connection, table.view) in own}, key=str)
        version = next((row.version for row in rows if row.state == "live"), rows[-1].version)
        found.append(Orphan(name, version, [row.generation for row in rows], there, sorted(own)))
    return found


def drop_projection(engine: Engine, name: str, projections: Sequence[DeclaredProjection]) -> Orphan:
    """Drop a projection that the app does not declare: its views, its tables, its checkpoints and its dead letters.

    Raises:
        SchemaError: the app declares it, the database does not have it, or others have built on its views or tables.
    """
    if name in {known.name for known in projections}:
        raise SchemaError(f"the app declares the projection {name}; take it out of the app first, and deploy that")
    with engine.begin() as connection:
        adopt(connection, projections)
        found = {orphan.name: orphan for orphan in orphans(connection, projections)}
        if name not in found:
            known = ", ".join(found) or "none"
            raise SchemaError(f"the database has no projection {name!r} that the app does not declare; it has {known}")
        orphan = found[name]
        for view in orphan.views:
            views.check_droppable(connection, view, f"projection {name} is to be dropped")
            views.drop(connection, view, orphan.tables.__contains__)
        for number in orphan.generations:
            drop_generation(connection, name, number)
    return orphan


def drop_version(engine: Engine, name: str, version: int, projections: Sequence[DeclaredProjection]) -> list[str]:
    """Drop the generations of a version that readers do not see, and return the names of their tables.

    Raises:
        SchemaError: there are none, readers see it, or others have built on its tables.
    """
    with engine.begin() as connection:
        adopt(connection, projections)
        own = (projection.c.name == name) & (projection.c.version == version) & ~projection.c.state.in_(_FROZEN)
        rows = connection.execute(select(projection.c.generation, projection.c.state).where(own)).all()
        if any(row.state == "live" for row in rows):
            raise SchemaError(f"readers see version {version} of {name}: roll it back first, or drop the projection")
        if not rows:
            raise SchemaError(f"the database has no version {version} of {name}; `eskernel projections list` lists all")
        tables = [table.physical for row in rows for table in recorded(connection, name, row.generation)]
        for row in rows:
            drop_generation(connection, name, row.generation)
    return tables


def _examine(
    connection: Connection, declared: DeclaredProjection, owners: dict[View, Orphan], found: Examination
) -> None:
    """Examine one projection; what is created for it is rolled back."""
    for view in generation(declared, _TRIAL).views:
        if (orphan := owners.get(view)) is not None:
            found.problems.append(
                f"projection {declared.name} fills the table {view}, which in this database belongs to the projection "
                f"{orphan.name}, and the app no longer has that one: if you renamed it, keep the stored name with "
                f"name={orphan.name!r} in the class line of {declared.name}; otherwise drop the old one with `eskernel "
                f"projections drop {orphan.name}`"
            )
            return
    savepoint = connection.begin_nested()
    try:
        declared.codec(connection.dialect)
        for view in generation(declared, _TRIAL).views:
            views.check_schema(connection, view)
            if hung := views.dependents(connection, view):
                found.dependents[str(view)] = hung
        trial = generation(declared, _TRIAL)
        create_tables(connection, trial)
        made = followed(connection, declared)
        if made is not None and has_tables(connection, made):
            if different := differences(connection, made, trial):
                found.problems.append(
                    f"the model of projection {declared.name} was changed, but its version is still "
                    f"{declared.version}: {'; '.join(different)}. Raise it to version={declared.version + 1}, and the "
                    "next start builds the new tables from the log; or undo the change"
                )
            else:
                found.equal.append(declared.name)
        elif (version := live_version(connection, declared.name)) > declared.version:
            found.behind[declared.name] = version
        else:
            found.to_build[declared.name] = _reason(connection, declared)
            for table in trial.tables.values():
                found.problems.extend(
                    f"projection {declared.name}: {problem}" for problem in _enum_differences(connection, table)
                )
            check_replaceable(connection, trial)
    except SchemaError as error:
        found.problems.append(str(error))
    finally:
        savepoint.rollback()


def _reason(connection: Connection, declared: DeclaredProjection) -> str:
    version = connection.scalar(
        select(projection.c.version).where(projection.c.name == declared.name, projection.c.state == "live")
    )
    if version is None:
        return "it is new"
    if version != declared.version:
        return f"version {version} is live"
    return "its tables have an older layout, or are missing"


def differences(connection: Connection, live: Generation, trial: Generation) -> list[str]:
    """Return how the tables of a generation differ from the models' declarations."""
    found = []
    for key, table in live.tables.items():
        stored = _shape(connection, live, table.name)
        declared = _shape(connection, trial, trial.tables[key].name)
        where = f" of {key}" if len(live.tables) > 1 else ""
        for name in [*stored.columns, *(name for name in declared.columns if name not in stored.columns)]:
            what = f"the column {name}{where}"
            if name not in declared.columns:
                found.append(f"{what} is no longer declared")
            elif name not in stored.columns:
                found.append(f"{what} is not in the table")
            else:
                found += _column_differences(what, stored.columns[name], declared.columns[name])
        extra = sorted(stored.constraints - declared.constraints)
        found += [f"the table{where} has {constraint}, which is no longer declared" for constraint in extra]
        missing = sorted((declared.constraints - stored.constraints) | (declared.indexes - stored.indexes))
        found += [f"the table{where} lacks {constraint}" for constraint in missing]
        found += _enum_differences(connection, trial.tables[key])
    return found


def _column_differences(what: str, stored: tuple[str, bool, str], declared: tuple[str, bool, str]) -> list[str]:
    found = []
    if stored[0] != declared[0]:
        found.append(f"{what} has the type {stored[0]}, and is declared as {declared[0]}")
    if stored[1] != declared[1]:
        null = ("NOT NULL", "nullable")
        found.append(f"{what} is {null[stored[1]]}, and is declared as {null[declared[1]]}")
    if stored[2] != declared[2]:
        found.append(f"{what} has the default {stored[2] or 'none'}, and is declared with {declared[2] or 'none'}")
    return found


def _enum_differences(connection: Connection, table: Any) -> list[str]:
    """A type of PostgreSQL is shared by all generations, so that a new version alone does not change it."""
    found = []
    for column in table.columns:
        kind = column.type
        if connection.dialect.name == "postgresql" and isinstance(kind, Enum) and kind.native_enum and kind.name:
            labels = "SELECT enumlabel FROM pg_enum WHERE enumtypid = to_regtype(:name)"
            there = set(connection.scalars(text(labels), {"name": quoted(kind.schema, kind.name)}))
            if missing := [label for label in kind.enums if label not in there]:
                found.append(
                    f"the type {kind.name} lacks {', '.join(missing)} (ALTER TYPE {quoted(kind.name)} ADD VALUE ...)"
                )
    return found


def _shape(connection: Connection, made: Generation, table: str) -> Shape:
    if connection.dialect.name != "postgresql":
        return _sqlite_shape(connection, made, table)
    parameters = {"table": quoted(table)}
    rows = connection.execute(text(_COLUMNS), parameters)
    columns = {row.name: (row.type, row.nullable, _default(row.default)) for row in rows}
    constraints = {_neutral(made, found) for found in connection.scalars(text(_CONSTRAINTS), parameters)}
    indexes: set[str] = set()
    for found in connection.scalars(text(_INDEXES), parameters):
        kind, _, definition = found.partition(" USING ")
        unique = kind.startswith("CREATE UNIQUE")
        (constraints if unique else indexes).add(
            f"{'UNIQUE INDEX' if unique else 'INDEX'} {_neutral(made, definition)}"
        )
    return Shape(columns, frozenset(constraints), frozenset(indexes))


def _default(expression: str) -> str:
    # the name of a sequence contains that of its table
    return "nextval" if expression.startswith("nextval(") else expression


def _neutral(made: Generation, definition: str) -> str:
    for key, table in made.tables.items():
        definition = definition.replace(quoted(table.name), key).replace(table.name, key)
    return definition


def _sqlite_shape(connection: Connection, made: Generation, table: str) -> Shape:
    rows = connection.execute(text("SELECT * FROM pragma_table_xinfo(:table)"), {"table": table}).all()
    columns = {row.name: (row.type.upper(), not row.notnull, row.dflt_value or "") for row in rows}
    key = [row.name for row in sorted(rows, key=lambda row: row.pk) if row.pk]
    constraints = {f"PRIMARY KEY ({', '.join(key)})"}
    indexes: set[str] = set()
    for index in connection.execute(text("SELECT * FROM pragma_index_list(:table)"), {"table": table}).all():
        if index.origin == "pk":
            continue
        parts = connection.execute(text("SELECT name FROM pragma_index_info(:index)"), {"index": index.name})
        names = ", ".join(name or "an expression" for name in parts.scalars())
        (constraints if index.unique else indexes).add(f"{'UNIQUE' if index.unique else 'INDEX'} ({names})")
    references = text('SELECT id, "table", "from", "to" FROM pragma_foreign_key_list(:table) ORDER BY id, seq')
    for row in connection.execute(references, {"table": table}):
        constraints.add(f"FOREIGN KEY ({row[2]}) REFERENCES {_neutral(made, row[1])}({row[3]})")
    return Shape(columns, frozenset(constraints), frozenset(indexes))
