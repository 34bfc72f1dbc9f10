"""Columns: what a model says about the columns that the kernel writes, and its problems.

A record is a light row for folds, with a model's columns as slots and without the ORM's bookkeeping. Setting an
attribute of an ORM instance costs about a microsecond and half a kilobyte; a slot costs neither. Users annotate their
handlers with the model, and a misspelt column is an error at start (see `declaration`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from sqlalchemy import BigInteger, Column, LargeBinary, Table
from sqlalchemy import inspect as inspect_model
from sqlalchemy.orm import Mapper

from aggregates.errors import DeclarationError

SEQUENCE = "eskernel_sequence"
"""The kernel's own column in the tables of `Rows`, which no view shows: the sequence of the last event folded into the
row. It reveals a gap in an aggregate's events, even if the aggregate was evicted from memory long ago."""
_MOVING_DEFAULTS = {"today", "now", "utcnow", "time", "uuid4", "uuid1"}
_IMMUTABLE = (str, bytes, int, float, bool, complex, type(None))


class Columns:
    """A model's columns in one fixed order: keys first, then the rest, by attribute name and by column.

    Columns that the database computes are left out.

    Args:
        sequenced: add the column `SEQUENCE`.

    Attributes:
        names: attribute names, of which the first `keys` form the primary key.
        shown: attribute names of the model's own columns.
        table: the model's own table, the pattern for the table of each generation.

    Raises:
        DeclarationError: the model isn't mapped to one table.
    """

    def __init__(self, model: type, sequenced: bool = False) -> None:
        mapper: Mapper[Any] = inspect_model(model)
        table = mapper.local_table
        inherited = mapper.inherits is not None and mapper.inherits.local_table is not table
        if not isinstance(table, Table) or inherited:
            raise DeclarationError(
                [
                    f"{model.__name__} must be mapped to one table of its own; a model with joined inheritance, or "
                    "one that is mapped to a select, is not"
                ]
            )
        self.table = table
        pairs = [(prop.key, prop.columns[0]) for prop in mapper.column_attrs]
        own = [(name, column) for name, column in pairs if isinstance(column, Column) and not _is_computed(column)]
        own.sort(key=lambda pair: not pair[1].primary_key)
        self.names: list[str] = [name for name, _ in own]
        self.columns: list[Column[Any]] = [column for _, column in own]
        self.shown = list(self.names)
        if sequenced:
            self.names.append(SEQUENCE)
            self.columns.append(Column(SEQUENCE, BigInteger, nullable=False, default=0))
        self.keys = sum(1 for column in self.columns if column.primary_key)

    def problems(self, model: type, numeric: bool) -> list[str]:
        """Return one sentence for each column that can't be used, whatever the database.

        Args:
            numeric: whether the non-key columns are counters.
        """
        found = []
        if SEQUENCE in self.shown or SEQUENCE in self.table.columns:
            found.append(f"{model.__name__}: the name {SEQUENCE} is the kernel's own; rename the column")
        for place, (name, column) in enumerate(zip(self.names, self.columns, strict=True)):
            where = f"{model.__name__}.{name}"
            key = place < self.keys
            if column.identity is not None and not key:
                found.append(f"{where}: a rebuild would number its rows otherwise; leave Identity away")
            if isinstance(column.type, LargeBinary):
                found.append(f"{where}: binary columns are not supported in Rows and Tallies; use an Sql projection")
            if key:
                continue
            if column.onupdate is not None or column.server_onupdate is not None:
                found.append(f"{where}: the kernel doesn't apply onupdate; set the column in the handlers")
            if numeric:
                found += _counter_problems(where, column)
            else:
                found += _row_problems(where, column)
        return found


def _counter_problems(where: str, column: Column[Any]) -> list[str]:
    if not is_number(column):
        return [f"{where}: a tally's columns beside its key are counters; give this one a numeric type"]
    if issubclass(column.type.python_type, float):
        return [f"{where}: a sum of floats depends on how events fall into batches; use Numeric or an integer type"]
    default = column.default
    if default is not None and not (default.is_scalar and default.arg == 0):  # type: ignore[attr-defined]
        return [f"{where}: a tally's counters begin at 0; leave the default away, or make it 0"]
    return []


def _row_problems(where: str, column: Column[Any]) -> list[str]:
    default: Any = column.default
    if default is None:
        if column.server_default is not None:
            return [f"{where}: the kernel writes every column, so a server_default is never used; give it default=..."]
        if not column.nullable:
            return [f"{where}: a new row needs a value; give the column default=..., or make it nullable"]
        return []
    if not default.is_scalar and not default.is_callable:
        return [f"{where}: its default is computed by the database; give it a value or a Python function instead"]
    if not default.is_callable:
        return []
    name = getattr(default.arg, "__name__", "")
    try:
        same = name not in _MOVING_DEFAULTS and default.arg(None) == default.arg(None)
    except Exception as error:
        return [f"{where}: its default can't be called without a statement ({error}); make it a function of nothing"]
    if not same:
        return [
            f"{where}: its default gives another value at each call, and a rebuild would not give the same row; set "
            "the column in a handler, from the event or its Meta"
        ]
    return []


def _is_computed(column: Column[Any]) -> bool:
    return column.computed is not None


def is_number(column: Column[Any]) -> bool:
    """Return whether values of the column can be added up."""
    try:
        kind = column.type.python_type
    except NotImplementedError:
        return False
    return issubclass(kind, int | float | Decimal) and not issubclass(kind, bool)


def default_maker(column: Column[Any]) -> Callable[[], Any]:
    """Return a function that returns the column's value in a new row, which no other row shares."""
    default: Any = column.default
    if default is None:
        return lambda: None
    if default.is_callable:
        return lambda: default.arg(None)
    if isinstance(default.arg, _IMMUTABLE):
        return lambda: default.arg
    return lambda: copy.deepcopy(default.arg)
