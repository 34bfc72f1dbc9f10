"""Codecs for the types of single values: numbers, texts, moments."""

from __future__ import annotations

import math
import operator
import re
import struct
from collections.abc import Iterable
from datetime import UTC, date, datetime, time, timedelta
from decimal import ROUND_HALF_UP, Context, Decimal
from ipaddress import ip_interface, ip_network
from typing import Any
from uuid import UUID

from sqlalchemy.dialects import postgresql

from projections.codec import Codec, SqlType, Unsupported, checked_text, refuse

BINARY_COLLATIONS = {"binary", "c", "posix", "c.utf-8", "c.utf8", "ucs_basic", "default"}
"""Collations, in lower case, for which two texts are equal only if they are the same."""
_EXACT = Context(prec=2_000)
_SQLITE_DIGITS = 15
"""Decimal digits that SQLite keeps of a number: it stores a Numeric as a binary float."""
_SAFE_DAYS = 700_000
"""Days that can be counted from 1970 in both directions without leaving the years 1 to 9999."""
_WIDTH = re.compile(r"\((\d+)\)")


# numbers


def integer_codec(of: SqlType) -> Codec:
    """Whole numbers, within what the column holds."""
    bits = 64
    if of.postgres:
        bits = {"SMALLINT": 16, "BIGINT": 64}.get(of.spelt, 32)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def normalise(value: Any) -> int:
        try:
            number = operator.index(value)
        except TypeError:
            refuse(value, f"which is no whole number: {type(value).__name__}")
        if not low <= number <= high:
            refuse(value, f"which is outside the column's {bits} bits")
        return number

    def fits(values: Iterable[int]) -> bool:
        return bool(min(values) >= low and max(values) <= high)

    return Codec(frozenset({int}), normalise, of.spelt, fits=fits)


def boolean_codec(_of: SqlType) -> Codec:
    """True and False; 1 and 0 become them."""

    def normalise(value: Any) -> bool:
        if type(value) not in (bool, int) or value not in (0, 1):
            refuse(value, "which is neither True nor False")
        return bool(value)

    return Codec(frozenset({bool}), normalise, "boolean")


def float_codec(of: SqlType) -> Codec:
    """Floats; only a single-precision column rounds."""
    if of.impl.asdecimal:
        raise Unsupported("a Float that gives decimals is not exact; use Numeric, or Float without asdecimal")
    width = _WIDTH.search(of.spelt)
    single = of.postgres and (of.spelt == "REAL" or (width is not None and int(width[1]) <= 24))

    def normalise(value: Any) -> float:
        if not isinstance(value, int | float):
            refuse(value, f"which is no float: {type(value).__name__}")
        number = float(value)
        if not math.isfinite(number):
            refuse(value, "which is no number that every database keeps")
        if number != value:
            refuse(value, "which a float would round")
        return _rounded_to_single(number) if single else number + 0.0  # there is no negative zero in SQLite

    return Codec(frozenset(), normalise, "real" if single else "double precision", lossless=False)


def _rounded_to_single(number: float) -> float:
    try:
        (near,) = struct.unpack("f", struct.pack("f", number))
    except OverflowError:
        refuse(number, "which is outside the column's 32 bits")
    for digits in range(6, 10):
        shortest = float(f"{near:.{digits}g}")
        if struct.unpack("f", struct.pack("f", shortest))[0] == near:
            return shortest + 0.0
    return float(near) + 0.0


def decimal_scale(type_: Any) -> int:
    """Return the digits behind the point that SQLAlchemy gives a Numeric of SQLite."""
    if type_.decimal_return_scale is not None:
        return int(type_.decimal_return_scale)
    return 10 if type_.scale is None else int(type_.scale)


