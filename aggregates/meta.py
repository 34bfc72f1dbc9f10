"""What is known of an event apart from its own fields."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType

from aggregates.commit import Envelope


class Meta:
    """An event's metadata. Handlers of projections and policies get it with a parameter annotated `Meta`.

    Attributes:
        aggregate_id: id of the aggregate.
        stream_sequence: the commit's place in the stream, equal for all events of one commit.
    """

    __slots__ = ("_envelope", "aggregate_id", "stream_sequence")

    def __init__(self, envelope: Envelope, aggregate_id: str, stream_sequence: int) -> None:
        self._envelope = envelope
        self.aggregate_id = aggregate_id
        self.stream_sequence = stream_sequence

    @property
    def sequence(self) -> int:
        """The event's place in its aggregate, from 1."""
        return self._envelope.sequence

    @property
    def time(self) -> datetime:
        """The moment of decision (UTC)."""
        return datetime.fromisoformat(self._envelope.time)

    @property
    def event_id(self) -> str:
        """The event's UUIDv7."""
        return self._envelope.id

    @property
    def command_id(self) -> str:
        """The id of the command that led to the event."""
        return self._envelope.commandid

    @property
    def correlation_id(self) -> str:
        """The command's correlation id, or the command's own id if it has none."""
        return self._envelope.correlation_id or self._envelope.commandid

    @property
    def actor(self) -> str:
        """Who sent the command, as its sender said; empty if it named nobody."""
        return self._envelope.actor or ""

    @property
    def tenant(self) -> str:
        """The tenant that the command was for, as its sender said; empty if it named none."""
        return self._envelope.tenant or ""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What else the sender said of the command, texts by name."""
        return MappingProxyType(self._envelope.metadata or {})

    @property
    def occurred_at(self) -> datetime:
        """When what the event says has happened (UTC): `time`, unless the sender of the command said otherwise."""
        return datetime.fromisoformat(self._envelope.occurred_at or self._envelope.time)
