"""The codecs of a model's columns on one database: records are made with them, and written with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from operator import attrgetter
from typing import Any
from uuid import UUID

import orjson
from sqlalchemy import Column, types
from sqlalchemy.engine import Dialect

from projections.codec import Codec, Refused, Unsupported
from projections.codecs import codec_of
from projections.records import Columns, default_maker

Row = Sequence[Any]
"""What carries a record to the database, by column."""
_NONE = type(None)
_SHARED = (str, int, float, Decimal, date, time, timedelta, Enum, UUID)
"""Types whose values can't be changed, so that rows may share one."""


class RowCodec:
    """How the records of one model are carried into a table, and come back.

    Args:
        columns: the model's columns.
        model: its name, for messages.
        counting: the columns beside the key are counters, which begin at 0.
        keyed: a row's key is not the id of an aggregate.

    Attributes:
        codecs: by column, in the order of `columns`.
        settle: brings a record to its normal form after an event, or None if an event can't take it from there. It
            raises `Refused`.

    Raises:
        Unsupported: a column can't be carried; the message names it.
    """

    def __init__(self, columns: Columns, model: str, dialect: Dialect, counting: bool, keyed: bool = False) -> None:
        self.columns, self.model, self.counting, self.keyed = columns, model, counting, keyed
        self.dialect = dialect
        problems = row_problems(columns, model, dialect, counting, keyed)
        if problems:
            raise Unsupported("; ".join(problems))
        self.codecs = [codec_of(column.type, dialect) for column in columns.columns]
        self._nullable = [bool(column.nullable) and not counting for column in columns.columns]
        self.settle = self._settler()
        self._get = _attributes(columns.names)
        self._from_id, self._to_id = _id_conversion(columns.columns[0])
        key_type = columns.columns[0].type
        # a key of one text is its own text; any other is written as a list in JSON
        self._textual = (
            columns.keys == 1 and isinstance(key_type, types.String) and not isinstance(key_type, types.Enum)
        )
        # a mapper takes any name for an attribute, but only an identifier can be a slot
        slots = {"__slots__": tuple(columns.names)} if all(map(str.isidentifier, columns.names)) else {}
        self.record: type = type(f"{columns.table.name}_record", (), slots)
        self.new: Callable[..., Any] = self._maker()

    def _settler(self) -> Callable[[Any], None] | None:
        lossy = [
            (name, codec.plain, codec.nulls, codec.normalise)
            for name, codec in zip(self.columns.names, self.codecs, strict=True)
            if not codec.lossless
        ]
        if not lossy:
            return None
        model = self.model

        def settle(record: Any) -> None:
            for name, plain, nulls, normalise in lossy:
                value = getattr(record, name)
                if type(value) in plain or (value is None and not nulls):
                    continue
                try:
                    normal = normalise(value)
                except Refused as refused:
                    raise Refused(f"{model}.{name} {refused}") from None
                if normal is not value:
                    setattr(record, name, normal)

        return settle

    def _maker(self) -> Callable[..., Any]:
        names, keys, record, model = tuple(self.columns.names), self.columns.keys, self.record, self.model
        rest = names[keys:]
        first_values = {name: self._first_value(place) for place, name in enumerate(rest, keys)}
        shared = [(name, value) for name, (value, first) in first_values.items() if first is None]
        made_anew = [(name, first) for name, (_, first) in first_values.items() if first is not None]
        new: Callable[[type], Any] = object.__new__

        def make(*key: Any) -> Any:
            if len(key) != keys:
                raise TypeError(f"the key of {model} is ({', '.join(names[:keys])}), and {key!r} is not")
            made = new(record)
            for name, value in zip(names, key, strict=False):
                setattr(made, name, value)
            for name, value in shared:
                setattr(made, name, value)
            for name, first in made_anew:
                setattr(made, name, first())
            return made

        return make

    def _first_value(self, place: int) -> tuple[Any, Callable[[], Any] | None]:
        """Return the value of a column that all new records share, or what makes one for each."""
        if self.counting:
            return 0, None
        first, normalise = default_maker(self.columns.columns[place]), self.codecs[place].normalise
        value = first()
        if value is None:
            return None, None
        if value.__hash__ is not None:
            try:
                normal = normalise(value)
            except Refused:
                return None, first  # it is refused with the row, unless a handler sets another value
            return (normal, None) if isinstance(normal, _SHARED) else (None, lambda: normalise(first()))
        return None, first

    def stored(self, values: Sequence[Any]) -> Any:
        """Return the record of a stored row, from what a SELECT gave."""
        made: Any = object.__new__(self.record)
        for name, codec, value in zip(self.columns.names, self.codecs, values, strict=True):
            setattr(made, name, value if codec.loaded is None else codec.loaded(value))
        return made

    def new_for(self, aggregate_id: str) -> Any:
        """Return the new record of an aggregate.

        Raises:
            Refused: the aggregate's id can't be the key of the table.
        """
        return self.new(aggregate_id if self._from_id is None else self._from_id(aggregate_id))

    def key_of(self, key: Any) -> tuple[str, tuple[Any, ...]]:
        """Return a row's own key as a text, and by column in normal form. It raises `Refused`."""
        values = key if isinstance(key, tuple) else (key,)
        names = self.columns.names[: self.columns.keys]
        if len(values) != len(names):
            raise Refused(f"the key of {self.model} is ({', '.join(names)}), and {key!r} is not")
        normal = []
        for name, codec, value in zip(names, self.codecs, values, strict=False):
            try:
                own = codec.normalise(value)
                if codec.fits is not None and type(own) in codec.plain and not codec.fits((own,)):
                    raise Refused(f"is {own!r}, which the column can't hold")
            except Refused as refused:
                raise Refused(f"{self.model}.{name} {refused}") from None
            normal.append(own)
        return self._key_text(normal), tuple(normal)

    def _key_text(self, normal: Sequence[Any]) -> str:
        wires = [
            value if codec.wire is None else codec.wire(value)
            for codec, value in zip(self.codecs, normal, strict=False)
        ]
        return str(wires[0]) if self._textual else orjson.dumps(wires).decode()

    def key_wires(self, text: str) -> list[Any]:
        """Return what carries a row's own key, given as a text, to the database, by column."""
        return [text] if self._textual else list(orjson.loads(text))

    def key_wire(self, aggregate_id: str) -> Any:
        """Return what carries an aggregate's key to the database. It raises `Refused`."""
        key = aggregate_id if self._from_id is None else self._from_id(aggregate_id)
        codec = self.codecs[0]
        normal = codec.normalise(key)
        return normal if codec.wire is None else codec.wire(normal)

    def id_of(self, record: Any) -> str:
        """Return the id of the aggregate that a stored record is of, or its own key as a text."""
        if self.keyed:
            return self._key_text([getattr(record, name) for name in self.columns.names[: self.columns.keys]])
        return self._to_id(getattr(record, self.columns.names[0], None))

    def total(self, records: Sequence[Any]) -> Any:
        """Return a new record with the first one's key, and the sums of the counters."""
        names, keys = self.columns.names, self.columns.keys
        made = self.new(*(getattr(records[0], name) for name in names[:keys]))
        for name in names[keys:]:
            setattr(made, name, sum(getattr(record, name) for record in records))
        return made

    def ids_of(self, records: Iterable[Any]) -> list[str]:
        """Return the ids of the aggregates that records are of, or their own keys as texts."""
        if self.keyed:
            return list(map(self.id_of, records))
        keys = map(attrgetter(self.columns.names[0]), records)
        return list(keys if self._from_id is None else map(self._to_id, keys))

    def carry(self, records: Iterable[Any]) -> tuple[list[Row], dict[int, str]]:
        """Bring records to their normal forms and return what carries them to the database.

        Returns:
            the rows; and by place the records that are refused, and why. Those have no row.
        """
        listed = list(records)
        refused: dict[int, str] = {}
        if not listed:
            return [], refused
        try:
            rows: list[Row] = list(map(self._get, listed))
        except AttributeError:  # a handler has deleted an attribute
            return self._carry_singly(listed)
        columns: list[Sequence[Any]] = list(zip(*rows, strict=True))
        as_they_are = True
        for place, (codec, values) in enumerate(zip(self.codecs, columns, strict=True)):
            if not self._fits(codec, values, self._nullable[place]):
                columns[place] = self._normalised(place, codec, values, listed, refused)
            elif codec.wire is not None:
                columns[place] = list(map(codec.wire, values))
            else:
                continue
            as_they_are = False
        if not as_they_are:
            rows = list(zip(*columns, strict=True))
        if refused:
            rows = [row for place, row in enumerate(rows) if place not in refused]
        return rows, refused

    def _carry_singly(self, listed: list[Any]) -> tuple[list[Row], dict[int, str]]:
        refused = {}
        for row, record in enumerate(listed):
            for name in self.columns.names:
                if not hasattr(record, name):
                    refused[row] = f"{self.model}.{name} was deleted; set it to None instead"
        kept = [record for row, record in enumerate(listed) if row not in refused]
        places = [row for row in range(len(listed)) if row not in refused]
        rows, more = self.carry(kept)
        return rows, {**refused, **{places[row]: why for row, why in more.items()}}

    def _fits(self, codec: Codec, values: Sequence[Any], nullable: bool) -> bool:
        kinds = set(map(type, values))
        if _NONE in kinds:
            if not nullable or codec.nulls:
                return False
            kinds.discard(_NONE)
            values = [value for value in values if value is not None]
        if not kinds <= codec.plain:
            return False
        if kinds == {str} and not _is_storable("".join(values)):
            return False
        return not values or codec.fits is None or codec.fits(values)

    def _normalised(
        self, place: int, codec: Codec, values: Sequence[Any], records: list[Any], refused: dict[int, str]
    ) -> list[Any]:
        name, nullable, wire = self.columns.names[place], self._nullable[place], codec.wire
        carried = []
        for row, value in enumerate(values):
            normal = value
            try:
                if value is not None or codec.nulls:
                    normal = codec.normalise(value)
                    if self.counting and place >= self.columns.keys and normal != value:
                        raise Refused(f"is {value!r}, which the column would round, and a sum of such is not exact")
                    if codec.fits is not None and type(normal) in codec.plain and not codec.fits((normal,)):
                        raise Refused(f"is {normal!r}, which the column can't hold")
                if normal is None and not nullable and (wire is None or wire(None) is None):
                    raise Refused("is None, and the column is not nullable")
                if normal is not value:
                    setattr(records[row], name, normal)
                carried.append(normal if wire is None else wire(normal))
            except Exception as why:  # of the app's own type, or of a number beyond all bounds
                told = why if isinstance(why, Refused) else f"can't be carried: {type(why).__name__}: {why}"
                refused[row] = f"{self.model}.{name} {told}"
                carried.append(None)
        return carried