def numeric_codec(of: SqlType) -> Codec:
    """Decimals, rounded half away from zero to the scale of the column, as PostgreSQL does."""
    precision, scale = of.impl.precision, of.impl.scale
    if scale is None and of.postgres and precision is not None:
        scale = 0
    if scale is None and not of.postgres:
        scale = decimal_scale(of.impl)
    step = None if scale is None else Decimal(1).scaleb(-scale)
    back = Decimal if of.impl.asdecimal else float

    def normalise(value: Any) -> Any:
        if isinstance(value, float):
            value = Decimal(repr(value))
        elif type(value) is int:
            value = Decimal(value)
        if not isinstance(value, Decimal):
            refuse(value, f"which is no decimal: {type(value).__name__}")
        if not value.is_finite():
            refuse(value, "which is no number that every database keeps")
        number = value if step is None else value.quantize(step, ROUND_HALF_UP, _EXACT)
        _, digits, exponent = number.as_tuple()
        whole = len(digits) + int(exponent) if number else 0
        if precision is not None and whole > precision - (scale or 0):
            refuse(value, f"which has more digits than the column's {precision}")
        if not of.postgres and len("".join(map(str, digits)).strip("0")) > _SQLITE_DIGITS:
            refuse(value, f"of which SQLite would keep {_SQLITE_DIGITS} digits; store the smallest unit as an Integer")
        if not number:
            number = abs(number)
        return number if back is Decimal else float(number)

    def wire(value: Any) -> Any:
        return None if value is None else str(value) if of.postgres else float(value)

    return Codec(frozenset(), normalise, "numeric", wire, lossless=False)


# texts


def string_codec(of: SqlType) -> Codec:
    """Texts, as they are; CHAR is padded on PostgreSQL."""
    length = of.impl.length if of.postgres else None
    collation = getattr(of.impl, "collation", None)
    blind = of.spelt == "CITEXT" or (collation is not None and collation.lower() not in BINARY_COLLATIONS)
    padded = (of.impl.length or 1) if of.postgres and of.spelt.startswith("CHAR") else 0

    def normalise(value: Any) -> str:
        text = checked_text(value)
        if padded:
            text = text.rstrip(" ").ljust(padded)
        if length is not None and len(text) > length:
            refuse(value, f"which has {len(text)} characters, more than the column's {length}")
        return text

    def fits(values: Iterable[str]) -> bool:
        return max(map(len, values)) <= length  # type: ignore[operator]

    plain = frozenset() if padded else frozenset({str})
    return Codec(plain, normalise, "text", fits=fits if length else None, lossless=not padded, blind=blind)


def enum_codec(of: SqlType) -> Codec:
    """Members of an enumeration, or their names."""
    bind, result = of.impl.bind_processor(of.dialect), of.impl.result_processor(of.dialect, None)
    members, native = frozenset(of.impl.enums), of.postgres and of.impl.native_enum
    own = frozenset() if of.impl.enum_class is None else frozenset({of.impl.enum_class})

    def wire(value: Any) -> Any:
        return value if value is None or bind is None else bind(value)

    def normalise(value: Any) -> Any:
        try:
            stored = wire(value)
        except LookupError:
            stored = None
        if stored not in members:
            refuse(value, f"which is none of {', '.join(map(str, of.impl.enums))}")
        return result(stored) if result is not None else stored

    return Codec(own, normalise, of.spelt if native else "text", wire, lossless=False)


def uuid_codec(of: SqlType) -> Codec:
    """UUIDs."""
    bind = of.impl.bind_processor(of.dialect)

    def normalise(value: Any) -> Any:
        if of.impl.as_uuid:
            if not isinstance(value, UUID):
                refuse(value, f"which is no UUID: {type(value).__name__}")
            return value
        try:
            return str(UUID(value))
        except (ValueError, AttributeError, TypeError):
            refuse(value, "which is no UUID")

    def wire(value: Any) -> Any:
        return None if value is None else str(value) if of.postgres or bind is None else bind(value)

    return Codec(frozenset({UUID} if of.impl.as_uuid else ()), normalise, "uuid", wire, lossless=bool(of.impl.as_uuid))


def inet_codec(of: SqlType) -> Codec:
    """Network addresses, as psycopg returns them."""

    def normalise(value: Any) -> Any:
        try:
            if isinstance(of.impl, postgresql.CIDR):
                return ip_network(str(value))
            interface = ip_interface(str(value))
        except ValueError:
            refuse(value, "which is no network address")
        return interface.ip if interface.network.prefixlen == interface.max_prefixlen else interface

    return Codec(frozenset(), normalise, of.spelt, lambda value: None if value is None else str(value), lossless=False)


# moments


