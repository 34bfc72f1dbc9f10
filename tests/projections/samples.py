"""Column types that people use, each with values that it carries and, where it has some, values that it refuses."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from ipaddress import ip_address, ip_interface
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

from sqlalchemy import types
from sqlalchemy.dialects import postgresql


class Colour(enum.Enum):
    """An enumeration whose names differ from its values."""

    red = "r"
    green = "g"


class Cents(types.TypeDecorator[Decimal]):
    """Money, stored as whole cents: the usual way to keep it exact on SQLite."""

    impl = types.BigInteger
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, dialect: Any) -> int | None:
        return None if value is None else int(value * 100)

    def process_result_value(self, value: int | None, dialect: Any) -> Decimal | None:
        return None if value is None else Decimal(value) / 100


@dataclass(frozen=True)
class Sample:
    """A column type.

    Attributes:
        values: what a handler may set; the first one is also a default.
        refused: what it may not.
        twist: makes another value from one that the row has, as a handler may do.
        both: SQLite has the type too.
    """

    name: str
    type: Callable[[], types.TypeEngine[Any]]
    values: tuple[Any, ...]
    twist: Callable[[Any], Any]
    refused: tuple[Any, ...] = ()
    both: bool = True


NEW_YORK = ZoneInfo("America/New_York")
_BERLIN = timezone(timedelta(hours=2))


def _more(document: Any) -> Any:
    if not isinstance(document, dict):
        return {"was": document}
    document[str(len(document))] = [len(document)]  # a handler may change the document in its place
    return document


def _longer(items: list[Any]) -> list[Any]:
    items.append(items[0] if items else None)
    return items


SAMPLES = (
    Sample("SmallInteger", types.SmallInteger, (0, -(2**15), 2**15 - 1), lambda n: (n * 3 + 1) % 1000),
    Sample("Integer", types.Integer, (0, -(2**31), 2**31 - 1, True), lambda n: (n * 3 + 1) % 1000),
    Sample("BigInteger", types.BigInteger, (0, -(2**63), 2**63 - 1), lambda n: (n * 3 + 1) % 1000),
    Sample(
        "Numeric(12, 2)",
        lambda: types.Numeric(12, 2),
        (Decimal("0"), Decimal("1.005"), Decimal("-0.005"), Decimal("9999999999.99"), 7, 0.1),
        lambda n: n / 3,
        (Decimal("NaN"), Decimal("1e20"), "1"),
    ),
    Sample(
        "Numeric(30, 10)", lambda: types.Numeric(30, 10), (Decimal(1) / 3, Decimal("-12.5")), lambda n: n / 7, ("x",)
    ),
    Sample("Float", types.Float, (0.1, -0.0, 1e300, 5), lambda n: n / 3, (float("nan"), float("inf"), 2**53 + 1, "1")),
    Sample("Double", types.Double, (0.1, 1e-300), lambda n: n / 3, (float("-inf"),)),
    Sample("REAL", types.REAL, (0.1, 16777217.0, 3), lambda n: n / 3, (float("nan"),)),
    Sample("Boolean", types.Boolean, (False, True, 1), lambda b: not b, (2, "yes")),
    Sample("String", types.String, ("", "é\n'\"\\", "x" * 300), lambda s: s[-5:] + "%"),
    Sample("String(20)", lambda: types.String(20), ("", "😀" * 20), lambda s: s[-5:] + "ß"),
    Sample("Text", types.Text, ("", "{}", "null"), lambda s: s[-5:] + '"'),
    Sample("CHAR(5)", lambda: types.CHAR(5), ("a", "abcde", ""), lambda s: (s + "z")[-5:]),
    Sample("Date", types.Date, (date(2013, 1, 1), date.min, date.max), lambda d: date(2000 + d.day, 1, 1)),
    Sample(
        "DateTime",
        types.DateTime,
        (datetime(2013, 1, 1), datetime(1, 1, 1, 0, 0, 0, 1), datetime.max),
        lambda d: datetime(2000 + d.day, 1, 1, d.hour),
    ),
    Sample(
        "DateTime(timezone=True)",
        lambda: types.DateTime(timezone=True),
        (
            datetime(2013, 1, 1, tzinfo=UTC),
            datetime(2026, 11, 1, 1, 30, fold=1, tzinfo=NEW_YORK),
            datetime(2020, 6, 1, 12, 0, 0, 5, tzinfo=_BERLIN),
        ),
        lambda d: d.replace(hour=(d.hour + 7) % 24),
        (datetime(2013, 1, 1), "2013"),
    ),
    Sample("Time", types.Time, (time(0), time(23, 59, 59, 999999)), lambda t: t.replace(hour=(t.hour + 5) % 24)),
    Sample("Interval", types.Interval, (timedelta(0), timedelta(-3, 5, 7), timedelta(9000)), lambda t: t / 7),
    Sample("Uuid", types.Uuid, (UUID(int=1), UUID(int=2**128 - 1)), lambda u: UUID(int=(u.int + 1) % 2**128)),
    Sample("Uuid(as_uuid=False)", lambda: types.Uuid(as_uuid=False), (UUID(int=10).hex,), str.upper, ("x", 5)),
    Sample(
        "Enum",
        lambda: types.Enum(Colour, name="colour"),
        (Colour.red, Colour.green, "green"),
        lambda c: Colour.red if c is Colour.green else Colour.green,
        ("blue", "r", 1),
    ),
    Sample(
        "Enum(native_enum=False)",
        lambda: types.Enum("small", "large", name="size", native_enum=False),
        ("small", "large"),
        lambda s: "small" if s == "large" else "large",
        ("medium",),
    ),
    Sample(
        "JSON",
        types.JSON,
        ({}, [1, (2, 3)], {"b": None, "a": {"deep": [1e16, 2**60]}}, "text", [2**70], 2.0, None),
        _more,
        ({9: 1}, float("nan"), {"at": date.min}, 2**20_000, "a\0"),
    ),
    Sample("JSON(none_as_null=True)", lambda: types.JSON(none_as_null=True), ({}, None, [None]), _more, ({1, 2},)),
    Sample(
        "JSONB",
        lambda: types.JSON().with_variant(postgresql.JSONB(), "postgresql"),
        ({}, {"bb": 1, "a": 1.5e300, "ä": [1e16, -1e17, 1e-7, 2.0]}, [True, None]),
        _more,
        ({None: 1}, [float("inf")]),
    ),
    Sample("TypeDecorator", Cents, (Decimal("0"), Decimal("1.50"), Decimal("2.999")), lambda n: n / 3, ("x",)),
    Sample(
        "ARRAY(Integer)",
        lambda: types.ARRAY(types.Integer),
        ([], [1, None, -3], (4, 5)),
        _longer,
        ([1.5], [[1], [2, 3]], "12"),
        both=False,
    ),
    Sample(
        "ARRAY(Text)",
        lambda: types.ARRAY(types.Text),
        ([], ["", "NULL", 'a"b\\', "{x,y}", None]),
        _longer,
        (["a\0"], [5]),
        both=False,
    ),
    Sample(
        "INET",
        postgresql.INET,
        ("10.0.0.1", ip_address("::1"), ip_interface("10.0.0.1/24"), "10.0.0.1/32"),
        lambda a: ip_address(int(ip_interface(str(a)).ip) + 1),
        ("x",),
        both=False,
    ),
)

UNSUPPORTED = {
    "LargeBinary": types.LargeBinary,
    "PickleType": types.PickleType,
    "Time(timezone=True)": lambda: types.Time(timezone=True),
    "TIMESTAMP(precision=3)": lambda: postgresql.TIMESTAMP(precision=3),
    "HSTORE": postgresql.HSTORE,
    "MACADDR": postgresql.MACADDR,
    "TSVECTOR": postgresql.TSVECTOR,
    "BIT": postgresql.BIT,
    "MONEY": postgresql.MONEY,
    "INT4RANGE": postgresql.INT4RANGE,
}
"""Types that Rows and Tallies refuse at start, on PostgreSQL at least."""


def shown(value: Any) -> Any:
    """Return a value in a form that compares types too: True is not 1 here, and 1.0 not 1."""
    if isinstance(value, dict):
        return [(key, shown(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [shown(item) for item in value]
    if isinstance(value, datetime) and value.tzinfo is not None:
        return "moment", value.astimezone(UTC).replace(tzinfo=None)
    return type(value).__name__, value if not isinstance(value, float | Decimal) else str(value)


__all__ = ["SAMPLES", "UNSUPPORTED", "Colour", "Sample", "shown"]
