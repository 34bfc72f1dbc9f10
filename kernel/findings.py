"""What `eskernel config check` finds out about the database and the data directory; nothing is changed by it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Literal, NamedTuple

from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from kernel.app import App
from kernel.settings import Settings
from kernel.settings.fields import shown
from projections import SchemaError
from projections.database import database_url, open_database, reads

Level = Literal["ok", "warning", "error"]


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        told: what was found.
        remedy: what to do, if there is something.
    """

    level: Level
    what: str
    told: str
    remedy: str = ""


def look_at_database(app: App, settings: Settings) -> list[Finding]:
    """Find out whether the database can be reached and written, and whether its tables are of this program."""
    text_ = settings.database.url or f"sqlite:///{(settings.data / app.name).absolute() / 'projections.db'}"
    what = f"database {shown(text_)}"
    try:
        url = database_url(text_)
    except SchemaError as error:
        return [Finding("error", what, str(error))]
    if url.get_backend_name() == "sqlite" and not (url.database and Path(url.database).exists()):
        # opening would make it
        return [look_at_directory(Path(url.database or ".").parent, what, "a new one is made at start")]
    engine = open_database(text_, **settings.database.options())
    try:
        return [_schema(engine, what), _writable(engine, what)]
    except (DBAPIError, PoolTimeout) as error:
        return [Finding("error", what, str(error).splitlines()[0], "see database.url; is the database running?")]
    finally:
        engine.dispose()


def _schema(engine: Engine, what: str) -> Finding:
    import migrations  # takes its time to load

    with reads(engine).connect() as connection:
        found = migrations.current(connection)
    try:
        migrations.check(found)
    except SchemaError as error:
        return Finding("error", what, str(error))
    if found is None:
        return Finding("ok", what, "reachable; the kernel's tables are made at start")
    if found != migrations.head():
        return Finding("ok", what, f"reachable; tables of revision {found}, brought to {migrations.head()} at start")
    return Finding("ok", what, f"reachable; tables of revision {found}, the newest")


def _writable(engine: Engine, what: str) -> Finding:
    with engine.connect() as connection:
        try:
            connection.execute(text("CREATE TABLE eskernel_check (one INTEGER)"))
        except DBAPIError as error:
            remedy = "the service makes tables: its user needs to be allowed to"
            return Finding("error", what, f"not writable: {str(error.orig).splitlines()[0]}", remedy)
        finally:
            connection.rollback()
    return Finding("ok", what, "writable")


def look_at_directory(path: Path, what: str = "", told: str = "writable") -> Finding:
    """Find out whether files could be made there, by making one that has no name, in what exists of it."""
    what = what or f"data directory {path.absolute()}"
    there = path.absolute()
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return Finding("error", what, f"{there}: {error.strerror or os.strerror(error.errno or 0)}", "see data")
    return Finding("ok", what, told)
