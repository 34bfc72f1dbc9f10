"""Makes the codec for a column type on a database, see `codec`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import orjson
from sqlalchemy import types
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import SQLAlchemyError

from projections import scalar_codecs as scalars
from projections.codec import Codec, Refused, SqlType, Unsupported, checked_text, refuse

_SAFE_FLOAT = 10**16
_MAX_BITS = 14_000


def codec_of(type_: types.TypeEngine[Any], dialect: Dialect) -> Codec:
    """Return the codec for a column type on a database.

    Raises:
        Unsupported: values of the type can't be carried to this database.
    """
    try:
        spelt = type_.compile(dialect=dialect)
    except SQLAlchemyError:
        raise Unsupported(f"{dialect.name} has no type {type(type_).__name__}") from None
    impl: Any = type_.dialect_impl(dialect)
    if isinstance(impl, types.TypeDecorator) and not isinstance(impl, types.Interval):
        return _decorated(impl, dialect)
    for kinds, make in _MAKERS:
        if isinstance(impl, kinds):
            return make(SqlType(impl, dialect, spelt, dialect.name == "postgresql"))
    raise Unsupported(
        f"values of type {type(type_).__name__} are not known to come back as they were; use another type, or an Sql "
        "projection"
    )


# values of several parts


def _json(of: SqlType) -> Codec:
    binary = of.postgres and isinstance(of.impl, postgresql.JSONB)

    def normalise(value: Any) -> Any:
        if not of.postgres and isinstance(value, int | float) and not isinstance(value, bool):
            return _sqlite_number(value)
        try:
            data = orjson.dumps(value)
        except (TypeError, ValueError):
            data = b""
        if data and b"\\u0000" not in data and not binary:
            read = orjson.loads(data)
            # equal means: no NaN that became null, no tuple, no class that JSON doesn't have
            if read == value and not _has_other_types(value):
                return read
        return _normal_json(value, "", binary)

    def wire(value: Any) -> Any:
        return None if value is None and of.impl.none_as_null else json.dumps(value, ensure_ascii=False)

    cast = "jsonb" if binary else "json"
    return Codec(frozenset(), normalise, cast, wire, lossless=False, nulls=True, hashable=False)


def _sqlite_number(value: float) -> float:
    """Return a number that is a whole document: the column's affinity makes a number of its text."""
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            refuse(value, "a number of more than 64 bits, alone in a JSON column of SQLite")
        return int(value)
    if not math.isfinite(value) or (value.is_integer() and abs(value) >= 2**50):
        refuse(value, "a number that SQLite would change, alone in a JSON column")
    return int(value) if value.is_integer() else float(value)


def _has_other_types(value: Any) -> bool:
    kind = type(value)
    if kind is dict:
        return any(map(_has_other_types, value.values()))
    if kind is list:
        return any(map(_has_other_types, value))
    return kind not in (str, int, float, bool, type(None))


