"""Events on their way into rows that have a key of their own."""

from __future__ import annotations

from typing import Any

import msgspec

from aggregates.commit import Envelope
from aggregates.meta import Meta

BITS = 20
"""An event's place among all events of the log is its commit's place, and in so many bits its own in the commit."""


def parts_of(order: int) -> tuple[int, int]:
    """Return a commit's place in the stream, and an event's in the commit."""
    return order >> BITS, order & (1 << BITS) - 1


def is_order(sequence: int, stream_sequence: int) -> bool:
    """Return whether the sequence of a dead letter is an event's place in the log, rather than in its aggregate."""
    return sequence >> BITS == stream_sequence > 0


class RowEvent(msgspec.Struct, gc=False):
    """An event on its way into one row. It stands where an event of an aggregate's row is an `Envelope`.

    Attributes:
        sequence: its place among all events of the log, see `BITS`.
        event: decoded.
        key: the row's key, by column, in normal form.
        source: the event as it is stored.
        aggregate, aggregate_id: whose event it is.
    """

    sequence: int
    event: Any
    key: tuple[Any, ...]
    source: Envelope
    aggregate: str
    aggregate_id: str

    @property
    def meta(self) -> Meta:
        """The event's metadata."""
        return Meta(self.source, self.aggregate_id, self.sequence >> BITS)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)
