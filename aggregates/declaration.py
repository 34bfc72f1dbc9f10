"""Reads an aggregate class once, at start: the messages it handles, applies and upcasts, and all its problems."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Generic, TypeVar

import msgspec

from aggregates.aggregate import Aggregate, name_of, role_of
from aggregates.context import Context
from aggregates.encoding import EncodedEvent, encode_event
from aggregates.errors import DeclarationError, InvalidMessage, NewerEvent
from aggregates.messages import Kind, spec_of, wire_problems
from aggregates.upcasting import Fields, upcast_of

A = TypeVar("A", bound=Aggregate)
Method = Callable[..., Any]
AGGREGATE_NAME = re.compile(r"\w[\w-]{0,127}\Z")
"""An aggregate's name is a token of subjects, and a value in columns of the kernel's tables."""


@dataclass(slots=True)
class EventType:
    """An event class with its wire name, its schema version, and the upcasters from older versions."""

    cls: type
    name: str
    version: int
    upcasters: dict[int, Callable[[Fields], Fields]] = field(default_factory=dict)
    _decode: Callable[[msgspec.Raw], Any] | None = None

    def __post_init__(self) -> None:
        self._decode = msgspec.json.Decoder(self.cls).decode

    def encode(self, event: Any) -> EncodedEvent:
        """Return the event as it is stored, and as it is read back.

        Raises:
            InvalidEvent: it can't be stored, or not be read back as the same value; the message names the field.
        """
        return encode_event(event, self.name, self.version, self._decode)  # type: ignore[arg-type]

    def decode(self, data: msgspec.Raw, version: int) -> Any:
        """Return the event from its stored fields.

        Raises:
            NewerEvent: the version is newer than this program's.
            InvalidMessage: an upcaster is missing, or the fields don't fit.
        """
        try:
            if version == self.version:
                return self._decode(data)  # type: ignore[misc]
            return msgspec.convert(self._upcast(msgspec.json.decode(data), version), self.cls, str_keys=True)
        except InvalidMessage:
            raise
        except Exception as error:  # upcasters are the user's code, and stored bytes may be anything
            raise InvalidMessage(f"stored {self.name} version {version}: {type(error).__name__}: {error}") from error

    def _upcast(self, stored: Fields, version: int) -> Fields:
        if version > self.version:
            raise NewerEvent(
                f"stored {self.name} has schema version {version}, but this program is too old: it knows versions up "
                f"to {self.version}"
            )
        for step in range(version, self.version):
            if step not in self.upcasters:
                raise InvalidMessage(f"stored {self.name} has schema version {step}, and no upcaster starts from it")
            stored = self.upcasters[step](stored)
        return stored


@dataclass(slots=True)
class Handler:
    """A command handler: the function, and whether it takes a `Context`."""

    function: Method
    wants_context: bool


@dataclass(slots=True)
class AggregateType(Generic[A]):
    """An aggregate class as the kernel uses it. Made by `declare`.

    Attributes:
        name: the name in the log: in every subject, in the events' source, and in commands.
        handlers: by command class.
        commands: command classes by wire name.
        events: by wire name.
        event_types: by event class.
        appliers: by event class.
    """

    cls: type[A]
    name: str
    handlers: dict[type, Handler] = field(default_factory=dict)
    commands: dict[str, type] = field(default_factory=dict)
    events: dict[str, EventType] = field(default_factory=dict)
    event_types: dict[type, EventType] = field(default_factory=dict)
    appliers: dict[type, Method] = field(default_factory=dict)

    def stored_event(self, name: str) -> EventType:
        """Return the event of this wire name.

        Raises:
            NewerEvent: there is none.
        """
        known = self.events.get(name)
        if known is None:
            raise NewerEvent(
                f"{self.name} has no event named {name!r}: a newer program has appended it, or its class was renamed "
                f"without @event(name={name!r})"
            )
        return known


def annotated(function: Method, *, skip: int, problems: list[str], where: str) -> tuple[list[Any], Any] | None:
    """Return the resolved annotations of the parameters after the first `skip`, and of the result."""
    try:
        hints = typing.get_type_hints(function)
    except Exception as error:
        problems.append(f"{where}: its annotations can't be resolved ({error}); define or import what they name")
        return None
    names = list(inspect.signature(function).parameters)[skip:]
    if missing := [name for name in names if name not in hints]:
        problems.append(f"{where}: parameter {missing[0]!r} has no annotation; annotate it with its class")
        return None
    return [hints[name] for name in names], hints.get("return", MISSING)


def message_classes(annotation: Any, kind: Kind) -> Iterator[type]:
    """Yield the event (or command) classes named anywhere in an annotation: unions, lists, iterators."""
    spec = spec_of(annotation)
    if spec is not None and spec.kind == kind:
        yield annotation
    for inner in typing.get_args(annotation):
        yield from message_classes(inner, kind)


def declare(cls: type[A]) -> AggregateType[A]:
    """Read the class.

    Raises:
        DeclarationError: the class has problems; the error lists all of them.
    """
    if not (isinstance(cls, type) and issubclass(cls, Aggregate)):
        raise DeclarationError([f"{cls!r} is not an aggregate; derive the class from aggregates.Aggregate"])
    problems: list[str] = []
    declared: AggregateType[A] = AggregateType(cls, _checked_name(cls, problems))
    emitted: dict[type, str] = {}
    upcasters = []
    _check_state(cls, problems)
    for name, member in inspect.getmembers_static(cls):
        where = f"{cls.__name__}.{name}"
        if (upcast := upcast_of(member)) is not None:
            upcasters.append((where, upcast))
        elif role_of(member) in ("handles", "applies") and inspect.iscoroutinefunction(member):
            problems.append(f"{where}: it can't be async; make it an ordinary method")
        elif role_of(member) == "handles":
            _add_handler(declared, where, member, emitted, problems)
        elif role_of(member) == "applies":
            _add_applier(declared, where, member, problems)
    for event_class, where in emitted.items():
        if event_class not in declared.appliers:
            problems.append(
                f"{where} returns {event_class.__name__}, but no method of {cls.__name__} applies it; "
                f"add a method with @applies for it"
            )
    for where, upcast in upcasters:
        spec = spec_of(upcast.event)
        if spec is None or spec.name not in declared.events:
            problems.append(f"{where}: upcasts {upcast.event.__name__}, which {cls.__name__} does not apply")
        elif not 1 <= upcast.version < spec.version:
            problems.append(
                f"{where}: upcasts version {upcast.version} of {spec.name}, whose version is {spec.version}; "
                "an upcaster starts from an older version"
            )
        else:
            declared.events[spec.name].upcasters[upcast.version] = upcast.function
    for event_type in declared.events.values():
        if missing := [v for v in range(1, event_type.version) if v not in event_type.upcasters]:
            problems.append(
                f"{event_type.cls.__name__} has version {event_type.version}, but {cls.__name__} has no upcaster "
                f"from version {missing[0]}; add a static method with @upcasts({event_type.cls.__name__}, "
                f"version={missing[0]})"
            )
    if not declared.appliers and not problems:
        problems.append(f"{cls.__name__} applies no event; mark the methods that fold events with @applies")
    if problems:
        raise DeclarationError(problems)
    return declared


def _checked_name(cls: type[Aggregate], problems: list[str]) -> str:
    name = name_of(cls)
    if problem := name_problem(name):
        problems.append(f"{cls.__name__}: name={name!r} {problem}")
        return cls.__name__
    return name


def name_problem(name: object) -> str:
    """Return why this can't be an aggregate's name, and what to do; an empty text if it can."""
    if not isinstance(name, str):
        return "is not a text; give the name as it is in the log"
    if not AGGREGATE_NAME.match(name):
        return "can't be part of a subject; use letters, digits, '_' and '-', at most 128 characters"
    return ""


def _check_state(cls: type[Aggregate], problems: list[str]) -> None:
    for state in fields(cls):
        if state.name != "id" and state.default is MISSING and state.default_factory is MISSING:
            problems.append(
                f"{cls.__name__}.{state.name} has no default; give it the value that it has before the first event"
            )


def _add_handler(
    declared: AggregateType[Any], where: str, member: Method, emitted: dict[type, str], problems: list[str]
) -> None:
    hints = annotated(member, skip=1, problems=problems, where=where)
    if hints is None:
        return
    parameters, result = hints
    command_spec = spec_of(parameters[0]) if parameters else None
    if command_spec is None or command_spec.kind != "command":
        problems.append(f"{where}: a handler's first parameter must be annotated with one class marked @command")
        return
    if len(parameters) > 2 or (len(parameters) == 2 and parameters[1] is not Context):
        problems.append(f"{where}: after the command a handler takes nothing, or one parameter annotated Context")
        return
    command_class = parameters[0]
    if command_class in declared.handlers or command_spec.name in declared.commands:
        problems.append(f"{where}: {declared.name} already has a handler for {command_spec.name}; keep one")
        return
    problems.extend(wire_problems(command_class))
    returned = list(message_classes(result, "event"))
    if result is MISSING or (not returned and result not in (None, type(None))):
        problems.append(f"{where}: annotate the result with the events it returns, such as `-> Deposited | None`")
    for event_class in returned:
        emitted.setdefault(event_class, where)
    declared.handlers[command_class] = Handler(member, len(parameters) == 2)
    declared.commands[command_spec.name] = command_class


def _add_applier(declared: AggregateType[Any], where: str, member: Method, problems: list[str]) -> None:
    hints = annotated(member, skip=1, problems=problems, where=where)
    if hints is None:
        return
    parameters, _ = hints
    alternatives = list(typing.get_args(parameters[0])) if parameters and _is_union(parameters[0]) else parameters[:1]
    specs = [spec_of(alternative) for alternative in alternatives]
    if len(parameters) != 1 or not specs or any(spec is None or spec.kind != "event" for spec in specs):
        problems.append(f"{where}: an applier takes one parameter, annotated with a class marked @event")
        return
    for event_class, spec in zip(alternatives, specs, strict=True):
        assert spec is not None
        if event_class in declared.appliers:
            problems.append(f"{where}: {declared.name} already applies {event_class.__name__}; keep one applier")
        elif spec.name in declared.events:
            problems.append(f"{where}: {declared.name} has two events named {spec.name!r}; give one event another name")
        elif bad := wire_problems(event_class):
            problems.extend(bad)
        else:
            declared.appliers[event_class] = member
            event_type = EventType(event_class, spec.name, spec.version)
            declared.events[spec.name] = declared.event_types[event_class] = event_type


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)
