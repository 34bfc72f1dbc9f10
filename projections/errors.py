"""What can go wrong on the read side."""

from __future__ import annotations

from typing import Literal

from aggregates.errors import EskernelError


class Fenced(EskernelError):
    """The checkpoint is not where this owner left it: another owner, or a cut-over, moved on. Nothing was written."""


FailureKind = Literal[
    "handler",  # it raised
    "sequence",  # an event is missing, or there twice
    "event",  # nobody here can read it
    "refused",  # by the database
]
UNKNOWN = 0
"""Sequence of a `HandlerFailed` whose event isn't known: the aggregate's first of the batch stands for it."""


class HandlerFailed(EskernelError):
    """A projection's handler raised; carries what is needed to park the aggregate.

    Attributes:
        projection: index of the projection in its plan.
        aggregate: aggregate type and id.
        sequence: the event's place in its aggregate; it and all later ones are parked.
        error: one line for people.
        kind: what failed.
        transient: trying again by itself may help.
    """

    def __init__(
        self,
        projection: int,
        aggregate: tuple[str, str],
        sequence: int,
        error: str,
        kind: FailureKind = "refused",
        transient: bool = False,
    ) -> None:
        super().__init__(f"{aggregate[0]} {aggregate[1]}, event {sequence}: {error}")
        self.projection = projection
        self.aggregate = aggregate
        self.sequence = sequence
        self.error = error
        self.kind = kind
        self.transient = transient


class KeyRefused(HandlerFailed):
    """The database refuses a tally's entry; which aggregates added to it is still to be found out (`Plan.blame`).

    Attributes:
        key: tells the entry: its key as JSON, or None if not even that can be made.
    """

    def __init__(self, projection: int, aggregate: str, key: str | None, error: str) -> None:
        super().__init__(projection, (aggregate, ""), UNKNOWN, error)
        self.key = key


class SchemaError(EskernelError):
    """The database is not as this program needs it; the message says what to do."""


class NoSuchLetter(EskernelError):
    """No such dead letter; the message says which there are."""
