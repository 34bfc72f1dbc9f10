"""The page of column types as text: `python docs/column_types.py > docs/column-types.md`.

Each cell is what the codecs say. `tests/projections/test_column_types.py` tries every type with values of all kinds.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import types
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, mapped_column

from projections.codec import Unsupported
from projections.records import Columns
from projections.row_codec import row_problems


class Colour(enum.Enum):
    """An example."""

    red = 1


class Money(types.TypeDecorator[int]):
    """An example."""

    impl = types.BigInteger
    cache_ok = True


TYPES: Final[dict[str, Callable[[], Any]]] = {
    "SmallInteger": types.SmallInteger,
    "Integer": types.Integer,
    "BigInteger": types.BigInteger,
    "Numeric(12, 2)": lambda: types.Numeric(12, 2),
    "Numeric": types.Numeric,
    "Float, Double": types.Float,
    "REAL, Float(24)": types.REAL,
    "Boolean": types.Boolean,
    "String, Unicode": types.String,
    "String(n)": lambda: types.String(20),
    "Text": types.Text,
    "String(collation=...)": lambda: types.String(collation="NOCASE"),
    "CHAR(n)": lambda: types.CHAR(5),
    "CITEXT": postgresql.CITEXT,
    "Date": types.Date,
    "DateTime": types.DateTime,
    "DateTime(timezone=True)": lambda: types.DateTime(timezone=True),
    "TIMESTAMP(precision=3)": lambda: postgresql.TIMESTAMP(precision=3),
    "Time": types.Time,
    "Time(timezone=True)": lambda: types.Time(timezone=True),
    "Interval": types.Interval,
    "Uuid": types.Uuid,
    "Uuid(as_uuid=False)": lambda: types.Uuid(as_uuid=False),
    "Enum": lambda: types.Enum(Colour),
    "Enum(native_enum=False)": lambda: types.Enum(Colour, native_enum=False),
    "JSON": types.JSON,
    "JSONB": postgresql.JSONB,
    "ARRAY": lambda: types.ARRAY(types.Integer),
    "INET": postgresql.INET,
    "CIDR": postgresql.CIDR,
    "TypeDecorator": Money,
    "LargeBinary": types.LargeBinary,
    "PickleType": types.PickleType,
    "HSTORE": postgresql.HSTORE,
    "MACADDR": postgresql.MACADDR,
    "ranges, BIT, MONEY, TSVECTOR": postgresql.INT4RANGE,
}
FORMS: Final = {
    "Numeric(12, 2)": "rounded half away from zero to the scale; SQLite refuses more than 15 digits",
    "Numeric": "exact on PostgreSQL; 10 digits behind the point, and 15 in all, on SQLite",
    "Float, Double": "-0.0 becomes 0.0; NaN and infinity are refused, and whole numbers that a float would round",
    "REAL, Float(24)": "rounded to single precision on PostgreSQL",
    "CHAR(n)": "padded with blanks on PostgreSQL",
    "DateTime(timezone=True)": "in UTC; SQLite stores UTC without its zone",
    "Uuid(as_uuid=False)": "with dashes, in lower case",
    "Enum": "a member; its name becomes the member",
    "Enum(native_enum=False)": "a member; its name becomes the member",
    "JSON": "tuples become lists; NaN and keys that are no texts are refused",
    "JSONB": "as JSON; keys in PostgreSQL's order; floats from 1e16 on become whole numbers",
    "ARRAY": "tuples become lists; parts of different lengths are refused",
    "INET": "an `ipaddress` object",
    "CIDR": "an `ipaddress` object",
    "TypeDecorator": "what the decorator gives back for what it stored",
}
"""Normal forms, of types that do not carry every value as it is."""
DIALECTS: Final[dict[str, Dialect]] = {"SQLite": sqlite.dialect(), "PostgreSQL": postgresql.dialect()}
HEAD: Final = """\
# Column types

What `Rows`, `Tallies` and `Sql` projections do with a column of each SQLAlchemy type. This page is made by
`python docs/column_types.py`. The tests try every cell on both databases.

- **exact**: a value comes back as it was, or is refused.
- **normal form**: after each event the value is brought to the form in the last column, which is what a SELECT gives.
  So it does not matter where a batch ended, or whether the row has been in the database meanwhile.
- **refused**: the service does not start, and `eskernel check --database` says why.

A value that a column can't hold is never changed. Its aggregate is parked for that projection, from the event that set
it on, and the error names the column. Others go on.

A value of a subclass, such as a `StrEnum` in a `String` or `True` in an `Integer`, is written as its base. It is equal
to that, and stays what it is in memory until the row is loaded again.

`Sql` handlers write their own statements: what SQLAlchemy carries, they carry. Columns of an `Identity` are numbered in
the order of insertion, which differs in a rebuild with several workers.

| Type | Database | Rows, value | Rows, key | Tallies, key | Tallies, counter | Sql | Normal form |
|---|---|---|---|---|---|---|---|"""
TAIL: Final = """
## Defaults

| Column | What happens |
|---|---|
| `default=[]`, `default={}` | each new row has its own |
| `default=function` | called for each new row, if two calls give equal values; otherwise refused |
| `default=func.now()`, a default that needs a statement | refused |
| `server_default` without `default` | refused: the kernel writes every column |
| `onupdate`, `server_onupdate` | refused |
| `Computed` | the database computes it; handlers neither read nor set it |
| `Identity` beside the key | refused |
| `column_property` | left out; handlers neither read nor set it |

A counter of `Tallies` adds up exactly: an increment with more digits than the column is refused.

The key of `Rows` is the aggregate's id. With `Integer` or `Uuid`, an id that is not in the usual form of such a value
parks its aggregate. A key of their own, given by the projection's method `key`, has the types String, Text, Integer,
Uuid, Date, DateTime, Boolean or Enum: their values have one form each."""


def cell(make: Callable[[], Any], dialect: Dialect, use: str, form: bool) -> str:
    """Return what happens to a column of a type in one use."""

    class Base(DeclarativeBase):
        pass

    columns: dict[str, Any] = {"value": mapped_column(make(), primary_key=use.endswith("key"), nullable=True)}
    if not use.endswith("key"):
        columns = {"id": mapped_column(types.String, primary_key=True), **columns}
    model = type("Model", (Base,), {"__tablename__": "t", **columns})
    tally = use.startswith("Tallies")
    if use == "Sql":
        try:
            make().compile(dialect=dialect)
        except SQLAlchemyError:
            return "refused"
        return "yes"
    described = Columns(model)
    problems = described.problems(model, numeric=tally)
    try:
        problems += row_problems(described, "Model", dialect, counting=tally)
    except Unsupported as problem:
        problems.append(str(problem))
    return "refused" if problems else "normal form" if form else "exact"


def main() -> None:
    """Print the page."""
    lines = [HEAD]
    for name, make in TYPES.items():
        for database, dialect in DIALECTS.items():
            uses = ("Rows, value", "Rows, key", "Tallies, key", "Tallies, counter", "Sql")
            cells = [cell(make, dialect, use, name in FORMS) for use in uses]
            form = FORMS.get(name, "") if "normal form" in cells else ""
            lines.append(f"| {name} | {database} | {' | '.join(cells)} | {form} |")
    sys.stdout.write("\n".join([*lines, TAIL]) + "\n")


if __name__ == "__main__":
    main()
