"""Declaring events and commands: frozen dataclasses with a name on the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar, dataclass_transform, overload

import msgspec
import orjson

from aggregates.aggregate import explain_dataclass
from aggregates.errors import DeclarationError, InvalidMessage

T = TypeVar("T")
Kind = Literal["event", "command"]
_SPEC = "__eskernel_message__"


class MessageSpec(NamedTuple):
    """The record that the decorator leaves on a class: kind, wire name, and schema version of the fields."""

    kind: Kind
    name: str
    version: int


@overload
def event(cls: type[T], /) -> type[T]: ...
@overload
def event(*, name: str | None = None, version: int = 1) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True)
def event(
    cls: type[T] | None = None, /, *, name: str | None = None, version: int = 1
) -> type[T] | Callable[[type[T]], type[T]]:
    """Declare an event: something that happened to an aggregate, in the past tense.

    Args:
        name: the event's type on the wire, by default the class name. Stored events keep it, so it must not change.
        version: schema version of the fields, from 1. Raise it when the fields change, and convert the fields of
            older versions with `upcasts`.

    Example:
        >>> @event
        ... class Deposited:
        ...     cents: int
    """
    declared: type[T] | Callable[[type[T]], type[T]] = _message("event", cls, name, version)
    return declared


@overload
def command(cls: type[T], /) -> type[T]: ...
@overload
def command(*, name: str | None = None) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True)
def command(cls: type[T] | None = None, /, *, name: str | None = None) -> type[T] | Callable[[type[T]], type[T]]:
    """Declare a command: a request to an aggregate, named in the imperative.

    Args:
        name: the command's type on the wire, by default the class name.
    """
    declared: type[T] | Callable[[type[T]], type[T]] = _message("command", cls, name, 1)
    return declared


def _message(kind: Kind, cls: type[T] | None, name: str | None, version: int) -> Any:
    def declare(target: type[T]) -> type[T]:
        try:
            declared = dataclass(frozen=True, slots=True)(target)
        except (TypeError, ValueError) as error:
            raise DeclarationError([f"{target.__name__}: {explain_dataclass(error)}"]) from None
        setattr(declared, _SPEC, MessageSpec(kind, name or target.__name__, version))
        return declared

    return declare if cls is None else declare(cls)


def spec_of(cls: object) -> MessageSpec | None:
    """Return the record that `@event` or `@command` left on the class itself, or None for any other object."""
    found = cls.__dict__.get(_SPEC) if isinstance(cls, type) else None
    return found if isinstance(found, MessageSpec) else None


def wire_problems(cls: type) -> list[str]:
    """Return one sentence for each field that can't be carried as JSON."""
    problems = []
    try:
        for field in msgspec.inspect.type_info(cls).fields:  # type: ignore[attr-defined]
            where = f"{cls.__name__}.{field.name}"
            if field.name.startswith("_"):
                problems.append(f"{where}: a field whose name begins with an underscore is not stored; rename it")
            for inner in _types_within(field.type):
                if isinstance(inner, msgspec.inspect.CustomType):
                    problems.append(
                        f"{where}: {inner.cls.__name__} can't be carried as JSON; use a built-in type, a dataclass, "
                        "an Enum, or a date, time, Decimal or UUID"
                    )
    except Exception as error:
        problems.append(f"{cls.__name__}: its fields can't be carried as JSON: {error}")
    return problems


def _types_within(info: Any, seen: frozenset[type] = frozenset()) -> Iterator[msgspec.inspect.Type]:
    """Yield a type and every type that it contains."""
    if isinstance(info, tuple | list):
        for item in info:
            yield from _types_within(item, seen)
    elif isinstance(info, msgspec.inspect.Field):
        yield from _types_within(info.type, seen)
    elif isinstance(info, msgspec.inspect.Type):
        yield info
        cls = getattr(info, "cls", None)
        if cls is None or cls not in seen:
            within = seen if cls is None else seen | {cls}
            for name in info.__struct_fields__:
                yield from _types_within(getattr(info, name), within)


@cache
def _field_names(cls: type) -> frozenset[str]:
    return frozenset(field.name for field in fields(cls))


def parse(cls: type[T], data: object) -> T:
    """Make a message from untrusted JSON data.

    Raises:
        InvalidMessage: a field is missing, unknown or of the wrong type; the message names it.
    """
    if not isinstance(data, dict):
        raise InvalidMessage(f"{cls.__name__}: expected an object of fields, got {type(data).__name__}")
    known = _field_names(cls)  # type: ignore[arg-type]
    if not known >= data.keys():
        unknown = next(key for key in data if key not in known)
        raise InvalidMessage(
            f"{cls.__name__}: unknown field {unknown!r}; it has {', '.join(sorted(known)) or 'no fields'}"
        )
    try:
        return msgspec.convert(data, cls, str_keys=True)
    except msgspec.ValidationError as error:
        raise InvalidMessage(f"{cls.__name__}: {error}") from None
    except Exception as error:  # the user's __post_init__ may raise anything
        raise InvalidMessage(f"{cls.__name__}: {type(error).__name__}: {error}") from error


def plain(value: Any) -> Any:
    """Convert a value without a JSON type into a form that `parse` reads back: for `orjson.dumps(default=...)`."""
    if isinstance(value, set | frozenset):
        return list(value)
    return msgspec.to_builtins(value)


def dumps(value: object) -> bytes:
    """Return the value as JSON bytes. It may contain dataclasses, dates, UUIDs, enums and decimals.

    Raises:
        TypeError: the value contains an object that JSON can't represent.
    """
    try:
        return orjson.dumps(value, default=plain)
    except TypeError:
        # allowing keys that are not text slows orjson down for every key: allow them only if the fast way has failed
        return orjson.dumps(value, default=plain, option=orjson.OPT_NON_STR_KEYS)
