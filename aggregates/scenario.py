"""Specifying an aggregate in three lines: given events, when a command comes, then events or a rejection.

    scenario(Account).given(Deposited(500)).when(Withdraw(700)).rejects("balance is 500")

The scenario runs the same cell that the kernel runs, and it also notices a handler that changes state.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

import orjson

from aggregates.aggregate import Aggregate
from aggregates.cell import Cell
from aggregates.commit import Decision, decode, encode
from aggregates.context import Context
from aggregates.declaration import AggregateType, declare
from aggregates.errors import Rejected
from aggregates.messages import dumps, parse

A = TypeVar("A", bound=Aggregate)
_NOW = datetime(2013, 1, 1, 12, tzinfo=UTC)


@dataclass(frozen=True)
class Scenario(Generic[A]):
    """A scenario being written; each step returns a new one, so that a common beginning can be shared."""

    declared: AggregateType[A]
    id: str = "1"
    history: tuple[Any, ...] = ()
    commands: tuple[Any, ...] = ()
    now: datetime = _NOW

    def given(self, *events: Any) -> Scenario[A]:
        """What happened before."""
        return replace(self, history=self.history + events)

    def at(self, now: datetime) -> Scenario[A]:
        """The moment of decision that handlers see as `context.now`."""
        return replace(self, now=now)

    def when(self, *commands: Any) -> Scenario[A]:
        """The commands to decide, in order; all but the last only prepare."""
        return replace(self, commands=self.commands + commands)

    def then(self, *events: Any) -> None:
        """Assert that the last command leads to exactly these events."""
        decided, _ = self._run()
        assert list(decided) == list(events), f"expected {list(events)}, got {list(decided)}"

    def rejects(self, reason: str | None = None) -> None:
        """Assert that the last command is rejected, for this reason if one is given."""
        try:
            decided, _ = self._run()
        except Rejected as rejection:
            assert reason is None or str(rejection) == reason, f"rejected for {str(rejection)!r}, not {reason!r}"
        else:
            raise AssertionError(f"expected a rejection, got {list(decided)}")

    def state(self) -> A:
        """Return the state after everything, the last command's events included."""
        _, cell = self._run()
        return cell.state

    def _run(self) -> tuple[list[Any], Cell[A]]:
        cell = Cell(self.declared, self.id)
        cell.evolve(self._through_the_wire(list(self.history)))
        decided: list[Any] = []
        for number, command in enumerate(self.commands):
            before = copy.deepcopy(vars(cell.state))
            received = parse(type(command), _json(command))
            try:
                decided = cell.decide(received, Context(f"scenario-{number}", self.now))
            finally:
                assert vars(cell.state) == before, (
                    f"the handler of {type(command).__name__} changed state; handlers return events, "
                    "and the methods marked @applies change state"
                )
            decided = self._through_the_wire(decided)
            cell.evolve(decided)
        return decided, cell

    def _through_the_wire(self, events: list[Any]) -> list[Any]:
        """Store and load them, so that a field that doesn't survive JSON is found here and not in production."""
        if not events:
            return []
        names = {cls: (event.name, event.version) for event in self.declared.events.values() for cls in [event.cls]}
        stored = decode(encode("/scenario", self.id, names, [Decision("", events)], 0, "2013-01-01T12:00:00Z"))
        return [self.declared.events[one.type].decode(one.data, one.dataversion) for one in stored]


def _json(value: Any) -> Any:
    return orjson.loads(dumps(value))


def scenario(cls: type[A], id: str = "1") -> Scenario[A]:
    """Start a scenario for an aggregate class.

    Raises:
        DeclarationError: the class itself is wrong.
    """
    return Scenario(declare(cls), id)
