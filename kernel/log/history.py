"""One aggregate as its history in the log says it is, now or at an earlier moment."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Generic, TypeVar

from aggregates import Aggregate, InvalidMessage, SequenceError
from aggregates.cell import Cell
from aggregates.commit import Envelope, decode
from aggregates.declaration import AggregateType
from aggregates.errors import NewerEvent
from kernel.errors import UnreadableHistory
from kernel.log.base import EventLog

A = TypeVar("A", bound=Aggregate)
TURN = 500
"""Commits that are folded before others have their turn on the event loop."""


@dataclass(frozen=True, slots=True)
class LoadedAggregate(Generic[A]):
    """An aggregate as `Client.load` has folded it.

    Attributes:
        state: the aggregate object. It is the caller's own: changes to it reach nobody else.
        version: sequence of the last event that is folded; 0 if there is none.
    """

    state: A
    version: int


async def load_aggregate(
    log: EventLog, declared: AggregateType[A], aggregate_id: str, at: int | datetime | None = None
) -> LoadedAggregate[A]:
    """Fold an aggregate's events from the log. What is no commit is passed over, as services do.

    Args:
        at: sequence of the last event to fold, or the latest time of one (UTC if it has no zone); None: all events.

    Raises:
        InvalidId: the id can't be addressed.
        ValueError: `at` is negative.
        UnreadableHistory: this program can't read the history up to there.
        LogError: the log can't be read.
    """
    if isinstance(at, int) and at < 0:
        raise ValueError(f"at={at}: an aggregate's first event has the number 1, and 0 is before it")
    moment = at if not isinstance(at, datetime) or at.tzinfo is not None else at.replace(tzinfo=UTC)
    cell = Cell(declared, aggregate_id)
    for number, commit in enumerate(await log.read_subject(log.subjects.address(declared.name, aggregate_id).subject)):
        if number % TURN == TURN - 1:
            await asyncio.sleep(0)
        try:
            envelopes = decode(commit.payload)
        except InvalidMessage:
            continue
        for envelope in envelopes:
            try:
                if _is_later(envelope, cell.version, moment):
                    return LoadedAggregate(cell.state, cell.version)
                cell.replay([envelope], commit.sequence)
            except Exception as error:
                raise _unreadable(cell, envelope, commit.sequence, error) from error
    return LoadedAggregate(cell.state, cell.version)


def _is_later(envelope: Envelope, version: int, at: int | datetime | None) -> bool:
    if at is None:
        return False
    if isinstance(at, int):
        return version >= at
    time = datetime.fromisoformat(envelope.time)
    return (time if time.tzinfo is not None else time.replace(tzinfo=UTC)) > at


def _unreadable(cell: Cell[A], envelope: Envelope, stream_sequence: int, error: Exception) -> UnreadableHistory:
    if isinstance(error, SequenceError):
        reason = f"event {envelope.sequence} is stored there. Restore the log from a backup: docs/backup.md"
    elif isinstance(error, NewerEvent):
        reason = f"it is of a newer program: {error}"
    elif isinstance(error, InvalidMessage):
        reason = str(error)
    else:
        reason = f"{type(error).__name__} while it was folded: {error}"
    place = f"event {cell.version + 1} of {cell.declared.name} {cell.state.id!r}, at stream sequence {stream_sequence}"
    return UnreadableHistory(f"this program can't read {place}: {reason}", cell.version)
