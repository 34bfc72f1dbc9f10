"""Settings of the projection database, of batches and of dead letters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Le
from pydantic import AfterValidator, ByteSize, Field

from kernel.settings.fields import MIB, Count, Seconds, Section


def _in_url(path: Path) -> str:
    """Return the path as a URL holds it: a question mark would end it, and a percent sign begins an escape."""
    return str(path).replace("%", "%25").replace("?", "%3F")


def _absolute(url: str) -> str:
    """Return the URL with an absolute path: other commands use it too, and may run in other folders."""
    path = url.removeprefix("sqlite:///")
    if path == url or not path or path.startswith(("/", ":memory:", "file:", "?")):
        return url
    return f"sqlite:///{_in_url(Path.cwd())}/{path.removeprefix('./')}"


class Database(Section):
    """The projection database."""

    url: Annotated[str, AfterValidator(_absolute)] | None = None
    """URL of the database, `postgresql://user@host/name` or `sqlite:///file`; SQLite in the data directory unless
    set."""
    pool_size: Annotated[int, Ge(2)] = 5
    """Number of connections that a worker keeps open: one for writing, one for reading, the others for jobs."""
    max_overflow: Annotated[int, Ge(0)] = 5
    """Number of further connections that a worker opens while all of those are in use."""
    pool_timeout: Seconds = 10.0
    """Time limit in seconds for getting a connection while all are in use."""
    pool_recycle: Annotated[int, Ge(-1)] = -1
    """Age in seconds after which a connection is replaced at its next use; -1: never."""
    connect_timeout: Annotated[int, Ge(2)] = 10
    """Time limit in whole seconds for a new connection to PostgreSQL. SQLite does not use it."""
    lock_timeout: Seconds = 5.0
    """Time limit in seconds for a lock that another connection holds. Then the batch is tried again."""

    def url_in(self, directory: Path) -> str:
        """Return the configured URL, or the URL of the SQLite database in an app's data directory."""
        return self.url or f"sqlite:///{_in_url(directory / 'projections.db')}"

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of `projections.database.open_database`."""
        return self.model_dump(exclude={"url"})


class Batch(Section):
    """The size of a batch, which is folded and written together."""

    events: Count = 32_000
    """Largest number of commits in a batch. In a larger batch, a row that changes often is written less often."""
    bytes: Annotated[ByteSize, Ge(1)] = Field(default=ByteSize(64 * MIB))
    """Largest size of a batch. The last read of a batch may exceed it."""
    time: Annotated[float, Ge(0)] = 1.0
    """Longest time in seconds for which a batch is filled before it is folded, while there is a backlog."""


class DeadLetters(Section):
    """Automatic retries of events that a projection could not fold."""

    retry_after: Seconds = 1.0
    """Pause in seconds before the first automatic retry after a transient failure of a handler. It doubles with each
    retry, up to five minutes."""
    retries: Annotated[int, Ge(0)] = 10
    """Number of automatic retries. Then the event waits for `eskernel dead-letters`."""
    pause_above: Annotated[float, Ge(0), Le(1)] = 0.25
    """If a larger share of the aggregates that were folded within a minute failed in a projection, it pauses: it parks
    no more of them, and the other projections go on. 1 never pauses."""
    pause_minimum: Annotated[int, Ge(1)] = 100
    """Number of failed aggregates below which a projection does not pause, however large their share."""


class Deployment(Section):
    """New versions of projections: they are built beside the ones that readers see, and then take their place."""

    verify: bool = True
    """Fold the log a second time before readers see a new version, and compare all rows. It finds handlers that depend
    on more than the events, and takes about as long as the build."""
    retention: Seconds = 604_800.0
    """Seconds after which a version that readers no longer see is dropped: until then `eskernel projections rollback`
    shows it again at once. While a running program declares the version, it stays."""


class Verification(Section):
    """The regular comparison of rows of `Rows` projections with the events that they follow from."""

    interval: Annotated[float, Ge(0)] = 30.0
    """Seconds between two comparisons of some rows. 0: no rows are compared."""
    rows: Annotated[int, Ge(1), Le(10_000)] = 20
    """Rows of one projection that are compared at a time: the next ones by their keys, from the beginning again after
    the last one. The history of each is read from the log. Rows with more than 2,000 events are passed over, and rows
    that are missing are not noticed: see `eskernel projections verify`."""
