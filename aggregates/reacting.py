"""Reads a policy's (or an effect's) class once, at start, and says what a policy owes for an event."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any

from aggregates.aggregate import Aggregate, role_of
from aggregates.declaration import AggregateType, EventType, annotated
from aggregates.errors import DeclarationError, InvalidMessage
from aggregates.messages import spec_of
from aggregates.meta import Meta
from aggregates.policies import After, At, Cancel, Policy, Reacting, Reactions, Refusal, Send

_NAME = re.compile(r"[^\W\d][\w.-]{0,127}\Z")
MAX_REACTIONS = 10_000
"""Reactions to one event at most: a handler that never ends is noticed."""


@dataclass(frozen=True, slots=True)
class EventReaction:
    """A handler function for one event of one aggregate type."""

    function: Callable[..., Any]
    event: EventType
    wants_meta: bool


@dataclass(frozen=True, slots=True)
class Due:
    """A command that a policy owes.

    Attributes:
        place: where it stands among what the policy owes for the event.
        send: the command.
        moment: when it is to be sent; None for at once.
        key: of its timer; empty if it has none.
    """

    place: str
    send: Send
    moment: datetime | None = None
    key: str = ""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A timer that a policy ends."""

    key: str


Owed = Due | Cancelled


@dataclass(slots=True)
class DeclaredReaction:
    """A policy or an effect as the kernel uses it. Made by `declare_reaction`.

    Attributes:
        instance: an object of the class.
        handlers: for each aggregate type, by the event's wire name.
        types: the aggregate types whose events it reacts to.
    """

    name: str
    start: str
    instance: Reacting
    types: dict[str, AggregateType[Any]]
    handlers: dict[str, dict[str, EventReaction]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`policy` or `effect`."""
        return "policy" if isinstance(self.instance, Policy) else "effect"

    def owed(self, handler: EventReaction, event: Any, meta: Meta) -> list[Owed]:
        """Return what a policy owes for an event, in order.

        Raises:
            InvalidMessage: the handler returned something else.
            Exception: whatever the handler raised.
        """
        arguments = (event, meta) if handler.wants_meta else (event,)
        return _place(handler.function(self.instance, *arguments), meta, "", f"{self.name}.{handler.function.__name__}")

    def owed_after(self, due: Due, reason: str, meta: Meta) -> list[Owed]:
        """Return what a policy owes when one of its commands was rejected, in order; see `owed`."""
        assert isinstance(self.instance, Policy)
        refusal = Refusal(due.send, reason, meta)
        return _place(self.instance.on_rejected(refusal), meta, f"{due.place}.", f"{self.name}.on_rejected")


def _place(returned: Reactions, meta: Meta, prefix: str, where: str) -> list[Owed]:
    if returned is None:
        return []
    found = [returned] if isinstance(returned, Send | After | At | Cancel) else returned
    if not isinstance(found, Iterable):
        raise InvalidMessage(f"{where} returned {found!r}, which is no Send, After, At or Cancel")
    owed: list[Owed] = []
    for number, reaction in enumerate(found):
        place = f"{prefix}{number}"
        if number >= MAX_REACTIONS:
            raise InvalidMessage(f"{where} returned more than {MAX_REACTIONS:,} reactions to one event")
        if isinstance(reaction, Send):
            owed.append(Due(place, _checked(reaction, where)))
        elif isinstance(reaction, After):
            owed.append(Due(place, _checked(reaction.send, where), meta.time + _delay(reaction, where), reaction.key))
        elif isinstance(reaction, At):
            owed.append(Due(place, _checked(reaction.send, where), _moment(reaction, where), reaction.key))
        elif isinstance(reaction, Cancel):
            owed.append(Cancelled(reaction.key))
        else:
            raise InvalidMessage(f"{where} returned {reaction!r}, which is no Send, After, At or Cancel")
    return owed


def _checked(send: object, where: str) -> Send:
    if not isinstance(send, Send):
        raise InvalidMessage(f"{where}: {send!r} is not what a timer sends; write Send(Aggregate, id, command)")
    aggregate: object = send.aggregate
    if not isinstance(aggregate, type) or not issubclass(aggregate, Aggregate):
        raise InvalidMessage(f"{where} sends to {aggregate!r}, which is not the class of an aggregate")
    if not isinstance(send.id, str):
        raise InvalidMessage(f"{where} sends to the id {send.id!r}, which is not a text")
    spec = spec_of(type(send.command))
    if spec is None or spec.kind != "command":
        raise InvalidMessage(f"{where} sends {send.command!r}, which is not a command; mark its class with @command")
    return send


def _delay(after: After, where: str) -> timedelta:
    if not isinstance(after.delay, timedelta):
        raise InvalidMessage(f"{where}: After({after.delay!r}) is not a timedelta")
    return after.delay


def _moment(at: At, where: str) -> datetime:
    if not isinstance(at.moment, datetime) or at.moment.utcoffset() is None:
        raise InvalidMessage(f"{where}: At({at.moment!r}) is not a datetime with a time zone")
    return at.moment.astimezone(UTC)


def derive_command_id(event_id: str, reaction: str, place: str, moment: datetime | None = None) -> str:
    """Return the id of a command that a policy owes: always the same for the same event, policy and place.

    It is a UUID of version 8 (RFC 9562). Its first 48 bits are the milliseconds of the event or of the timer, so that
    ids grow with time as those of other commands do.
    """
    digest = blake2b(f"{event_id}\n{reaction}\n{place}".encode(), digest_size=10).hexdigest()
    if moment is not None:
        millis = f"{max(0, int(moment.timestamp() * 1000)):012x}"
        prefix = f"{millis[:8]}-{millis[8:12]}"
    elif len(event_id) == 36:
        prefix = event_id[:13]
    else:  # an event of another program, with an id of its own kind
        prefix = "00000000-0000"
    return f"{prefix}-8{digest[:3]}-8{digest[3:6]}-{digest[6:18]}"


def declare_reaction(
    given: type[Reacting] | Reacting, base: type[Reacting], types: Mapping[str, AggregateType[Any]]
) -> DeclaredReaction:
    """Read the class.

    Args:
        given: the class, or an object of it.
        base: `Policy` or `Effect`.
        types: the app's aggregates, by name.

    Raises:
        DeclarationError: the class has problems; the error lists all of them.
    """
    cls = given if isinstance(given, type) else type(given)
    if not (isinstance(cls, type) and issubclass(cls, base)) or cls is base:
        raise DeclarationError([f"{given!r} is not one; list classes that derive from {base.__name__}"])
    problems: list[str] = []
    of = _aggregates(cls, types, problems)
    name, start = getattr(cls, "name", cls.__name__), getattr(cls, "start", "now")
    if not isinstance(name, str) or not _NAME.match(name):
        problems.append(
            f"{cls.__name__}: name={name!r} can't be its name: use a letter or '_', then letters, digits, '_', '-' or "
            "'.', at most 128 characters"
        )
    if start not in ("now", "beginning"):
        problems.append(f'{cls.__name__}: start={start!r}; give "now" or "beginning"')
    if problems:
        raise DeclarationError(problems)
    declared = DeclaredReaction(name, start, _instance(given, cls), of)
    for method, member in inspect.getmembers_static(cls):
        if role_of(member) is not None:
            _add(declared, f"{cls.__name__}.{method}", member, base is not Policy, problems)
    silent = [name for name in of if not declared.handlers.get(name)]
    if silent and not problems:
        problems.append(
            f"{cls.__name__} reacts to no event of {silent[0]}; mark a method with @reacts for one, or leave "
            f"{silent[0]} out of of="
        )
    if problems:
        raise DeclarationError(problems)
    return declared


def _instance(given: type[Reacting] | Reacting, cls: type[Reacting]) -> Reacting:
    if not isinstance(given, type):
        return given
    try:
        return cls()
    except TypeError as error:
        raise DeclarationError([f"{cls.__name__}() can't be made ({error}); give the app an object of it"]) from None


def _aggregates(
    cls: type[Reacting], types: Mapping[str, AggregateType[Any]], problems: list[str]
) -> dict[str, AggregateType[Any]]:
    of: Any = getattr(cls, "of", None)
    listed = of if isinstance(of, tuple) else (of,)
    if of is None or not listed:
        problems.append(f"{cls.__name__}: say whose events it reacts to, with `of=SomeAggregate` in the class line")
        return {}
    found = {}
    for each in listed:
        known = next((declared for declared in types.values() if declared.cls is each), None)
        if not (isinstance(each, type) and issubclass(each, Aggregate)):
            problems.append(f"{cls.__name__}: of={each!r} is not an aggregate; give a class, or a tuple of classes")
        elif known is None:
            problems.append(f"{cls.__name__} is of {each.__name__}, which is not among the app's aggregates")
        else:
            found[known.name] = known
    return found


def _add(declared: DeclaredReaction, where: str, member: Any, is_async: bool, problems: list[str]) -> None:
    role = role_of(member)
    if role != "reacts":
        problems.append(f"{where}: mark it with @reacts; @{role} is for aggregates and projections")
        return
    if inspect.iscoroutinefunction(member) != is_async:
        wrong = "is not async; an effect waits for the world outside: write `async def`"
        pure = "can't be async; a policy only returns what shall be done"
        problems.append(f"{where} {wrong if is_async else pure}")
        return
    hints = annotated(member, skip=1, problems=problems, where=where)
    if hints is None:
        return
    parameters, _ = hints
    classes = list(typing.get_args(parameters[0]) or parameters[:1]) if parameters else []
    specs = [spec_of(cls) for cls in classes]
    if not specs or any(spec is None or spec.kind != "event" for spec in specs):
        problems.append(f"{where}: its first parameter must be annotated with a class marked @event")
        return
    if len(parameters) > 2 or (len(parameters) == 2 and parameters[1] is not Meta):
        problems.append(f"{where}: after the event it takes nothing, or one parameter annotated Meta")
        return
    for cls, spec in zip(classes, specs, strict=True):
        assert spec is not None
        owners = [known for known in declared.types.values() if cls in known.event_types]
        if not owners:
            names = ", ".join(declared.types)
            problems.append(f"{where}: {cls.__name__} is no event of {names}; add its aggregate to of=")
        for known in owners:
            handlers = declared.handlers.setdefault(known.name, {})
            if spec.name in handlers:
                problems.append(f"{where}: {declared.name} already reacts to {cls.__name__}; keep one method")
            handlers[spec.name] = EventReaction(member, known.event_types[cls], len(parameters) == 2)
