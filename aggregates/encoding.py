"""Encoding an event: once, at its decision, and only if the same value can be read back from the bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from aggregates.errors import InvalidEvent
from aggregates.messages import dumps

_PLACE = re.compile(r" - at `(?:key in )?\$(?P<path>.*)`$")


class EncodedEvent(msgspec.Struct, gc=False):
    """An event as it is stored.

    Attributes:
        name: the event's wire name.
        version: schema version of its fields.
        data: the fields as JSON bytes: what is appended to the log.
        event: decoded from `data`: what is folded.
    """

    name: str
    version: int
    data: bytes
    event: Any


def encode_event(event: Any, name: str, version: int, decode: Callable[[bytes], Any]) -> EncodedEvent:
    """Encode an event, and read it back.

    Raises:
        InvalidEvent: the event can't be stored, can't be read back, or comes back as another value; the message names
            the field.
    """
    try:
        data = dumps(event)
    except Exception as error:  # a value of any kind: too deep, too large, of a class that JSON does not know
        raise InvalidEvent(f"{name} can't be stored: {error or type(error).__name__}") from None
    try:
        read = decode(data)
    except Exception as error:  # a __post_init__ of the app may raise anything
        found = _PLACE.search(str(error))
        where, why = (name + found["path"], str(error)[: found.start()]) if found else (name, str(error))
        raise InvalidEvent(f"{where} could not be read back: {why}") from None
    if read != event and (problem := difference(event, read, name)):
        raise InvalidEvent(problem)
    return EncodedEvent(name, version, data, read)


def difference(given: Any, read: Any, where: str) -> str:
    """Return where a value came back from JSON as another value, or nothing.

    A list for a tuple is the same value, and so is an offset for a time zone.
    """
    if isinstance(given, datetime) and isinstance(read, datetime):
        same = _instant(given) == _instant(read)
    elif is_dataclass(given) and type(given) is type(read):
        return _first(
            difference(getattr(given, field.name), getattr(read, field.name), f"{where}.{field.name}")
            for field in fields(given)
        )
    elif isinstance(given, Mapping) and isinstance(read, Mapping) and len(given) == len(read):
        return _first(
            difference(value, read[key], f"{where}[{key!r}]") if key in read else f"{where} loses the key {key!r}"
            for key, value in given.items()
        )
    elif _is_sequence(given) and _is_sequence(read) and len(given) == len(read):
        return _first(
            difference(value, other, f"{where}[{place}]")
            for place, (value, other) in enumerate(zip(given, read, strict=True))
        )
    elif isinstance(given, float) and read is None:
        return f"{where} is {given!r}, which JSON cannot represent"
    elif isinstance(given, Set) and isinstance(read, Set):
        same = set(given) == set(read)
    else:
        # a Decimal may be NaN, which equals nothing and comes back as it was
        same = bool(given == read) or (given != given and read != read)  # noqa: PLR0124
    return "" if same else f"{where} is {given!r}, and would be read back as {read!r}"


def _first(problems: Any) -> str:
    return next((problem for problem in problems if problem), "")


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def _instant(moment: datetime) -> datetime:
    # times in two zones are never equal where a clock is put back or forward, whatever the instant
    return moment if moment.utcoffset() is None else moment.astimezone(UTC)
