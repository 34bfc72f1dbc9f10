"""Events on their way into rows that have a key of their own."""

from __future__ import annotations

from typing import Any

import msgspec

from aggregates.commit import Envelope
from aggregates.meta import Meta

_BITS = 20


def order_of(stream_sequence: int, place: int) -> int:
    """Return the place of an event among all events of the log, from its commit's place and its own in the commit."""
    return stream_sequence << _BITS | place


def parts_of(order: int) -> tuple[int, int]:
    """Return a commit's place in the stream, and an event's in the commit."""
    return order >> _BITS, order & (1 << _BITS) - 1


def is_order(sequence: int, stream_sequence: int) -> bool:
    """Return whether the sequence of a dead letter is an event's place in the log, rather than in its aggregate."""
    return sequence >> _BITS == stream_sequence > 0


class RowEvent(msgspec.Struct, gc=False):
    """An event on its way into one row. It stands where an event of an aggregate's row is an `Envelope`.

    Attributes:
        sequence: its place among all events of the log, see `order_of`.
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
        return Meta(self.source, self.aggregate_id, self.sequence >> _BITS)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)
