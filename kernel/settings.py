"""What a service can be told. Every field does what it says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kernel.log.appender import GroupCommit

DEFAULT_DATA = Path(".eskernel")


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a service.

    Attributes:
        data: directory for everything that the service keeps itself: the embedded server's store, the SQLite
            database, the description of the running service. Each app has a folder of its own in it.
        nats: URL of a NATS server (several separated by commas); None starts the embedded one.
        database: SQLAlchemy URL of the projection database; None is SQLite in the data directory.
        partitions: of the stream, used when it is created.
        replicas: of the stream, used when it is created.
        sync: the embedded server waits for the disk at every commit, so that a power cut loses nothing.
        group_commit: whether commits that are ready together go out as one atomic batch: "auto" measures.
        host, port: where HTTP listens; port 0 takes a free one.
        max_actors: how many aggregates stay live; the least recently used go first.
        idle: seconds without use after which an aggregate is passivated.
        max_commands: commands under way; more are refused with a time to retry after.
        lease: seconds after which a worker that is gone, or frozen, has lost its partitions to the others; used when
            the leases' bucket is created.
        retry_after: seconds until an event is folded again whose projection handler failed with something transient;
            doubled at each further failure, up to five minutes.
        retries: how often that is tried; then the event waits for somebody to decide. 0 is never.
        drain: seconds that a stop waits for commands under way.
    """

    data: Path = DEFAULT_DATA
    nats: str | None = None
    database: str | None = None
    partitions: int = 64
    replicas: int = 1
    sync: bool = False
    group_commit: GroupCommit = "auto"
    host: str = "127.0.0.1"
    port: int = 0
    max_actors: int = 50_000
    idle: float = 300.0
    max_commands: int = 10_000
    lease: float = 3.0
    retry_after: float = 1.0
    retries: int = 10
    drain: float = 20.0
