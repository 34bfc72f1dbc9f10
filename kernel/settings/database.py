"""Settings of the projection database, and of what is written to it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge
from pydantic import AfterValidator, ByteSize, Field

from kernel.settings.fields import MIB, Count, Seconds, Section


def _absolute(url: str) -> str:
    """Other commands are given it too, and run in other folders."""
    path = url.removeprefix("sqlite:///")
    relative = path != url and path and not path.startswith(("/", ":memory:", "file:"))
    return f"sqlite:///{Path(path).absolute()}" if relative else url


class Database(Section):
    """The projection database."""

    url: Annotated[str, AfterValidator(_absolute)] | None = None
    """`postgresql://user@host/name` or `sqlite:///file`; SQLite in the data directory unless set."""
    pool_size: Annotated[int, Ge(2)] = 5
    """Connections kept open by a worker: one writes, one reads, the others are for jobs."""
    max_overflow: Annotated[int, Ge(0)] = 5
    """Further connections when those are in use."""
    pool_timeout: Seconds = 10.0
    """For a connection when all are in use."""
    pool_recycle: Annotated[int, Ge(-1)] = -1
    """Age at which a connection is replaced when it is next used; -1 never."""
    connect_timeout: Annotated[int, Ge(2)] = 10
    """For making a connection to PostgreSQL; whole seconds, at least two. SQLite's are made at once."""
    lock_timeout: Seconds = 5.0
    """For a lock that somebody else holds; then the batch is tried again."""

    def options(self) -> dict[str, Any]:
        """Return what `projections.database.open_database` is given."""
        return self.model_dump(exclude={"url"})


class Batch(Section):
    """How much is folded and written together."""

    events: Count = 32_000
    """Most commits of a batch: the more, the seldomer a row that changes often is written."""
    bytes: Annotated[ByteSize, Ge(1)] = Field(default=ByteSize(64 * MIB))
    """Most bytes of a batch, but for its last read."""
    time: Annotated[float, Ge(0)] = 1.0
    """While there is a backlog a batch is filled for so long before it is folded."""


class DeadLetters(Section):
    """Events that a projection could not fold."""

    retry_after: Seconds = 1.0
    """Until an event is folded again whose handler failed with something transient; doubled, up to five minutes."""
    retries: Annotated[int, Ge(0)] = 10
    """How often that is tried; then the event waits for `eskernel dead-letters`."""
