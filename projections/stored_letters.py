"""What is read of a dead letter in the database: its event, for people and for a fold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import Row

from aggregates import InvalidMessage
from aggregates.commit import Envelope, decode
from projections.fold import Plan
from projections.row_event import is_order, parts_of


@dataclass(frozen=True, slots=True)
class StoredLetter:
    """A dead letter in the database.

    Attributes:
        sequence: the event's place in its aggregate.
        event: the event as it is stored, or None if the payload is not a commit.
        payload: the whole commit that contains the event.
    """

    sequence: int
    stream_sequence: int
    error: str
    event: dict[str, Any] | None
    payload: bytes


def event_of(plan: Plan, index: int, row: Row[Any]) -> Envelope:
    """Return the event of a dead letter as a projection folds it. Raises `InvalidMessage` if it can't be had."""
    for router in plan.routers:
        if router.index == index and router.name == row.aggregate:
            return router.restore(row.payload, row.sequence, row.aggregate_id)
    return envelope_of(row)


def envelope_of(row: Row[Any]) -> Envelope:
    """Return the event of a dead letter. Raises `InvalidMessage` if the payload has no such event."""
    for envelope in decode(row.payload):
        if envelope.sequence == row.sequence:
            return envelope
    raise InvalidMessage(f"the commit at {row.stream_sequence} contains no event {row.sequence}")


def letter_of(row: Row[Any]) -> StoredLetter:
    """Return a dead letter for people."""
    event = _event(row)
    sequence = row.sequence
    if event is not None and is_order(row.sequence, row.stream_sequence):
        sequence = event["sequence"]
    return StoredLetter(sequence, row.stream_sequence, row.error, event, row.payload)


def _event(row: Row[Any]) -> dict[str, Any] | None:
    try:
        batch: list[dict[str, Any]] = msgspec.json.decode(row.payload, type=list[dict[str, Any]])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if is_order(row.sequence, row.stream_sequence):
        return dict(enumerate(batch)).get(parts_of(row.sequence)[1])
    return next((event for event in batch if event.get("sequence") == row.sequence), None)
