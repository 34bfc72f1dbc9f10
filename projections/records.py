"""Records: light rows for folds. A record has a model's columns as slots, without the ORM's bookkeeping.

Setting an attribute of an ORM instance costs about a microsecond and half a kilobyte; a slot costs neither. Users
annotate their handlers with the model, and a misspelt column is an error at start (see `declaration`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

from sqlalchemy import BigInteger, Column, LargeBinary, Table
from sqlalchemy import inspect as inspect_model
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import Mapper

SEQUENCE = "eskernel_sequence"
"""The kernel's own column in the tables of `Rows`, which no view shows: the sequence of the last event folded into the
row. It reveals a gap in an aggregate's events, even if the aggregate was evicted from memory long ago."""


class Columns:
    """A model's columns in one fixed order: keys first, then the rest, by attribute name and by column.

    Args:
        sequenced: add the column `SEQUENCE`.

    Attributes:
        names: attribute names, of which the first `keys` form the primary key.
        shown: attribute names of the model's own columns.
        table: the model's own table, the pattern for the table of each generation.
    """

    def __init__(self, model: type, sequenced: bool = False) -> None:
        mapper: Mapper[Any] = inspect_model(model)
        table = mapper.local_table
        assert isinstance(table, Table)
        self.table = table
        pairs = [(prop.key, prop.columns[0]) for prop in mapper.column_attrs if isinstance(prop.columns[0], Column)]
        pairs.sort(key=lambda pair: not pair[1].primary_key)
        self.names: list[str] = [name for name, _ in pairs]
        self.columns: list[Column[Any]] = [column for _, column in pairs]
        self.shown = list(self.names)
        if sequenced:
            self.names.append(SEQUENCE)
            self.columns.append(Column(SEQUENCE, BigInteger, nullable=False, default=0))
        self.keys = sum(1 for column in self.columns if column.primary_key)

    def problems(self, model: type, numeric: bool) -> list[str]:
        """Return one sentence for each column that can't be used.

        Args:
            numeric: whether the non-key columns are counters.
        """
        found = []
        if SEQUENCE in self.shown or SEQUENCE in self.table.columns:
            found.append(f"{model.__name__}: the name {SEQUENCE} is the kernel's own; rename the column")
        for name, column in list(zip(self.names, self.columns, strict=True))[self.keys :]:
            where = f"{model.__name__}.{name}"
            if numeric and not _is_number(column):
                found.append(f"{where}: a tally's columns beside its key are counters; give this one a numeric type")
            elif not numeric and not column.nullable and not _has_default(column):
                found.append(f"{where}: a new row needs a value; give the column default=..., or make it nullable")
            if isinstance(column.type, LargeBinary):
                found.append(f"{where}: binary columns are not supported in Rows and Tallies; use an Sql projection")
        return found

    def factory(self, numeric: bool) -> Callable[..., Any]:
        """Return a function that makes a record: a new row from its key, or a stored row from all its values."""
        names, keys = tuple(self.names), self.keys
        start = [0 if numeric else _default(column) for column in self.columns[keys:]]
        plain = not any(callable(value) for value in start)
        record = type(f"{self.table.name}_record", (), {"__slots__": names})
        new: Callable[[type], Any] = object.__new__
        rest = names[keys:]

        def make(*values: Any) -> Any:
            made = new(record)
            for name, value in zip(names, values, strict=False):
                setattr(made, name, value)
            if len(values) <= keys:
                for name, value in zip(rest, start, strict=True):
                    setattr(made, name, value if plain or not callable(value) else value())
            return made

        return make

    def values(self, dialect: Dialect) -> Callable[[Any], Sequence[Any]]:
        """Return a function that returns a record's values as this database stores them."""
        get = attrgetter(*self.names) if len(self.names) > 1 else lambda row, _n=self.names[0]: (getattr(row, _n),)
        processors = [
            (index, processor)
            for index, column in enumerate(self.columns)
            if (processor := column.type.dialect_impl(dialect).bind_processor(dialect)) is not None
            and not _is_number(column)
        ]
        if not processors:
            return get

        def converted(row: Any) -> Sequence[Any]:
            values = list(get(row))
            for index, processor in processors:
                values[index] = processor(values[index])
            return values

        return converted


def _is_number(column: Column[Any]) -> bool:
    try:
        return issubclass(column.type.python_type, int | float)
    except NotImplementedError:
        return False


def _has_default(column: Column[Any]) -> bool:
    return column.default is not None and (column.default.is_scalar or column.default.is_callable)


def _default(column: Column[Any]) -> Any:
    default = column.default
    if default is None:
        return None
    if default.is_callable:
        return lambda: default.arg(None)  # type: ignore[attr-defined]
    return default.arg  # type: ignore[attr-defined]
