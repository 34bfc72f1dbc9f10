"""The log that a database was folded from: recognised by what is in it.

A stream that was restored from a snapshot, or moved to another cluster, has another creation time, and is the same log.
A stream that was restored from an older backup and then went on has the same creation time, and is another log. So the
database keeps one folded commit: its stream sequence, and a digest of it. It is called the anchor. A log that contains
this commit is the one that the database was folded from.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Engine, func, insert, inspect, select, update

from projections.database import reads
from projections.errors import SchemaError
from projections.tables import checkpoint, stream

_REMEDY = (
    "use the database that belongs to the log, or restore the newer log from a backup (docs/backup.md). If there is "
    "none, keep this database as it is, and name a new one in database.url: it is built from the log"
)


class Origin(NamedTuple):
    """What a database knows of the log that it was folded from.

    Attributes:
        furthest: highest stream sequence that a projection has folded, 0 if none has.
        anchor: stream sequence of a folded commit, 0 if none is kept.
        digest: the digest of that commit.
    """

    created: str
    partitions: int
    furthest: int
    anchor: int
    digest: str

    def doubt(self, created: str, partitions: int, last: int, digest: str) -> str:
        """Return why this can't be the log that the database was folded from, or nothing if it is.

        Args:
            created: creation time of the log's stream.
            last: stream sequence of the log's last commit.
            digest: of the log's commit at the anchor; empty if there is none.
        """
        if self.partitions != partitions:
            return (
                f"this database was folded from {self.partitions} partitions, but the stream has {partitions}: "
                + _REMEDY
            )
        if self.furthest > last:
            return (
                f"the projections have folded up to sequence {self.furthest}, but the log ends at {last}: it was "
                f"truncated, or restored from an older backup{self._again(created)}; {_REMEDY}"
            )
        if self.anchor and digest:
            if self.digest == digest:
                return ""
            return (
                f"commit {self.anchor} of the log is not the one that this database was folded from: the log was "
                f"restored from an older backup and has gone on, or is another one; {_REMEDY}"
            )
        if self.created == created or not self.furthest:
            return ""  # the commit was deleted with its age, or the database is of an older program, or empty
        why = (
            f"the log has no commit {self.anchor} to recognise it by" if self.anchor else "nothing else is known of it"
        )
        return (
            f"this database was folded from the stream created {self.created}, but the log's stream was created "
            f"{created}, and {why}; {_REMEDY}"
        )

    def _again(self, created: str) -> str:
        again = f", or created again (it was created {created}, the stream before {self.created})"
        return again if self.created != created else ""


def knows(engine: Engine, app: str) -> bool:
    """Return whether this database was folded from an app's stream; also of a database that no service has upgraded."""
    if not inspect(engine).has_table(stream.name):
        return False
    with reads(engine).connect() as connection:
        return connection.scalar(select(stream.c.app).where(stream.c.app == app)) is not None


def read_origin(engine: Engine, app: str) -> Origin | None:
    """Return what the database knows of the app's log, or None if it has not been tied to one yet."""
    with reads(engine).connect() as connection:
        known = connection.execute(select(stream).where(stream.c.app == app)).first()
        if known is None:
            return None
        furthest = connection.scalar(select(func.max(checkpoint.c.sequence))) or 0
        return Origin(known.created, known.partitions, furthest, known.anchor or 0, known.digest or "")


def register(
    engine: Engine, app: str, created: str, partitions: int, last: int, digest: str = "", origin: Origin | None = None
) -> None:
    """Tie this database to the app's log, or check that it is tied to this log already.

    Args:
        created: creation time of the log's stream.
        partitions: the stream's partition count.
        last: stream sequence of the last commit.
        digest: of the log's commit at the anchor; empty if there is none.
        origin: what `read_origin` returned before the log's end was asked for: the checkpoints may have moved since.

    Raises:
        SchemaError: this database was folded from another log, or from more commits than the log now contains.
    """
    origin = origin or read_origin(engine, app)
    if origin is not None and (doubt := origin.doubt(created, partitions, last, digest)):
        raise SchemaError(doubt)
    with engine.begin() as connection:
        if origin is not None:
            if origin.created != created:
                connection.execute(update(stream).where(stream.c.app == app).values(created=created))
            return
        if other := connection.scalar(select(stream.c.app)):
            raise SchemaError(f"this database belongs to the app {other!r}; give each app its own database")
        connection.execute(insert(stream).values(app=app, created=created, partitions=partitions, epoch=0))


def keep_anchor(engine: Engine, app: str, sequence: int, digest: str) -> None:
    """Keep a folded commit to recognise the log by. An older one than that which is kept is ignored."""
    with engine.begin() as connection:
        connection.execute(
            update(stream)
            .where(stream.c.app == app, func.coalesce(stream.c.anchor, 0) < sequence)
            .values(anchor=sequence, digest=digest)
        )
