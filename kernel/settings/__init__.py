"""The settings of a service: one typed tree. A test shows the effect of each setting.

`load` reads the tree from a file, the environment and the command line. docs/configuration.md and
the command line's `--help` are generated from the docstrings here. Times are in seconds; sizes are in bytes, and a
text such as `64MiB` is accepted too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from annotated_types import Ge, Le
from pydantic import AfterValidator, model_validator

from kernel.settings.connection import Connection, Security
from kernel.settings.database import Batch, Database, DeadLetters, Deployment, Verification
from kernel.settings.fields import Section
from kernel.settings.governance import Backlog, Commands, Limit, Passivation, Policies, Rates, Snapshots
from kernel.settings.jetstream import Consumer, JetStream
from kernel.settings.observability import Http, Logging, Tracing
from kernel.settings.stream import Stream

__all__ = [
    "Backlog",
    "Batch",
    "Commands",
    "Connection",
    "Consumer",
    "Database",
    "DeadLetters",
    "Deployment",
    "Http",
    "JetStream",
    "Limit",
    "Loaded",
    "Logging",
    "Passivation",
    "Policies",
    "Rates",
    "Security",
    "Settings",
    "Snapshots",
    "Stream",
    "Tracing",
    "Verification",
    "load",
]


def _writable_name(path: Path) -> Path:
    # the path is written into the server's configuration and the service's description, which are UTF-8
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError("data: the directory's name is not valid in this locale's encoding; use UTF-8") from None
    if "\0" in str(path):
        raise ValueError("data: a directory's name can't contain a NUL character")
    return path


class Settings(Section):
    """The settings of a service. Create them in Python, or with `load`."""

    data: Annotated[Path, AfterValidator(_writable_name)] = Path(".eskernel")
    """Data directory: contains the embedded server's store, the SQLite database, and the description of the running
    service. Each app has its own folder in it."""
    workers: Annotated[int, Ge(1), Le(64)] = 1
    """Number of worker processes, which share the partitions. A service of the same app on another machine joins
    them."""
    lease: Annotated[float, Ge(0.5), Le(60)] = 3.0
    """Lease duration in seconds: a crashed or frozen worker loses its partitions after this long. Fixed when the lease
    bucket is created."""
    drain: Annotated[float, Ge(0)] = 20.0
    """Drain time in seconds: a service that stops waits this long for the commands that it has accepted."""
    connection: Connection = Connection()
    security: Security = Security()
    jetstream: JetStream = JetStream()
    stream: Stream = Stream()
    consumer: Consumer = Consumer()
    database: Database = Database()
    batch: Batch = Batch()
    passivation: Passivation = Passivation()
    snapshots: Snapshots = Snapshots()
    commands: Commands = Commands()
    dead_letters: DeadLetters = DeadLetters()
    policies: Policies = Policies()
    verification: Verification = Verification()
    deployment: Deployment = Deployment()
    backlog: Backlog = Backlog()
    rates: Rates = Rates()
    http: Http = Http()
    logging: Logging = Logging()
    tracing: Tracing = Tracing()

    @model_validator(mode="after")
    def _sync_only_embedded(self) -> Self:
        if self.stream.sync and not self.embedded:
            raise ValueError(
                "stream.sync is for the embedded server; with connection.servers set `sync_interval: always` in the "
                "configuration of these servers"
            )
        return self

    @property
    def embedded(self) -> bool:
        """True if the service starts its own nats-server: no server is configured."""
        return not self.connection.servers


from kernel.settings.sources import Loaded, load  # noqa: E402 - it reads into the tree above
