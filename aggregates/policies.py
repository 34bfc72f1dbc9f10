"""Policies: whenever this has happened, that shall be done. From an event to commands, now or at a later time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, ClassVar, Literal, Never, TypeAlias

from aggregates.aggregate import Aggregate
from aggregates.errors import DeclarationError
from aggregates.meta import Meta

Start = Literal["now", "beginning"]
_NOT_GIVEN: Any = object()


@dataclass(frozen=True, slots=True)
class Send:
    """A command for an aggregate, sent at once.

    Attributes:
        aggregate: the class of the aggregate; one of the app's.
        id: the aggregate's id.
        command: an object of a class marked `@command` that the aggregate handles.
    """

    aggregate: type[Aggregate]
    id: str
    command: object


@dataclass(frozen=True, slots=True)
class After:
    """A timer: the command is sent when some time has passed since the event.

    Attributes:
        delay: counted from the event's time.
        send: what is sent then.
        key: names the timer within the policy. A later timer with the same key takes its place, and `Cancel` ends it.
            Without a key it can be neither replaced nor cancelled.
    """

    delay: timedelta
    send: Send
    key: str = ""


@dataclass(frozen=True, slots=True)
class At:
    """A timer: the command is sent at a moment, or at once if that has passed.

    Attributes:
        moment: with a time zone.
        send: what is sent then.
        key: as of `After`.
    """

    moment: datetime
    send: Send
    key: str = ""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Ends the policy's timer of this key, if there is one. Events decide in the order of the log, whoever set it."""

    key: str


Reaction: TypeAlias = Send | After | At | Cancel
Reactions: TypeAlias = Reaction | Iterable[Reaction] | None
"""What a policy's handler returns: nothing, one reaction, or several in order."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A command of a policy that its aggregate has rejected.

    Attributes:
        sent: the command, and for whom it was.
        reason: the aggregate's words.
        meta: of the event that the policy reacted to.
    """

    sent: Send
    reason: str
    meta: Meta


class Reacting:
    """The common base. Derive from `Policy`, or from `kernel.Effect`, instead.

    Class keywords:
        of: the aggregate whose events it reacts to, or a tuple of several.
        start: where it begins when it runs for the first time: with the events that come from `"now"` on, or with the
            `"beginning"` of the log.
        name: its name on the command line and in the database, by default the class name.
    """

    of: ClassVar[type[Aggregate] | tuple[type[Aggregate], ...]]
    start: ClassVar[Start]
    name: ClassVar[str]

    def __init_subclass__(
        cls,
        *,
        of: type[Aggregate] | tuple[type[Aggregate], ...] = _NOT_GIVEN,
        start: Start = _NOT_GIVEN,
        name: str = _NOT_GIVEN,
        **unknown: Never,
    ) -> None:
        super().__init_subclass__()
        if unknown:
            raise DeclarationError(
                [f"{cls.__name__} has no keyword {word}; it has of, start and name" for word in unknown]
            )
        # the values are checked when the app is made, so that all problems are reported at once
        given = {"of": of, "start": start, "name": name}
        given = {word: value for word, value in given.items() if value is not _NOT_GIVEN}
        for word, value in given.items():
            setattr(cls, word, value)
        if given and "name" not in vars(cls):
            cls.name = cls.__name__
        if "of" in vars(cls) and "start" not in vars(cls):
            cls.start = "now"


class Policy(Reacting):
    """Whenever this has happened, that shall be done: handlers that return commands for an event.

    A handler is a pure function of the event and its `Meta`: it reads no clock, no database and no network. The service
    sends what it returns. The id of each command follows from the event, the policy and the place, so each takes effect
    once, however often it is sent. Events of one aggregate are reacted to in order; those of different aggregates side
    by side. A rebuild never runs a policy.

        class Fulfilment(Policy, of=(Order, Payment)):
            @reacts
            def placed(self, event: Placed) -> Iterator[Reaction]:
                yield Send(Payment, event.payment, Request(event.cents))
                yield After(timedelta(minutes=30), Send(Order, event.order, Expire()), key=event.order)

            @reacts
            def paid(self, event: Paid, meta: Meta) -> Reactions:
                return Cancel(event.order)
    """

    def on_rejected(self, refusal: Refusal) -> Reactions:  # noqa: ARG002 - for others to override
        """Return what shall be done when an aggregate has rejected a command of this policy: nothing, by default.

        The rejection is recorded before, so a repeat does not decide anew. What this returns is sent like a handler's
        result; if that is rejected in turn, it is recorded and no more.
        """
        return None
