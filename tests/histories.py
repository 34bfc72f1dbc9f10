"""Commits for tests, of events as tests write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from aggregates import commit
from aggregates.commit import Decision
from aggregates.declaration import EventType

Names = dict[type, tuple[str, int]]


def encode(
    source: str, aggregate_id: str, names: Names, decisions: Sequence[Decision], sequence: int, time: str
) -> bytes:
    """Return a commit of decisions whose events are not encoded yet.

    Args:
        names: wire name and schema version by event class.
    """
    return commit.encode(source, aggregate_id, [encoded(decision, names) for decision in decisions], sequence, time)


def encoded(decision: Decision, names: Names) -> Decision:
    """Return the decision with its events encoded."""
    types = {cls: EventType(cls, name, version) for cls, (name, version) in names.items()}
    events: list[Any] = [
        event if type(event) not in types else types[type(event)].encode(event) for event in decision.events
    ]
    return msgspec.structs.replace(decision, events=events)
