"""The aggregates that wait behind a dead letter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from aggregates.commit import Envelope

EVERY = -1
"""Projection index in a `HandlerFailed` that the event itself causes: every projection of its aggregate parks it."""
Key = tuple[str, str]
"""Aggregate type and id."""


class Parked(NamedTuple):
    """The state of a parked aggregate for one projection.

    Attributes:
        since: sequence of the first waiting event.
        error: error of this event.
        transient: this event is retried automatically.
        waits: this event has not failed: it waits for a program that can read it.
    """

    since: int
    error: str
    transient: bool = False
    waits: bool = False


class Letter(NamedTuple):
    """An event that becomes a dead letter.

    Attributes:
        projection: index of the projection in its plan.
        aggregate: aggregate type and id.
        sequence: the event's place in its aggregate.
        stream_sequence: the event's place in the stream.
        error: error of the event, or of the event that it waits behind.
        transient: the event is retried automatically; False for an event that waits behind another one.
        waits: neither the event nor one before it has failed; it waits for a program that can read it.
    """

    projection: int
    aggregate: Key
    sequence: int
    stream_sequence: int
    error: str
    transient: bool = False
    waits: bool = False


class ParkedAggregates(dict[Key, dict[int, Parked]]):
    """The aggregates that wait behind a dead letter, by aggregate and projection index.

    Attributes:
        skipped: events that a person has skipped, by aggregate: projection index and sequence. Nothing waits for them.
    """

    def __init__(self, skipped: dict[Key, set[tuple[int, int]]] | None = None) -> None:
        super().__init__()
        self.skipped = {} if skipped is None else skipped

    def skip(self, aggregate: Key, index: int, sequence: int) -> None:
        """Leave out an event of an aggregate for one projection."""
        self.skipped.setdefault(aggregate, set()).add((index, sequence))

    def add(self, aggregate: Key, index: int, parked: Parked) -> None:
        """Park an aggregate for one projection, unless it is parked from an earlier event on already."""
        waiting = self.setdefault(aggregate, {})
        if index not in waiting or parked.since < waiting[index].since:
            waiting[index] = parked

    def divide(
        self, key: Key, envelope: Envelope, stream_sequence: int, projections: Sequence[int], letters: list[Letter]
    ) -> list[int]:
        """Add an event to the dead letters of those projections that its aggregate is parked for.

        Returns:
            the other projections, which fold the event.
        """
        waiting, skipped = self.get(key, {}), self.skipped.get(key, ())
        folding = []
        for index in projections:
            if (index, envelope.sequence) in skipped:
                continue
            parked = waiting.get(index)
            if parked is None or envelope.sequence < parked.since:
                folding.append(index)
            else:
                head = envelope.sequence == parked.since
                retried = head and parked.transient
                letters.append(
                    Letter(index, key, envelope.sequence, stream_sequence, parked.error, retried, parked.waits)
                )
        return folding
