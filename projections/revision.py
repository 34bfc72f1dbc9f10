"""The revision of the kernel's own tables, read without Alembic: a start with nothing to migrate need not load it."""

from __future__ import annotations

from sqlalchemy import Engine, inspect, text

HEAD = "0007"
"""The newest revision of `migrations/`."""
TABLE = "eskernel_schema"


def is_current(engine: Engine) -> bool:
    """Return whether the kernel's tables have the newest revision that this program knows."""
    with engine.connect() as connection:
        if not inspect(connection).has_table(TABLE):
            return False
        return list(connection.scalars(text(f"SELECT version_num FROM {TABLE}"))) == [HEAD]
