"""Alembic migrations of the kernel's own tables. Projection tables are never altered: they are rebuilt."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

from projections.errors import SchemaError

VERSION_TABLE = "eskernel_schema"


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes.update(connection=connection, version_table=VERSION_TABLE)
    return config


def upgrade(engine: Engine) -> None:
    """Bring the kernel's tables to the newest revision; does nothing when they are.

    Raises:
        SchemaError: they are newer than this program.
    """
    with engine.begin() as connection:
        upgrade_within(connection)


def upgrade_within(connection: Connection) -> None:
    """Do what `upgrade` does in a transaction that the caller ends."""
    found = current(connection)
    if found == head():
        return
    check(found)
    command.upgrade(_config(connection), "head")


def check(found: str | None) -> None:
    """Raise `SchemaError` if a database's revision is newer than this program."""
    scripts = ScriptDirectory.from_config(_config())
    if found is not None and found not in {script.revision for script in scripts.walk_revisions()}:
        raise SchemaError(
            f"the database has the kernel's tables of revision {found}, this program knows them up to {head()}: it "
            "is older than the one that made them; run the newer one"
        )


def head() -> str | None:
    """Return the newest revision that this program has."""
    return ScriptDirectory.from_config(_config()).get_current_head()


def current(connection: Connection) -> str | None:
    """Return the database's revision, None before the first migration."""
    return MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()