def date_codec(_of: SqlType) -> Codec:
    """Dates; a datetime is none."""

    def normalise(value: Any) -> date:
        if not isinstance(value, date) or isinstance(value, datetime):
            refuse(value, f"which is no date: {type(value).__name__}")
        return date(value.year, value.month, value.day)

    return Codec(frozenset({date}), normalise, "date")


def datetime_codec(of: SqlType) -> Codec:
    """Moments: with a zone as UTC, or without one."""
    if (width := _WIDTH.search(of.spelt)) and int(width[1]) < 6:
        raise Unsupported("it has fewer than six digits of a second, and would round; leave its precision away")
    zoned = of.impl.timezone
    bind = of.impl.bind_processor(of.dialect)

    def normalise(value: Any) -> datetime:
        if not isinstance(value, datetime):
            refuse(value, f"which is no datetime: {type(value).__name__}")
        aware = value.utcoffset() is not None
        if aware and not zoned:
            refuse(value, "which has a time zone, and the column has none; use DateTime(timezone=True)")
        if zoned and not aware:
            refuse(value, "which has no time zone, and the column has one; give it one, such as UTC")
        try:
            moment = value.astimezone(UTC) if zoned else value
        except OverflowError:
            refuse(value, "which is outside the years 1 to 9999 in UTC")
        if getattr(value, "nanosecond", 0):
            refuse(value, "which has nanoseconds; the database keeps microseconds")
        return moment if type(moment) is datetime else datetime.combine(moment.date(), moment.timetz())

    def wire(value: Any) -> Any:
        if value is None:
            return None
        return value.isoformat() if of.postgres or bind is None else bind(value.replace(tzinfo=None))

    def loaded(value: Any) -> Any:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)

    cast = "timestamp with time zone" if zoned else "timestamp without time zone"
    if zoned:
        return Codec(frozenset(), normalise, cast, wire, loaded=loaded, lossless=False)
    return Codec(frozenset({datetime}), normalise, cast, wire, fits=_all_naive)


def _all_naive(values: Iterable[Any]) -> bool:
    return not any(value.tzinfo for value in values)


def time_codec(of: SqlType) -> Codec:
    """Times of day, without a zone."""
    if of.impl.timezone:
        raise Unsupported("a time of day with a zone names no moment; use DateTime(timezone=True), or Time")
    if (width := _WIDTH.search(of.spelt)) and int(width[1]) < 6:
        raise Unsupported("it has fewer than six digits of a second, and would round; leave its precision away")
    bind = of.impl.bind_processor(of.dialect)

    def normalise(value: Any) -> time:
        if not isinstance(value, time):
            refuse(value, f"which is no time: {type(value).__name__}")
        if value.tzinfo is not None:
            refuse(value, "which has a time zone, and the column has none")
        return value

    def wire(value: Any) -> Any:
        return None if value is None else value.isoformat() if of.postgres or bind is None else bind(value)

    return Codec(frozenset({time}), normalise, "time without time zone", wire, fits=_all_naive)


def interval_codec(of: SqlType) -> Codec:
    """Lengths of time."""
    if of.spelt.startswith("INTERVAL") and of.spelt != "INTERVAL":
        raise Unsupported("it keeps a part of an interval only, and would round; leave precision and fields away")
    native = of.postgres and of.spelt == "INTERVAL"
    bind = None if native else of.impl.bind_processor(of.dialect)  # as a moment, counted from 1970

    def wire(value: Any) -> Any:
        if value is None:
            return None
        if bind is None:
            return f"{value.days} days {value.seconds}.{value.microseconds:06} seconds"
        moment = bind(value)
        return moment.isoformat() if isinstance(moment, datetime) else moment

    def normalise(value: Any) -> timedelta:
        if not isinstance(value, timedelta):
            refuse(value, f"which is no timedelta: {type(value).__name__}")
        try:
            wire(value)
        except OverflowError:
            refuse(value, "which is too long for this database")
        return timedelta(value.days, value.seconds, value.microseconds)

    def fits(values: Iterable[timedelta]) -> bool:
        return bind is None or all(abs(value.days) < _SAFE_DAYS for value in values)

    cast = "interval" if native else "timestamp without time zone"
    return Codec(frozenset({timedelta}), normalise, cast, wire, fits=fits)
