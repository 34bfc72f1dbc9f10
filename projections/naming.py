"""Names of tables, indexes and constraints of a generation, and what is wrong with the names in a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import Table
from sqlalchemy import inspect as inspect_model
from sqlalchemy.exc import NoReferencedColumnError, NoReferencedTableError
from sqlalchemy.orm import Mapper

if TYPE_CHECKING:
    from projections.declaration import DeclaredProjection

MAX_BYTES = 63
"""Longest name in PostgreSQL. It cuts a longer one without an error, so that two names may become the same."""
OWN = "eskernel_"


def physical_name(name: str, number: int) -> str:
    """Return the name that a table, an index or a constraint has in a generation.

    A name that would be too long for PostgreSQL is shortened, and a digest keeps it apart from others.
    """
    ending = f"__{number}"
    if len((name + ending).encode()) <= MAX_BYTES:
        return name + ending
    digest = hashlib.blake2s(name.encode(), digest_size=4).hexdigest()
    room = MAX_BYTES - len(ending) - len(digest) - 1
    return f"{name.encode()[:room].decode(errors='ignore')}_{digest}{ending}"


def table_of(model: type) -> Table:
    """Return a model's own table."""
    mapper: Mapper[Any] = inspect_model(model)
    table = mapper.local_table
    assert isinstance(table, Table)
    return table


def quoted(*parts: str | None) -> str:
    """Return a name as SQL of both databases, quoted whatever it contains. Parts that are None are left out."""
    return ".".join('"' + part.replace('"', '""') + '"' for part in parts if part is not None)


def model_problems(models: Iterable[type]) -> list[str]:
    """Return one sentence for each model of a projection that can't have a table of its own."""
    problems = []
    for model in models:
        mapper: Mapper[Any] = inspect_model(model)
        if not isinstance(mapper.local_table, Table):
            problems.append(f"{model.__name__} is not mapped to a table; give it a __tablename__")
        elif mapper.inherits is not None and mapper.local_table is not mapper.inherits.local_table:
            parent = mapper.inherits.class_.__name__
            problems.append(
                f"{model.__name__} inherits from {parent}, and its columns are in two tables; a projection fills one "
                f"table per model: make {parent} a mixin without a table, or declare all columns in {model.__name__}"
            )
    return problems


def name_problems(projections: Sequence[DeclaredProjection]) -> list[str]:
    """Return one sentence for each name of a table, and each foreign key, that generations and views can't carry."""
    problems = []
    owners = {table_of(model).key: declared for declared in projections for model in declared.models}
    for declared in projections:
        seen: set[str] = set()
        for model in declared.models:
            table = table_of(model)
            if table.key in seen:
                problems.append(f"{declared.name} lists the table {table.key!r} twice; list each table once")
            seen.add(table.key)
            if table.name.lower().startswith(OWN):
                problems.append(
                    f"{model.__name__}: names that begin with {OWN!r} are the kernel's; rename {table.name!r}"
                )
            base, _, number = table.key.rpartition("__")
            if base in owners and number.isdecimal():
                problems.append(
                    f"{model.__name__}: {table.key!r} is the name of generation {number} of {base!r}; rename the table"
                )
            problems += _foreign_keys(declared, model, table, owners)
    return problems


def _foreign_keys(
    declared: DeclaredProjection, model: type, table: Table, owners: dict[str, DeclaredProjection]
) -> list[str]:
    problems = []
    for key in sorted(table.foreign_keys, key=lambda foreign: foreign.target_fullname):
        where = f"{model.__name__}.{key.parent.name}: the foreign key to {key.target_fullname!r}"
        try:
            owner = owners.get(key.column.table.key)
        except (NoReferencedTableError, NoReferencedColumnError):
            problems.append(f"{where} names no table and column that SQLAlchemy knows; correct or remove it")
            continue
        if owner is not None and owner is not declared:
            problems.append(
                f"{where} refers to a view: projection {owner.name} fills this table, and each projection is built by "
                "itself. Remove the ForeignKey (a relationship works without it: primaryjoin with foreign()), or fill "
                "both tables in one Sql projection"
            )
    return problems


def database_problems(dialect: str, projections: Sequence[DeclaredProjection]) -> list[str]:
    """Return one sentence for each name that this kind of database can't carry."""
    problems = []
    tables = [(declared, table_of(model)) for declared in projections for model in declared.models]
    if dialect == "sqlite":
        known: dict[str, str] = {}
        for declared, table in tables:
            if table.schema is not None:
                problems.append(
                    f"{declared.name}: the table {table.key!r} is in the schema {table.schema!r}, and SQLite has no "
                    "schemas; remove schema=..., or use PostgreSQL"
                )
            other = known.setdefault(table.key.lower(), table.key)
            if other != table.key:
                problems.append(
                    f"{declared.name}: to SQLite the tables {other!r} and {table.key!r} are the same; rename one"
                )
        return problems
    for declared, table in tables:
        for what, name in [("table", table.name), *(("column", column.name) for column in table.columns)]:
            if (size := len(name.encode())) > MAX_BYTES:
                problems.append(
                    f"{declared.name}: the name of the {what} {name!r} has {size} bytes, and PostgreSQL cuts names at "
                    f"{MAX_BYTES}; shorten it"
                )
    return problems
