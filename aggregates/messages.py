"""Declaring events and commands: frozen dataclasses with a name on the wire."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, TypeVar, dataclass_transform, overload

import msgspec
import orjson

from aggregates.errors import InvalidMessage

T = TypeVar("T")
Kind = Literal["event", "command"]
_SPEC = "__eskernel_message__"


class MessageSpec(NamedTuple):
    """What the decorator recorded: the kind, the name on the wire and the schema version of the fields."""

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
        name: the event's type on the wire; the class name unless given. It is stored for ever.
        version: schema version of the fields, from 1. Raise it when the fields change and declare how an older
            one becomes a newer one with `upcasts`.

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
    """Declare a command: what somebody wants an aggregate to do, in the imperative.

    Args:
        name: the command's type on the wire; the class name unless given.
    """
    declared: type[T] | Callable[[type[T]], type[T]] = _message("command", cls, name, 1)
    return declared


def _message(kind: Kind, cls: type[T] | None, name: str | None, version: int) -> Any:
    def declare(target: type[T]) -> type[T]:
        declared = dataclass(frozen=True, slots=True)(target)
        setattr(declared, _SPEC, MessageSpec(kind, name or target.__name__, version))
        return declared

    return declare if cls is None else declare(cls)


def spec_of(cls: object) -> MessageSpec | None:
    """Return what `@event` or `@command` recorded on the class itself, or None for any other object."""
    found = cls.__dict__.get(_SPEC) if isinstance(cls, type) else None
    return found if isinstance(found, MessageSpec) else None


def wire_problems(cls: type) -> list[str]:
    """Return one sentence for each field whose type can't be carried as JSON."""
    problems = []
    try:
        for field in msgspec.inspect.type_info(cls).fields:  # type: ignore[attr-defined]
            if isinstance(field.type, msgspec.inspect.CustomType):
                problems.append(
                    f"{cls.__name__}.{field.name}: {field.type.cls.__name__} can't be carried as JSON; "
                    "use a built-in type, a dataclass, an Enum, or a date, time, Decimal or UUID"
                )
    except Exception as error:
        problems.append(f"{cls.__name__}: its fields can't be carried as JSON: {error}")
    return problems


def parse(cls: type[T], data: object) -> T:
    """Make a message from untrusted JSON data.

    Raises:
        InvalidMessage: a missing, unknown or wrongly typed field, named.
    """
    if not isinstance(data, dict):
        raise InvalidMessage(f"{cls.__name__}: expected an object of fields, got {type(data).__name__}")
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    if unknown := [key for key in data if key not in known]:
        raise InvalidMessage(
            f"{cls.__name__}: unknown field {unknown[0]!r}; it has {', '.join(sorted(known)) or 'no fields'}"
        )
    try:
        return msgspec.convert(data, cls)
    except msgspec.ValidationError as error:
        raise InvalidMessage(f"{cls.__name__}: {error}") from None


def plain(value: Any) -> Any:
    """Turn what JSON has no type for into what `parse` reads back: for `orjson.dumps(default=...)`."""
    if isinstance(value, set | frozenset):
        return list(value)
    return msgspec.to_builtins(value)


def dumps(value: object) -> bytes:
    """Return the value as JSON bytes; dataclasses, dates, UUIDs, enums and decimals included."""
    return orjson.dumps(value, default=plain)
