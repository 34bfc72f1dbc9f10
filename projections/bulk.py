"""One statement per table and batch. The rows are sent as one JSON parameter: the driver is called once, and the event
loop's thread keeps running while the database works."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import orjson
from sqlalchemy import Column, Index, Numeric, Table, UniqueConstraint, text, types
from sqlalchemy.dialects.postgresql import ExcludeConstraint
from sqlalchemy.engine import Connection, Dialect

from projections.codec import Refused
from projections.naming import quoted
from projections.row_codec import Row, RowCodec
from projections.scalar_codecs import decimal_scale

CHUNK = 5_000
"""Rows per statement. It limits one JSON parameter to about a megabyte."""
CHUNK_SIZE = 16_000_000
"""Characters of JSON per statement, unless one row has more."""

Parameters = dict[str, str]


class Bulk:
    """The statements for one physical table.

    Args:
        codec: the model's columns, which are also the table's.
        table: the physical table of one generation.
        alone: only one transaction at a time writes to the table.

    Attributes:
        codec: the codec of the table's records.
        delete: deletes rows by `key_parameters`.
        upsert: writes rows that are there or not. If the table `replaces`, they must have been deleted.
        add: adds to the counters of rows, or writes them.
        insert_one, delete_one: statements for one row. On PostgreSQL they are PL/pgSQL, and the row is in the variable
            `eskernel_row`; on SQLite it is the parameters.
        conflicts: what follows `insert_one`, to `upsert` or to `add`.
        many_writers: several transactions may write to the table at the same time.
        replaces: rows have to be deleted before any of them is written: a value that must be unique may have been
            handed on from one of them to another.
    """

    def __init__(self, codec: RowCodec, table: Table, dialect: Dialect, alone: bool = False) -> None:
        columns, keys = codec.columns, codec.columns.keys
        names = [_escaped(quoted(column.name)) for column in columns.columns]
        target = _escaped(quoted(table.schema, table.name))
        self.codec, self._key_of = codec, itemgetter(*range(keys))
        self._columnwise = dialect.name == "postgresql"
        self.many_writers = self._columnwise and not alone
        self.replaces = not codec.counting and _has_other_unique(table)
        source = self._source(dialect)
        into = f"INSERT INTO {target} ({', '.join(names)})"
        insert = f"{into} {source}"
        conflict = f"ON CONFLICT ({', '.join(names[:keys])}) DO"
        rest = list(zip(names, columns.columns, strict=True))[keys:]
        upsert = add = f"{conflict} NOTHING"
        if rest:
            replaced = ", ".join(f"{name} = excluded.{name}" for name, _ in rest)
            added = ", ".join(f"{name} = {_sum(dialect, target, name, column)}" for name, column in rest)
            upsert, add = f"{conflict} UPDATE SET {replaced}", f"{conflict} UPDATE SET {added}"
        if self.replaces:
            upsert = ""
        self.upsert, self.add = text(f"{insert} {upsert}"), text(f"{insert} {add}")
        one = ", ".join(f"CAST(eskernel_row->>{place} AS {codec.cast})" for place, codec in enumerate(codec.codecs))
        self.insert_one = f"{_unescaped(into)} SELECT {one}"
        own = [f"CAST(eskernel_row->>{place} AS {codec.codecs[place].cast})" for place in range(keys)]
        if not self._columnwise:
            self.insert_one, own = f"{_unescaped(into)} VALUES ({', '.join('?' * len(names))})", ["?"] * keys
        matches = " AND ".join(f"{_unescaped(name)} = {key}" for name, key in zip(names, own, strict=False))
        self.delete_one = f"DELETE FROM {_unescaped(target)} WHERE {matches}"
        self.conflicts = {"upsert": _unescaped(upsert), "add": _unescaped(add)}
        wanted = f"{names[0]} IN (SELECT value FROM json_each(:keys))"
        if self._columnwise:
            cast = codec.codecs[0].cast
            wanted = f"{names[0]} IN (SELECT CAST(value AS {cast}) FROM json_array_elements_text(CAST(:keys AS json)))"
        if codec.keyed:
            wanted = self._wanted_keys(names[:keys])
        self.delete = text(f"DELETE FROM {target} WHERE {wanted}")
        self.select = text(f"SELECT {', '.join(names)} FROM {target} WHERE {wanted}").columns(
            *(Column(column.name, column.type) for column in columns.columns)
        )
        self.sequence = text(
            f"UPDATE {target} SET eskernel_sequence = :sequence WHERE {wanted} AND eskernel_sequence < :sequence"
        )

    def _wanted_keys(self, names: Sequence[str]) -> str:
        given, read = "json_each(:keys)", [f"value->>{place}" for place in range(len(names))]
        if self._columnwise:
            given = "json_array_elements(CAST(:keys AS json)) AS given (value)"
            read = [f"CAST({one} AS {codec.cast})" for one, codec in zip(read, self.codec.codecs, strict=False)]
        return f"({', '.join(names)}) IN (SELECT {', '.join(read)} FROM {given})"

    def _source(self, dialect: Dialect) -> str:
        count = len(self.codec.codecs)
        if dialect.name != "postgresql":
            picked = ", ".join(f"value->>{index}" for index in range(count))
            # WHERE true: otherwise SQLite reads ON CONFLICT as a join condition
            return f"SELECT {picked} FROM json_each(:rows) WHERE true"
        picked = ", ".join(f"CAST(v{index} AS {codec.cast})" for index, codec in enumerate(self.codec.codecs))
        arrays = ", ".join(f"json_array_elements_text(CAST(:c{index} AS json))" for index in range(count))
        names = ", ".join(f"v{index}" for index in range(count))
        return f"SELECT {picked} FROM ROWS FROM ({arrays}) AS given ({names})"

    def carry(self, records: Iterable[Any]) -> tuple[list[Row], dict[int, str]]:
        """Return the rows that carry records, and by place the records that are refused, and why."""
        return self.codec.carry(records)

    def carry_own(self, records: Mapping[str, Any]) -> tuple[list[Row], dict[int, str]]:
        """Return what `carry` does for records by aggregate id. Those whose handler has set their key are refused."""
        rows, refused = self.carry(records.values())
        kept = [place for place in range(len(records)) if place not in refused]
        name = self.codec.columns.names[0]
        for place, (aggregate_id, record) in enumerate(records.items()):
            if place not in refused and self.codec.id_of(record) != aggregate_id:
                what = "the row's key" if self.codec.keyed else "the aggregate's id"
                refused[place] = f"{self.codec.model}.{name} is {what}; a handler can't set it"
        return [row for place, row in zip(kept, rows, strict=True) if place not in refused], refused

    def carry_sums(self, records: Iterable[Any]) -> tuple[list[Row], dict[int, str]]:
        """Return the rows that carry increments, one for each key of the table, and the records that are refused."""
        listed = list(records)
        rows, refused = self.carry(listed)
        if len(set(map(self._key_of, rows))) == len(rows):
            return rows, refused
        by_key: dict[Any, list[Any]] = {}
        kept = (record for place, record in enumerate(listed) if place not in refused)
        for row, record in zip(rows, kept, strict=True):
            by_key.setdefault(self._key_of(row), []).append(record)
        rows, more = self.carry(map(self.codec.total, by_key.values()))
        return rows, refused or more

    def in_order(self, rows: list[Row]) -> list[Row]:
        """Return rows in the order of their keys. All writers share it, so that their locks don't cross."""
        if not self.many_writers:
            return rows
        try:
            return sorted(rows, key=self._key_of)
        except TypeError:  # values of different types
            keys = range(self.codec.columns.keys)
            return sorted(rows, key=lambda row: [(type(row[place]).__name__, row[place]) for place in keys])

    def parameters(self, rows: Sequence[Row]) -> list[Parameters]:
        """Return the parameters of `upsert` or `add`."""
        made: list[Parameters] = []
        for start in range(0, len(rows), CHUNK):
            self._fill(rows[start : start + CHUNK], made)
        return made

    def _fill(self, rows: Sequence[Row], made: list[Parameters]) -> None:
        parameters = (
            {f"c{index}": _json(column) for index, column in enumerate(zip(*rows, strict=True))}
            if self._columnwise
            else {"rows": _json(rows)}
        )
        if len(rows) == 1 or sum(map(len, parameters.values())) <= CHUNK_SIZE:
            made.append(parameters)
            return
        half = len(rows) // 2
        self._fill(rows[:half], made)
        self._fill(rows[half:], made)

    def key_parameters(self, keys: Iterable[str]) -> Parameters:
        """Return the parameters of `delete` and `select`. An id that can't be a key is left out: it has no row."""
        if self.codec.keyed:
            return {"keys": _json(list(map(self.codec.key_wires, keys)))}
        return {"keys": _json(list(self._wires(keys)))}

    def _wires(self, ids: Iterable[str]) -> dict[Any, str]:
        wires = {}
        for aggregate_id in ids:
            try:
                wires[self.codec.key_wire(aggregate_id)] = aggregate_id
            except Refused:
                pass
        return wires

    def load(self, connection: Connection, ids: Sequence[str]) -> tuple[dict[str, Any], dict[str, Exception]]:
        """Return the stored rows of aggregates as records, by id; and the rows that can't be read, and why.

        Raises:
            sqlalchemy.exc.DBAPIError: the database failed.
        """
        found: dict[str, Any] = {}
        failed: dict[str, Exception] = {}
        for start in range(0, len(ids), CHUNK):
            self._load(connection, ids[start : start + CHUNK], found, failed)
        return found, failed

    def _load(
        self, connection: Connection, ids: Sequence[str], found: dict[str, Any], failed: dict[str, Exception]
    ) -> None:
        result = connection.execute(self.select, self.key_parameters(ids))
        try:
            records = [self.codec.stored(row) for row in result]
        except Exception as error:  # of a type's own code, at a value that it did not write
            if len(ids) == 1:
                failed[ids[0]] = error
                return
            half = len(ids) // 2
            self._load(connection, ids[:half], found, failed)
            self._load(connection, ids[half:], found, failed)
            return
        for record in records:
            found[self.codec.id_of(record)] = record


def _escaped(name: str) -> str:
    return name.replace(":", r"\:")  # it would begin a parameter


def _unescaped(sql: str) -> str:
    return sql.replace(r"\:", ":")


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()


def _has_other_unique(table: Table) -> bool:
    return any(isinstance(constraint, UniqueConstraint | ExcludeConstraint) for constraint in table.constraints) or any(
        isinstance(index, Index) and index.unique for index in table.indexes
    )


def _sum(dialect: Dialect, target: str, name: str, column: Column[Any]) -> str:
    """Return the sum of what is there and what is added, which must be exact or fail."""
    total = f"{target}.{name} + excluded.{name}"
    if dialect.name == "postgresql":
        return total
    overflow = "abs(-9223372036854775807 - 1)"  # SQLite's only function that fails at an integer that is too large
    if not isinstance(column.type, Numeric) or isinstance(column.type, types.Integer):
        return f"CASE typeof({total}) WHEN 'real' THEN {overflow} ELSE {total} END"
    scale = decimal_scale(column.type)
    return f"CASE WHEN abs({total}) >= 1e{15 - scale} THEN {overflow} ELSE round({total}, {scale}) END"
