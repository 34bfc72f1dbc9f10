"""The cell: one aggregate's state and version in memory. It loads, decides and evolves, without actors or servers."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from operator import sub
from typing import Any, Generic, TypeVar

from aggregates.aggregate import Aggregate
from aggregates.commit import Envelope
from aggregates.context import Context
from aggregates.declaration import AggregateType
from aggregates.encoding import EncodedEvent
from aggregates.errors import InvalidMessage, SequenceError
from aggregates.seen import Seen

A = TypeVar("A", bound=Aggregate)
REMEMBERED_COMMANDS = 8
"""Number of latest commands whose receipts a cell keeps. For an older command the log is read."""

LINKED = 16
"""So many commits are named by one that names those before it."""
MILESTONE = 4
"""One of so many commits names those before it. The oldest that it names is such a commit as well."""

NEVER = 2**63
"""For `Cell.due`: no snapshot is taken."""


class Cell(Generic[A]):
    """One aggregate in memory.

    Attributes:
        state: the user's aggregate object.
        version: number of events folded, equal to the `sequence` of the last event.
        position: stream sequence of the last commit, 0 before the first; the next append expects it.
        trail: stream sequences of the latest commits, ascending.
        commands: receipts of the latest commands by command id: version and stream sequence after the command.
        seen: the ids of all earlier commands.
        due: the version from which a snapshot is due.
    """

    __slots__ = ("commands", "declared", "due", "position", "seen", "state", "trail", "version")

    def __init__(self, declared: AggregateType[A], aggregate_id: str) -> None:
        self.declared = declared
        self.state: A = declared.cls(id=aggregate_id)
        self.version = 0
        self.position = 0
        self.trail = array("Q")
        self.commands: dict[str, tuple[int, int]] = {}
        self.seen = Seen()
        self.due = 0

    def decide(self, command: Any, context: Context) -> list[EncodedEvent]:
        """Return the events that the command leads to, as they will be stored, without applying them.

        Raises:
            Rejected: the aggregate refuses the command.
            InvalidEvent: an event can't be stored, or not be read back as the same value.
            InvalidMessage: no handler for this command, or the handler returned an object that is not an event.
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
        types = self.declared.event_types
        event_type = types.get(type(result))
        if event_type is not None:
            return [event_type.encode(result)]
        encoded = []
        for event in result if isinstance(result, Iterable) else (result,):
            event_type = types.get(type(event))
            if event_type is None:
                raise InvalidMessage(
                    f"{self.declared.name}.{handler.function.__name__} returned {event!r}, "
                    f"which is not an event that {self.declared.name} applies"
                )
            encoded.append(event_type.encode(event))
        return encoded

    def evolve(self, events: Iterable[EncodedEvent]) -> None:
        """Fold events into the state, as they are read back from what is stored, and count them."""
        appliers, state = self.declared.appliers, self.state
        for encoded in events:
            appliers[type(encoded.event)](state, encoded.event)
            self.version += 1

    def replay(self, envelopes: Iterable[Envelope], position: int) -> None:
        """Fold one stored commit.

        Raises:
            SequenceError: the commit does not follow the last folded event.
            NewerEvent: the commit contains an event of a newer program.
            InvalidMessage: the commit contains an event that this program can't read.
        """
        for envelope in envelopes:
            if envelope.sequence != self.version + 1:
                raise SequenceError(
                    f"{self.declared.name} {self.state.id}: event {envelope.sequence} after {self.version}"
                )
            known = self.declared.events.get(envelope.type) or self.declared.stored_event(envelope.type)
            event = known.decode(envelope.data, envelope.dataversion)
            self.declared.appliers[type(event)](self.state, event)
            self.version += 1
            if envelope.commandid:
                self.remember(envelope.commandid, self.version, position)
        self.advance(position)

    def advance(self, position: int) -> None:
        """Note the stream sequence of the aggregate's next commit."""
        trail = self.trail
        trail.append(position)
        if len(trail) == 2 * LINKED:
            del trail[:LINKED]
        self.position = position

    @property
    def links(self) -> bytes:
        """What is stored with the next commit, so that histories can be read backwards.

        How far in stream sequences the last commit is from the one before it, that one from the one before, and so on.
        It is empty for most commits: they lead to one that names many.
        """
        count = len(self.trail)
        if not count or count % MILESTONE:
            return b""
        named = self.trail[-LINKED:]
        named.reverse()
        distances = tuple(map(sub, named, named[1:]))
        return (b"%d " * len(distances))[:-1] % distances

    def remember(self, command_id: str, version: int, position: int) -> None:
        """Keep the receipt of a command. Beyond the limit, reduce the oldest receipt to its id in `seen`."""
        commands = self.commands
        commands[command_id] = (version, position)
        if len(commands) > REMEMBERED_COMMANDS:
            oldest = next(iter(commands))
            del commands[oldest]
            self.seen.add(oldest)
