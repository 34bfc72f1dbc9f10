"""One statement per table and batch. The rows are sent as one JSON parameter: the driver is called once, and the event
loop's thread keeps running while the database works."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import orjson
from sqlalchemy import Column, Numeric, String, Table, Text, text
from sqlalchemy.engine import Connection, Dialect

from aggregates.messages import plain
from projections.records import Columns

CHUNK = 5_000
"""Rows per statement. It limits one JSON parameter to about a megabyte."""


class Bulk:
    """The statements for one physical table.

    Args:
        columns: the model's columns, which are also the table's.
        table: the physical table of one generation.
    """

    def __init__(self, columns: Columns, table: Table, dialect: Dialect) -> None:
        quote = dialect.identifier_preparer.quote
        names = [quote(column.name) for column in columns.columns]
        target, keys = quote(table.name), columns.keys
        self._values = columns.values(dialect)
        self._keys = columns.keys
        self._columnwise = dialect.name == "postgresql"
        source = _recordset(columns.columns, dialect)
        insert = f"INSERT INTO {target} ({', '.join(names)}) {source}"
        conflict = f"ON CONFLICT ({', '.join(names[:keys])}) DO"
        rest = names[keys:]
        if rest:
            replaced = ", ".join(f"{name} = excluded.{name}" for name in rest)
            added = ", ".join(f"{name} = {target}.{name} + excluded.{name}" for name in rest)
            self.upsert = text(f"{insert} {conflict} UPDATE SET {replaced}")
            self.add = text(f"{insert} {conflict} UPDATE SET {added}")
        else:
            self.upsert = self.add = text(f"{insert} {conflict} NOTHING")
        wanted = f"{names[0]} IN (SELECT value FROM json_each(:keys))"
        if self._columnwise:
            cast = _cast(columns.columns[0], dialect)
            wanted = f"{names[0]} IN (SELECT CAST(value AS {cast}) FROM json_array_elements_text(CAST(:keys AS json)))"
        self.delete = text(f"DELETE FROM {target} WHERE {wanted}")
        self.select = text(f"SELECT {', '.join(names)} FROM {target} WHERE {wanted}").columns(
            *(Column(column.name, column.type) for column in columns.columns)
        )

    def parameters(self, records: Iterable[Any]) -> list[dict[str, str]]:
        """Freeze records into the parameters of `upsert` or `add`. The records must not change during the call.

        Raises:
            TypeError, ValueError: a record contains a value that can't be sent to the database.
        """
        values = list(map(self._values, records))
        chunks = [values[start : start + CHUNK] for start in range(0, len(values), CHUNK)]
        if not self._columnwise:
            return [{"rows": _json(chunk)} for chunk in chunks]
        return [{f"c{index}": _json(list(column)) for index, column in enumerate(zip(*c, strict=True))} for c in chunks]

    def key(self, record: Any) -> str | None:
        """Return a record's key as JSON, or None if the record can't be sent to the database at all."""
        try:
            self.parameters([record])
            return _json(list(self._values(record)[: self._keys]))
        except Exception:
            return None

    def one_by_one(self, parameters: Sequence[dict[str, str]]) -> Iterator[tuple[list[Any], dict[str, str]]]:
        """Yield, for each row, its key columns and the parameters that contain this row only."""
        for chunk in parameters:
            columns = [orjson.loads(values) for values in chunk.values()]
            rows = zip(*columns, strict=True) if self._columnwise else columns[0]
            for row in rows:
                by_column = {f"c{place}": _json([value]) for place, value in enumerate(row)}
                yield list(row[: self._keys]), by_column if self._columnwise else {"rows": _json([row])}

    def load(self, connection: Connection, keys: Sequence[str], make: Callable[..., Any]) -> dict[Any, Any]:
        """Return the stored rows with these keys as records."""
        found: dict[Any, Any] = {}
        for start in range(0, len(keys), CHUNK):
            for row in connection.execute(self.select, {"keys": _json(keys[start : start + CHUNK])}):
                found[row[0]] = make(*row)
        return found


def key_parameters(keys: Sequence[str]) -> dict[str, str]:
    """Return the parameters of `Bulk.delete`."""
    return {"keys": _json(keys)}


def _json(value: Any) -> str:
    text_ = orjson.dumps(value, default=plain).decode()
    if "\\u0000" in text_ and _has_zero(value):
        raise ValueError("a text contains a zero character: PostgreSQL can't store it, and SQLite would cut it there")
    return text_


def _has_zero(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_has_zero, value))
    return isinstance(value, str) and "\0" in value


def _recordset(columns: Sequence[Column[Any]], dialect: Dialect) -> str:
    if dialect.name != "postgresql":
        picked = ", ".join(f"value->>{index}" for index in range(len(columns)))
        # WHERE true: otherwise SQLite reads ON CONFLICT as a join condition
        return f"SELECT {picked} FROM json_each(:rows) WHERE true"
    picked = ", ".join(f"CAST(v{index} AS {_cast(column, dialect)})" for index, column in enumerate(columns))
    arrays = ", ".join(f"json_array_elements_text(CAST(:c{index} AS json))" for index in range(len(columns)))
    names = ", ".join(f"v{index}" for index in range(len(columns)))
    return f"SELECT {picked} FROM ROWS FROM ({arrays}) AS given ({names})"


def _cast(column: Column[Any], dialect: Dialect) -> str:
    # a cast to varchar(n) cuts the text silently, and a cast to numeric(p, s) rounds: let the insert check the value
    if isinstance(column.type, String | Text):
        return "text"
    if isinstance(column.type, Numeric):
        return "numeric" if column.type.asdecimal else "double precision"
    return column.type.compile(dialect=dialect)
