"""The errors of the read side."""

from __future__ import annotations

from typing import Literal

from sqlalchemy.exc import DBAPIError

from aggregates.errors import EskernelError
from projections.codec import Refused


class Fenced(EskernelError):
    """A checkpoint has changed since this owner's last write: by a new owner, or a cut-over. Nothing was written."""


FailureKind = Literal[
    "handler",  # the handler raised
    "sequence",  # an event is missing, or is there twice
    "event",  # this program can't read the event
    "refused",  # the database refuses the row
]


class HandlerFailed(EskernelError):
    """An event could not be folded into a projection. The error has everything needed to park the aggregate.

    Attributes:
        projection: index of the projection in its plan.
        aggregate: aggregate type and id.
        sequence: the event's place in its aggregate. This event and all later ones are parked.
        error: one line for people.
        kind: the step that failed.
        transient: an automatic retry may help.
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


class SchemaError(EskernelError):
    """The database does not fit this program or its log; the message says what to do."""


class NotReproducible(EskernelError):
    """Two folds of the same log came to different rows, so that the new tables are not shown."""


class TooManyFailures(EskernelError):
    """A projection that was built is not shown: its program fails at too many aggregates."""


class NoSuchLetter(EskernelError):
    """There is no such dead letter; the message says how to list the dead letters."""


class QueryRefused(EskernelError, ValueError):
    """A text is not one statement that only reads; the message says what in it is refused."""


def reason(error: BaseException) -> str:
    """Return why something failed, for people."""
    if isinstance(error, Refused):
        return str(error)
    if isinstance(error, DBAPIError):
        return str(error.orig)
    return f"{type(error).__name__}: {error}"
