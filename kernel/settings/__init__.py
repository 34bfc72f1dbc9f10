"""What a service can be told: one typed tree. Every field does what it says, and a test shows its effect.

`load` reads it from a file, the environment and the command line; docs/configuration.md is made of the texts here.
Times are in seconds, sizes in bytes (`64MiB` is understood too).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from annotated_types import Ge, Le
from pydantic import model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from kernel.settings.connection import Connection, Security
from kernel.settings.database import Batch, Database, DeadLetters
from kernel.settings.governance import Backlog, Commands, Limit, Passivation, Rates
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
    "Http",
    "JetStream",
    "Limit",
    "Loaded",
    "Logging",
    "Passivation",
    "Rates",
    "Security",
    "Settings",
    "Stream",
    "Tracing",
    "load",
]


class Settings(BaseSettings):
    """Settings of a service. Made in Python, or with `load`."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True
    )

    data: Path = Path(".eskernel")
    """Directory for what the service keeps itself: the embedded server's store, the SQLite database, the description
    of the running service. Each app has a folder of its own in it."""
    workers: Annotated[int, Ge(1), Le(64)] = 1
    """Processes that share the partitions; the same service on another machine joins them."""
    lease: Annotated[float, Ge(0.5), Le(60)] = 3.0
    """After which a worker that is gone, or frozen, has lost its partitions to the others; used when the leases'
    bucket is created."""
    drain: Annotated[float, Ge(0)] = 20.0
    """A stop waits so long for commands under way."""
    connection: Connection = Connection()
    security: Security = Security()
    jetstream: JetStream = JetStream()
    stream: Stream = Stream()
    consumer: Consumer = Consumer()
    database: Database = Database()
    batch: Batch = Batch()
    passivation: Passivation = Passivation()
    commands: Commands = Commands()
    dead_letters: DeadLetters = DeadLetters()
    backlog: Backlog = Backlog()
    rates: Rates = Rates()
    http: Http = Http()
    logging: Logging = Logging()
    tracing: Tracing = Tracing()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - pydantic's signature
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read nothing but what is given; `load` reads files and environment."""
        return (init_settings,)

    @model_validator(mode="after")
    def _its_own_server(self) -> Self:
        if self.stream.sync and not self.embedded:
            raise ValueError(
                "stream.sync is for the embedded server; with connection.servers set `sync_interval: always` in the "
                "configuration of those"
            )
        return self

    @property
    def embedded(self) -> bool:
        """Whether the service starts a server of its own."""
        return not self.connection.servers


from kernel.settings.sources import Loaded, load  # noqa: E402 - it reads into the tree above
