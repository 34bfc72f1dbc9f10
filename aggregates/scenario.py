"""Specifies an aggregate in three lines: given events, when a command is decided, then events or a rejection.

    scenario(Account).given(Deposited(500)).when(Withdraw(700)).rejects("balance is 500")

The scenario runs the same cell as the kernel. It also detects a handler that changes the state. What is not as
specified raises `AssertionError`, also where `python -O` removes `assert` statements.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

import orjson

from aggregates.aggregate import Aggregate
from aggregates.cell import Cell
from aggregates.context import Context
from aggregates.declaration import AggregateType, declare
from aggregates.encoding import EncodedEvent
from aggregates.errors import Rejected
from aggregates.messages import dumps, parse
from aggregates.origin import UNKNOWN, Origin, find_problem

A = TypeVar("A", bound=Aggregate)
_NOW = datetime(2013, 1, 1, 12, tzinfo=UTC)


@dataclass(frozen=True)
class Scenario(Generic[A]):
    """A scenario. Each step returns a new scenario, so that several scenarios can share a beginning."""

    declared: AggregateType[A]
    id: str = "1"
    history: tuple[Any, ...] = ()
    commands: tuple[Any, ...] = ()
    now: datetime = _NOW
    origin: Origin = UNKNOWN

    def given(self, *events: Any) -> Scenario[A]:
        """Add events to the history."""
        return replace(self, history=self.history + events)

    def at(self, now: datetime) -> Scenario[A]:
        """Set the moment of decision, which handlers see as `context.now`."""
        return replace(self, now=now)

    def by(
        self,
        *,
        actor: str = "",
        tenant: str = "",
        metadata: Mapping[str, str] | None = None,
        occurred_at: datetime | None = None,
    ) -> Scenario[A]:
        """Set what the sender says of the commands, which handlers see as `context.actor` and so on.

        Raises:
            ValueError: a service would refuse it.
        """
        if problem := find_problem(actor, tenant, metadata or {}):
            raise ValueError(problem)
        if occurred_at is not None and occurred_at.tzinfo is None:
            raise ValueError(f"occurred_at {occurred_at} has no time zone")
        return replace(self, origin=Origin(actor, tenant, dict(metadata or {}), occurred_at))

    def when(self, *commands: Any) -> Scenario[A]:
        """Add commands to decide, in order. `then` and `rejects` are about the last command."""
        return replace(self, commands=self.commands + commands)

    def then(self, *events: Any) -> None:
        """Assert that the last command leads to exactly these events."""
        decided, _ = self._run()
        if list(decided) != list(events):
            raise AssertionError(f"expected {list(events)}, got {list(decided)}")

    def rejects(self, reason: str | None = None) -> None:
        """Assert that the last command is rejected, for this reason if one is given."""
        try:
            decided, _ = self._run()
        except Rejected as rejection:
            if reason is not None and str(rejection) != reason:
                raise AssertionError(f"rejected for {str(rejection)!r}, not {reason!r}") from rejection
        else:
            raise AssertionError(f"expected a rejection, got {list(decided)}")

    def state(self) -> A:
        """Return the state after the history and all commands, including the events of the last command."""
        _, cell = self._run()
        return cell.state

    def _run(self) -> tuple[list[Any], Cell[A]]:
        cell = Cell(self.declared, self.id)
        cell.evolve([self.declared.event_types[type(event)].encode(event) for event in self.history])
        decided: list[EncodedEvent] = []
        for number, command in enumerate(self.commands):
            before = copy.deepcopy(vars(cell.state))
            received = parse(type(command), _json(command))
            try:
                decided = cell.decide(received, Context(f"scenario-{number}", self.now, self.origin))
            finally:
                if vars(cell.state) != before:
                    raise AssertionError(
                        f"the handler of {type(command).__name__} changed state; handlers return events, "
                        "and only methods marked @applies change state"
                    )
            cell.evolve(decided)
        return [event.event for event in decided], cell


def _json(value: Any) -> Any:
    return orjson.loads(dumps(value))


def scenario(cls: type[A], id: str = "1") -> Scenario[A]:
    """Start a scenario for an aggregate class.

    Raises:
        DeclarationError: the class has problems.
    """
    return Scenario(declare(cls), id)