def _attributes(names: Sequence[str]) -> Callable[[Any], Row]:
    get = attrgetter(*names)
    return get if len(names) > 1 else lambda record: (get(record),)


def _is_storable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def row_problems(columns: Columns, model: str, dialect: Dialect, counting: bool, keyed: bool = False) -> list[str]:
    """Return one sentence for each column that can't be carried to a database."""
    found = []
    for place, (name, column) in enumerate(zip(columns.names, columns.columns, strict=True)):
        where = f"{model}.{name} ({type(column.type).__name__})"
        try:
            codec = codec_of(column.type, dialect)
        except Unsupported as why:
            found.append(f"{where}: {why}")
            continue
        if place >= columns.keys:
            continue
        if not codec.hashable:
            found.append(f"{where}: a value of several parts can't be a key")
        elif codec.blind:
            found.append(f"{where}: its collation takes different keys for the same; leave it away for a key")
        elif keyed and not _can_be_key(column, codec):
            found.append(
                f"{where}: two values of this type may be the same key in different forms; a key of Rows has the types "
                "String, Text, Integer, Uuid, Date, DateTime, Boolean or Enum"
            )
        elif not counting and not keyed and not _can_be_id(column, codec):
            found.append(
                f"{where}: the key of Rows is the aggregate's id, a text; give it the type String or Text, or Integer "
                "or Uuid if all ids are such"
            )
    return found


def _can_be_key(column: Column[Any], codec: Codec) -> bool:
    padded = isinstance(column.type, types.String) and not isinstance(column.type, types.Enum) and not codec.lossless
    return isinstance(column.type, _KEYS) and not padded


_KEYS = (types.String, types.Integer, types.Uuid, types.Date, types.DateTime, types.Boolean)
"""Types whose values have one form each; Enum is among them as a String."""


def _can_be_id(column: Column[Any], codec: Codec) -> bool:
    kind = column.type
    if isinstance(kind, types.Enum | types.TypeDecorator):
        return False
    return codec.lossless and isinstance(kind, types.String | types.Integer | types.Uuid)


def _id_conversion(column: Column[Any]) -> tuple[Callable[[str], Any] | None, Callable[[Any], str]]:
    if isinstance(column.type, types.Integer):
        kind: type = int
    elif isinstance(column.type, types.Uuid):
        kind = UUID
    else:
        return None, str

    def from_id(aggregate_id: str) -> Any:
        try:
            key = kind(aggregate_id)
        except ValueError:
            key = None
        if str(key) != aggregate_id:
            raise Refused(f"{column.name} can't be {aggregate_id!r}: that is no {kind.__name__} in its usual form")
        return key

    return from_id, str
