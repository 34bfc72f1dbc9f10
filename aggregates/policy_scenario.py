"""Specifies a policy in three lines: when something has happened, then this is sent.

    policy(Fulfilment).when(Placed(500), of=Order, id="o-1").sends(Send(Payment, "p-o-1", Request(500)))

The scenario runs the same code as the kernel, and stores the events as the log does. What is not as specified raises
`AssertionError`, also where `python -O` removes `assert` statements.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import msgspec

from aggregates.aggregate import Aggregate, name_of
from aggregates.commit import Envelope
from aggregates.declaration import AggregateType, declare
from aggregates.errors import InvalidMessage
from aggregates.meta import Meta
from aggregates.policies import After, At, Policy, Send
from aggregates.reacting import Cancelled, DeclaredReaction, Due, Owed, declare_reaction

_NOW = datetime(2013, 1, 1, 12, tzinfo=UTC)


@dataclass(frozen=True)
class _Happened:
    event: Any
    of: type[Aggregate] | None
    id: str
    at: datetime


@dataclass(frozen=True)
class PolicyScenario:
    """A scenario. Each step returns a new scenario, so that several scenarios can share a beginning."""

    declared: DeclaredReaction
    history: tuple[_Happened, ...] = ()
    refused: tuple[Send, str] | None = None

    def given(
        self, event: Any, *, of: type[Aggregate] | None = None, id: str = "1", at: datetime = _NOW
    ) -> PolicyScenario:
        """Add an event that has happened before; the timers that it sets are pending."""
        return self.when(event, of=of, id=id, at=at)

    def when(
        self, event: Any, *, of: type[Aggregate] | None = None, id: str = "1", at: datetime = _NOW
    ) -> PolicyScenario:
        """Say what happens. The assertions are about the last event.

        Args:
            of: whose event it is, where several aggregates of the policy have it.
            id: id of the aggregate.
            at: the event's time.
        """
        return replace(self, history=(*self.history, _Happened(event, of, id, at)), refused=None)

    def when_rejected(self, send: Send, reason: str = "rejected") -> PolicyScenario:
        """Say that a command which the policy sends for the last event is rejected."""
        return replace(self, refused=(send, reason))

    def sends(self, *expected: Send) -> PolicyScenario:
        """Assert that exactly these commands are sent at once, in this order."""
        found = [each.send for each in self._owed() if isinstance(each, Due) and each.moment is None]
        _compare("sends", list(expected), found)
        return self

    def sets(self, *expected: After | At) -> PolicyScenario:
        """Assert that exactly these timers are set, in this order."""
        found = [each for each in self._owed() if isinstance(each, Due) and each.moment is not None]
        time = self.history[-1].at
        wanted = [
            (time + each.delay if isinstance(each, After) else each.moment, each.send, each.key) for each in expected
        ]
        _compare("sets", wanted, [(each.moment, each.send, each.key) for each in found])
        return self

    def cancels(self, *keys: str) -> PolicyScenario:
        """Assert that exactly these timers are cancelled, in this order."""
        _compare("cancels", list(keys), [each.key for each in self._owed() if isinstance(each, Cancelled)])
        return self

    def does_nothing(self) -> None:
        """Assert that nothing follows."""
        _compare("owes", [], list(self._owed()))

    def pending(self) -> dict[str, datetime]:
        """Return the timers with a key that are pending after all events, and when each is due."""
        pending: dict[str, datetime] = {}
        for happened in self.history:
            for each in self._react(happened):
                pending.pop(each.key, None)
                if isinstance(each, Due) and each.moment is not None and each.key:
                    pending[each.key] = each.moment
        return pending

    def _owed(self) -> Sequence[Owed]:
        if not self.history:
            raise AssertionError("nothing has happened; call when(event) first")
        owed = self._react(self.history[-1])
        if self.refused is None:
            return owed
        send, reason = self.refused
        due = next((each for each in owed if isinstance(each, Due) and each.send == send), None)
        if due is None:
            raise AssertionError(f"{self.declared.name} does not send {send}, so it can't be rejected")
        return self.declared.owed_after(due, reason, self._meta(self.history[-1]))

    def _react(self, happened: _Happened) -> Sequence[Owed]:
        declared = self._type_of(happened)
        handler = self.declared.handlers[declared.name].get(declared.event_types[type(happened.event)].name)
        if handler is None:
            return []
        encoded = handler.event.encode(happened.event)
        event = handler.event.decode(msgspec.Raw(encoded.data), encoded.version)
        owed = self.declared.owed(handler, event, self._meta(happened))
        for each in owed:
            if isinstance(each, Due):
                _check_handled(self.declared.name, each.send)
        return owed

    def _type_of(self, happened: _Happened) -> AggregateType[Any]:
        cls = type(happened.event)
        found = [
            declared
            for declared in self.declared.types.values()
            if cls in declared.event_types and happened.of in (None, declared.cls)
        ]
        if len(found) != 1:
            names = " and ".join(declared.name for declared in found) or "no aggregate of the policy"
            raise InvalidMessage(f"{cls.__name__} is an event of {names}; say whose with of=")
        return found[0]

    def _meta(self, happened: _Happened) -> Meta:
        number = self.history.index(happened) + 1
        envelope = Envelope(
            id=f"00000000-0000-7000-8000-{number:012d}",
            type=type(happened.event).__name__,
            time=happened.at.isoformat(),
            sequence=number,
            data=msgspec.Raw(b"null"),
            commandid=f"scenario-{number}",
        )
        return Meta(envelope, happened.id, number)


def _check_handled(policy: str, send: Send) -> None:
    if type(send.command) not in declare(send.aggregate).handlers:
        what = f"{policy} sends {type(send.command).__name__} to {send.aggregate.__name__}"
        raise AssertionError(f"{what}, which has no handler for it")


def _compare(what: str, expected: list[Any], found: list[Any]) -> None:
    if expected != found:
        raise AssertionError(f"expected that it {what} {expected}, but it {what} {found}")


def policy(cls: type[Policy] | Policy) -> PolicyScenario:
    """Start a scenario for a policy.

    Raises:
        DeclarationError: the policy, or an aggregate of it, has problems.
    """
    of: Iterable[type[Aggregate]] = cls.of if isinstance(cls.of, tuple) else (cls.of,)
    types: dict[str, AggregateType[Any]] = {}
    for each in of:
        types[name_of(each)] = declare(each)
    return PolicyScenario(declare_reaction(cls, Policy, types))
