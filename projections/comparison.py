"""Compares two tables with each other: which rows differ, and in which columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Select,
    String,
    Text,
    and_,
    case,
    cast,
    exists,
    false,
    func,
    literal,
    or_,
    select,
    type_coerce,
    types,
    union_all,
)  # fmt: skip
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import DBAPIError

EXAMPLES = 20
"""Rows of each kind of difference that are read."""
_COMPARABLE = (
    types.Integer, types.Numeric, types.Boolean, types.Date, types.DateTime, types.Time, types.Interval, types.Uuid,
    types.LargeBinary,
)  # fmt: skip

_NUMBER = (types.Integer, types.Numeric)

What = Literal["changed", "missing", "extra"]


@dataclass(frozen=True, slots=True)
class RowDifference:
    """A row that is not what the log says.

    Attributes:
        what: `changed`: values differ; `missing`: the table does not have it; `extra`: the log does not lead to it.
        key: its key by column; empty if the database makes the key.
        stored, folded: values by column, in the table and as they follow from the log: those that differ, or all.
        since: sequence of the first event after which they differ. None if no event gives what is stored, or if the
            row is not that of one aggregate.
    """

    what: What
    key: dict[str, Any]
    stored: dict[str, Any]
    folded: dict[str, Any]
    since: int | None = None


@dataclass(frozen=True, slots=True)
class TableComparison:
    """The differences between a stored table and a folded one.

    Attributes:
        view: name of the view that shows the table.
        rows: number of rows in the stored table.
        columns: number of rows whose values differ, by column; only columns that both tables have.
        added, removed: columns that only the folded, or only the stored table has.
        changed, missing, extra: number of rows.
        folded: number of rows in the folded table.
        examples: some of them.
    """

    view: str
    rows: int
    changed: int
    missing: int
    extra: int
    columns: dict[str, int] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    examples: list[RowDifference] = field(default_factory=list)
    folded: int = 0

    @property
    def differing(self) -> int:
        """Number of rows that differ."""
        return self.changed + self.missing + self.extra


def compare(
    connection: Connection, view: str, stored: FromClause, folded: FromClause, keys: Sequence[str], names: Sequence[str]
) -> TableComparison:
    """Compare two tables.

    Args:
        keys: columns that tell which rows belong together; none: rows that are equal belong together.
        names: the other columns to be compared.
    """
    rows, made = count_rows(connection, stored), count_rows(connection, folded)
    if not keys:
        return _compare_unkeyed(connection, view, (rows, made), stored, folded, names)
    pairs_of = {name: _comparable([stored.c[name], folded.c[name]], connection) for name in [*keys, *names]}
    same = and_(*(pairs_of[key][0] == pairs_of[key][1] for key in keys))
    differ = {name: pairs_of[name][0].is_distinct_from(pairs_of[name][1]) for name in names}
    joined = stored.join(folded, same)
    any_differs = or_(*differ.values()) if differ else false()
    # keys are unique: what is not joined is missing, or extra
    pairs, changed = connection.execute(
        select(func.count(), func.count(case((any_differs, 1)))).select_from(joined)
    ).one()
    by_column = {}
    if changed:
        counts = [func.count(case((condition, 1))) for condition in differ.values()]
        found = connection.execute(select(*counts).select_from(joined).where(any_differs)).one()
        by_column = {name: count for name, count in zip(differ, found, strict=True) if count}
    result = TableComparison(view, rows, changed, made - pairs, rows - pairs, by_column, folded=made)
    if changed:
        result.examples.extend(_changed(connection, joined, any_differs, stored, folded, keys, by_column))
    if result.missing:
        absent = ~exists(select(1).select_from(stored).where(same))
        result.examples.extend(_only_in(connection, "missing", folded, absent, keys, names))
    if result.extra:
        absent = ~exists(select(1).select_from(folded).where(same))
        result.examples.extend(_only_in(connection, "extra", stored, absent, keys, names))
    return result


def count_rows(connection: Connection, table: FromClause) -> int:
    """Return the number of rows of a table."""
    return connection.scalar(select(func.count()).select_from(table)) or 0


def _changed(
    connection: Connection,
    joined: FromClause,
    condition: ColumnElement[bool],
    stored: FromClause,
    folded: FromClause,
    keys: Sequence[str],
    by_column: Mapping[str, int],
) -> list[RowDifference]:
    chosen = [
        *(stored.c[key].label(f"k{place}") for place, key in enumerate(keys)),
        *(stored.c[name].label(f"s{place}") for place, name in enumerate(by_column)),
        *(folded.c[name].label(f"f{place}") for place, name in enumerate(by_column)),
    ]
    query = select(*chosen).select_from(joined).where(condition).order_by(*(stored.c[key] for key in keys))
    found = []
    for row in _read(connection, query.limit(EXAMPLES), len(keys)):
        key, rest = row[: len(keys)], row[len(keys) :]
        before = dict(zip(by_column, rest, strict=False))
        after = dict(zip(by_column, rest[len(by_column) :], strict=True))
        found.append(changed_row(dict(zip(keys, key, strict=True)), before, after))
    return found


def changed_row(key: dict[str, Any], stored: Mapping[str, Any], folded: Mapping[str, Any]) -> RowDifference:
    """Return the difference of a row that has other values than it should."""
    found = changes(stored, folded)
    return RowDifference(
        "changed", key, {name: old for name, (old, _) in found.items()}, {name: new for name, (_, new) in found.items()}
    )


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the values before and after, by name, where they or their types differ. What is not there is None."""
    return {
        name: (before.get(name), after.get(name))
        for name in {**before, **after}
        if type(before.get(name)) is not type(after.get(name)) or before.get(name) != after.get(name)
    }


