"""The cell: one aggregate's state with its version. Load it, let it decide, let it evolve. No actors, no servers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Generic, TypeVar

from aggregates.aggregate import Aggregate
from aggregates.commit import Envelope
from aggregates.context import Context
from aggregates.declaration import AggregateType
from aggregates.errors import InvalidMessage, SequenceError
from aggregates.seen import Seen

A = TypeVar("A", bound=Aggregate)
REMEMBERED_COMMANDS = 8
"""How many of the latest commands a cell can answer for without asking the log."""


class Cell(Generic[A]):
    """One aggregate in memory.

    Attributes:
        state: the user's aggregate object.
        version: how many events it has folded, which is the `sequence` of the last one.
        position: stream sequence of its last commit, 0 before the first; what the next append expects.
        commands: the latest command ids with the version and stream sequence each led to.
        seen: the ids of the commands before those.
    """

    __slots__ = ("commands", "declared", "position", "seen", "state", "version")

    def __init__(self, declared: AggregateType[A], aggregate_id: str) -> None:
        self.declared = declared
        self.state: A = declared.cls(id=aggregate_id)
        self.version = 0
        self.position = 0
        self.commands: dict[str, tuple[int, int]] = {}
        self.seen = Seen()

    def decide(self, command: Any, context: Context) -> list[Any]:
        """Return the events that the command leads to, without applying them.

        Raises:
            Rejected: the aggregate refuses.
            InvalidMessage: no handler for this command, or the handler returned something that is not an event.
        """
        handler = self.declared.handlers.get(type(command))
        if handler is None:
            raise InvalidMessage(f"{self.declared.name} has no handler for {type(command).__name__}")
        if handler.wants_context:
            result = handler.function(self.state, command, context)
        else:
            result = handler.function(self.state, command)
        if result is None:
            return []
        if type(result) in self.declared.appliers:
            return [result]
        events = list(result) if isinstance(result, Iterable) else [result]
        for event in events:
            if type(event) not in self.declared.appliers:
                raise InvalidMessage(
                    f"{self.declared.name}.{handler.function.__name__} returned {event!r}, "
                    f"which is not an event that {self.declared.name} applies"
                )
        return events

    def evolve(self, events: Iterable[Any]) -> None:
        """Fold events into state and count them."""
        for event in events:
            self.declared.appliers[type(event)](self.state, event)
            self.version += 1

    def replay(self, envelopes: Iterable[Envelope], position: int) -> None:
        """Fold one stored commit.

        Raises:
            SequenceError: it does not follow what was folded before.
            InvalidMessage: an event that this program can't read.
        """
        for envelope in envelopes:
            if envelope.sequence != self.version + 1:
                raise SequenceError(
                    f"{self.declared.name} {self.state.id}: event {envelope.sequence} after {self.version}"
                )
            known = self.declared.events.get(envelope.type)
            if known is None:
                raise InvalidMessage(f"{self.declared.name} has no event named {envelope.type!r}")
            self.evolve((known.decode(envelope.data, envelope.dataversion),))
            if envelope.commandid:
                self.remember(envelope.commandid, self.version, position)
        self.position = position

    def remember(self, command_id: str, version: int, position: int) -> None:
        """Keep the receipt of a command; of the oldest beyond the limit only that it was seen."""
        commands = self.commands
        commands[command_id] = (version, position)
        if len(commands) > REMEMBERED_COMMANDS:
            oldest = next(iter(commands))
            del commands[oldest]
            self.seen.add(oldest)