def _normal_json(value: Any, where: str, binary: bool) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return checked_text(value)
    if isinstance(value, int):
        if value.bit_length() > _MAX_BITS:
            refuse(value, f"at {where or 'its top'}: Python reads no number of that many digits")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            refuse(value, f"at {where or 'its top'}: JSON has no such number")
        # PostgreSQL writes large numbers of JSONB without an exponent: they come back as whole numbers
        if binary and abs(value) >= _SAFE_FLOAT:
            return int(Decimal(repr(float(value))))
        return float(value) + 0.0 if binary else float(value)  # JSONB has no negative zero
    if isinstance(value, list | tuple):
        return [_normal_json(item, f"{where}[{place}]", binary) for place, item in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                refuse(key, f"a key at {where or 'its top'}: the keys of JSON objects are texts; use str()")
        keys = sorted(map(checked_text, value), key=_in_order_of_jsonb) if binary else map(checked_text, value)
        return {key: _normal_json(value[key], f"{where}[{key!r}]", binary) for key in keys}
    return refuse(value, f"at {where or 'its top'}: JSON has no {type(value).__name__}")


def _in_order_of_jsonb(key: str) -> tuple[int, bytes]:
    encoded = key.encode()
    return len(encoded), encoded


def _array(of: SqlType) -> Codec:
    item = codec_of(of.impl.item_type, of.dialect)
    if isinstance(of.impl.item_type.dialect_impl(of.dialect), types.JSON):
        raise Unsupported("an array of JSON can't be written as one value; use a JSON column that holds a list")
    back = tuple if of.impl.as_tuple else list

    def normalise(value: Any) -> Any:
        if not isinstance(value, list | tuple):
            refuse(value, f"which is no list: {type(value).__name__}")
        depth = _depth(value)
        if of.impl.dimensions is not None and depth not in (of.impl.dimensions, 0):
            refuse(value, f"which has not the column's {of.impl.dimensions} dimensions")
        return _normal_items(value, item, back)

    def wire(value: Any) -> Any:
        return None if value is None else _array_literal(value, item)

    return Codec(frozenset(), normalise, of.spelt, wire, lossless=False, hashable=False)


def _depth(value: Any) -> int:
    """Return how deep lists are nested; 0 for an empty one. Every level must be of the same length."""
    if not isinstance(value, list | tuple):
        return 0
    inner = {_depth(item) if isinstance(item, list | tuple) else None for item in value}
    lengths = {len(item) for item in value if isinstance(item, list | tuple)}
    if len(inner) > 1 or len(lengths) > 1 or 0 in lengths:
        refuse(value, "which is no array: its parts have different lengths, or none")
    if not value:
        return 0
    below = inner.pop()
    return 1 if below is None else 1 + below


def _normal_items(value: Any, item: Codec, back: Callable[[Any], Any]) -> Any:
    if isinstance(value, list | tuple):
        return back([_normal_items(part, item, back) for part in value])
    return value if value is None and not item.nulls else item.normalise(value)


def _array_literal(value: Any, item: Codec) -> str:
    if isinstance(value, list | tuple):
        return "{" + ",".join(_array_literal(part, item) for part in value) + "}"
    carried = value if item.wire is None else item.wire(value)
    if carried is None:
        return "NULL"
    text = carried if isinstance(carried, str) else orjson.dumps(carried).decode().strip('"')
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


# types of the app


def _decorated(impl: Any, dialect: Dialect) -> Codec:
    own, base = type(impl), types.TypeDecorator
    if own.bind_expression is not base.bind_expression or own.column_expression is not base.column_expression:
        raise Unsupported("its type adds SQL to each statement; convert the value in Python, or use an Sql projection")
    inner = codec_of(impl.impl_instance, dialect)
    kind = type(impl)
    binds = kind.process_bind_param is not types.TypeDecorator.process_bind_param
    returns = kind.process_result_value is not types.TypeDecorator.process_result_value

    def bind(value: Any) -> Any:
        return impl.process_bind_param(value, dialect) if binds else value

    def result(value: Any) -> Any:
        return impl.process_result_value(value, dialect) if returns else value

    def inner_normal(value: Any) -> Any:
        stored = bind(value)
        return stored if stored is None and not inner.nulls else inner.normalise(stored)

    def normalise(value: Any) -> Any:
        try:
            stored = inner_normal(value)
            normal = result(stored)
            # what comes back must stay what it is, however often it is written
            stable = normal is value or (again := inner_normal(normal)) == stored or result(again) == normal
        except Refused:
            raise
        except Exception as error:
            refuse(value, f"which {kind.__name__} can't convert: {type(error).__name__}: {error}")
        if not stable:
            refuse(value, f"which {kind.__name__} gives back as a value that it would store otherwise")
        return normal

    def wire(value: Any) -> Any:
        stored = bind(value)
        return stored if inner.wire is None else inner.wire(stored)

    def loaded(value: Any) -> Any:
        # SQLAlchemy has given the decorator what the inner codec would still have changed
        return normalise(value) if inner.loaded is not None else value

    return Codec(
        frozenset(),
        normalise,
        inner.cast,
        wire,
        loaded=loaded if inner.loaded is not None else None,
        lossless=False,
        nulls=True,
        hashable=inner.hashable,
        blind=inner.blind,
    )


_Maker = Callable[[SqlType], Codec]
_MAKERS: tuple[tuple[Any, _Maker], ...] = (
    (types.Boolean, scalars.boolean_codec),
    (types.Integer, scalars.integer_codec),
    (types.Float, scalars.float_codec),
    (types.Numeric, scalars.numeric_codec),
    (types.Enum, scalars.enum_codec),
    (types.String, scalars.string_codec),
    (types.Date, scalars.date_codec),
    (types.DateTime, scalars.datetime_codec),
    (types.Time, scalars.time_codec),
    ((types.Interval, postgresql.INTERVAL), scalars.interval_codec),
    (types.Uuid, scalars.uuid_codec),
    (types.JSON, _json),
    (types.ARRAY, _array),
    ((postgresql.INET, postgresql.CIDR), scalars.inet_codec),
)