def _only_in(
    connection: Connection,
    what: What,
    table: FromClause,
    absent: ColumnElement[bool],
    keys: Sequence[str],
    names: Sequence[str],
) -> list[RowDifference]:
    query = select(*(table.c[name] for name in [*keys, *names])).where(absent).order_by(*(table.c[key] for key in keys))
    found = []
    for row in _read(connection, query.limit(EXAMPLES), len(keys)):
        key, values = dict(zip(keys, row, strict=False)), dict(zip(names, row[len(keys) :], strict=True))
        found.append(RowDifference(what, key, {} if what == "missing" else values, values if what == "missing" else {}))
    return found


def _compare_unkeyed(
    connection: Connection,
    view: str,
    rows: tuple[int, int],
    stored: FromClause,
    folded: FromClause,
    names: Sequence[str],
) -> TableComparison:
    forms = [_comparable([folded.c[name], stored.c[name]], connection) for name in names]
    if connection.dialect.name == "sqlite":  # a column's collation would go for groups
        forms = [[form.collate("BINARY") if _is_text(form) else form for form in pair] for pair in forms]
    labels = [f"v{place}" for place in range(len(names))]

    def counted(side: int, sign: int) -> Select[Any]:
        shown = (pair[side].label(label) for pair, label in zip(forms, labels, strict=True))
        return select(*shown, literal(sign).label("side"))

    both = union_all(counted(0, 1), counted(1, -1)).subquery()
    values = [both.c[label] for label in labels]
    total = func.sum(both.c.side)
    grouped = select(*values, total.label("more")).group_by(*values).having(total != 0).subquery()
    count = {
        sign: int(connection.scalar(select(func.sum(func.abs(grouped.c.more))).where(condition)) or 0)
        for sign, condition in ((1, grouped.c.more > 0), (-1, grouped.c.more < 0))
    }
    result = TableComparison(view, rows[0], 0, count[1], count[-1], folded=rows[1])
    for row in _read(connection, select(grouped).limit(EXAMPLES), 0):
        found = dict(zip(names, row, strict=False))
        missing = row[-1] > 0
        result.examples.append(
            RowDifference("missing" if missing else "extra", {}, {} if missing else found, found if missing else {})
        )
    return result


def _read(connection: Connection, query: Select[Any], keys: int) -> Sequence[Sequence[Any]]:
    """Return the rows of a query. A value that its column's type can't read is given as the driver gives it.

    Args:
        keys: number of columns that are a key: they are read as they are only if nothing else helps.
    """
    columns = list(query.selected_columns)
    for typed in (len(columns), keys):
        try:
            return connection.execute(_untyped(query, columns, typed)).all()
        except DBAPIError:
            raise
        except Exception:  # noqa: S112 - of the type's own code: the value was written by hand
            continue
    return connection.execute(_untyped(query, columns, 0)).all()


def _untyped(query: Select[Any], columns: Sequence[ColumnElement[Any]], typed: int) -> Select[Any]:
    raw = [type_coerce(column, types.NullType()).label(f"raw{place}") for place, column in enumerate(columns[typed:])]
    return query.with_only_columns(*columns[:typed], *raw) if raw else query


def _comparable(columns: Sequence[ColumnElement[Any]], connection: Connection) -> list[ColumnElement[Any]]:
    """Return columns that are compared with each other in a form whose equality tells all values apart."""
    if connection.dialect.name != "postgresql":
        return list(columns)
    plain = [_plain(column.type, connection.dialect) for column in columns]
    for kinds in (_NUMBER, *_COMPARABLE):
        if all(isinstance(kind, kinds) for kind in plain):
            return list(columns)
    # JSON has no equality, CITEXT and collations take different texts for equal
    return [cast(column, Text).collate("C") for column in columns]


def _is_text(column: ColumnElement[Any]) -> bool:
    return isinstance(column.type, String)


def _plain(type_: types.TypeEngine[Any], dialect: Dialect) -> types.TypeEngine[Any]:
    impl = type_.dialect_impl(dialect)
    while isinstance(impl, types.TypeDecorator) and not isinstance(impl, types.Interval):
        impl = impl.impl_instance
    return impl if not isinstance(impl, String) else Text()
