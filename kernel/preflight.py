"""Checks settings on the running servers and changes nothing: for `eskernel config check`."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sqlalchemy import Engine, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from kernel.app import App
from kernel.errors import LogError
from kernel.log.jetstream import check_keeps_everything, partitions_of
from kernel.log.stream import ATOMIC, check_server, differences, find_config, treatment_of, wanted_config
from kernel.permissions import find_missing
from kernel.runtime.nats_server import find_binary
from kernel.settings import Settings
from kernel.settings.fields import shown
from kernel.settings.sources import changed
from kernel.transport.connection import ConnectionTrouble, NatsConnection
from kernel.transport.dial import dial
from kernel.transport.jetstream_api import call_api, version_text
from projections import SchemaError, schema
from projections.database import open_database, reads
from projections.database_check import check_usable
from projections.tables import stream
from projections.urls import database_url, sqlite_file

NEEDED_STREAMS = 2
"""For the log and the leases; a service without a stream for snapshots works too."""
Severity = Literal["ok", "warning", "error"]


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        what: name of the checked object.
        detail: result of the check.
        remedy: action that helps, empty if none is needed.
    """

    level: Severity
    what: str
    detail: str
    remedy: str = ""


async def examine(app: App, settings: Settings) -> list[Finding]:
    """Check each server, the stream, the database and the data directory."""
    found: list[Finding] = []
    if settings.embedded:
        found.append(_embedded(settings))
    stream_seen = False
    for url in settings.connection.servers:
        try:
            connection = await dial(
                changed(settings, {"connection.servers": url}),
                app=app.name,
                role="service",
                name=f"eskernel check {app.name}",
            )
        except ConnectionError as error:
            found.append(Finding("error", f"server {shown(url)}", str(error), "see connection and security"))
            continue
        try:
            found += await _server(connection, url, settings)
            if not stream_seen and found[-1].level != "error":
                stream_seen = True
                found += await _stream(connection, app, settings)
            found += await _permissions(connection, app, url, settings)
        finally:
            await connection.close()
    found += await asyncio.to_thread(check_database, app, settings)
    found.append(check_directory(settings.data / app.name))
    return found


def _embedded(settings: Settings) -> Finding:
    try:
        binary = find_binary()
    except LogError as error:
        return Finding("error", "embedded server", str(error))
    if given := sorted(settings.security.model_fields_set):
        return Finding("error", "embedded server", f"security.{given[0]} is for servers of connection.servers")
    return Finding("ok", "embedded server", f"the service starts {binary}, and checks the stream then")


async def _server(connection: NatsConnection, url: str, settings: Settings) -> list[Finding]:
    what = f"server {shown(url)}"
    try:
        check_server(connection)
    except LogError as error:
        return [Finding("error", what, str(error), "use a newer nats-server")]
    found = [Finding("ok", what, f"nats-server {version_text(connection)}")]
    version = connection.connected_server_version
    if (version.major, version.minor) < ATOMIC and settings.jetstream.group_commit == "always":
        detail = f"jetstream.group_commit = 'always' needs nats-server {'.'.join(map(str, ATOMIC))} or newer"
        found.append(Finding("error", what, detail, "use a newer nats-server, or 'auto'"))
    try:
        account = await call_api(connection, "INFO", None)
    except LogError as error:
        return [*found, Finding("error", f"JetStream of {shown(url)}", str(error), _why(connection))]
    return [*found, _account(account, url, settings)]


def _why(connection: NatsConnection) -> str:
    return connection.trouble or "enable JetStream on the server and for the account, and allow the user its API"


async def _permissions(connection: NatsConnection, app: App, url: str, settings: Settings) -> list[Finding]:
    what = f"permissions on {shown(url)}"
    try:
        missing = await find_missing(connection, app, settings)
    except (ConnectionTrouble, OSError, TimeoutError) as error:
        return [Finding("error", what, f"they can't be tried: {error}", "see connection and security")]
    remedy = "allow it; `eskernel config permissions APP` lists what a service needs"
    found = [
        Finding("error" if lack.needed else "warning", what, f"the user may not {lack.verb} to {lack.subject}", remedy)
        for lack in missing
    ]
    return found or [Finding("ok", what, "all that a service needs")]


def _account(account: dict[str, Any], url: str, settings: Settings) -> Finding:
    what, limits = f"JetStream of {shown(url)}", account.get("limits") or {}
    kind = "memory" if settings.stream.storage == "memory" else "storage"
    most, used = limits.get(f"max_{kind}", -1), account.get(kind, 0)
    streams, made = limits.get("max_streams", -1), account.get("streams", 0)
    detail = f"enabled; {made} streams of {_limit(streams)}, {used:,} bytes of {_limit(most)} in {_place(kind)}"
    if most == 0:
        return Finding("error", what, f"{detail}: the log has no room", f"raise the account's max_{_word(kind)}")
    if limits.get("max_memory", -1) == 0:
        return Finding("error", what, f"{detail}; no memory, which the leases need", "raise the account's max_mem")
    if 0 <= streams < NEEDED_STREAMS:
        remedy = "raise the account's max_streams: log and leases have one each, and snapshots a third"
        return Finding("error", what, f"{detail}: an app needs {NEEDED_STREAMS}", remedy)
    if 0 <= most < settings.stream.max_bytes:
        remedy = "raise the account's limit, or lower stream.max_bytes"
        return Finding("error", what, f"{detail}: less than stream.max_bytes", remedy)
    if 0 < most <= used * 1.1 or 0 < streams <= made + 1:
        return Finding("warning", what, detail, "the account's limits are nearly reached; raise them")
    return Finding("ok", what, detail)


def _word(kind: str) -> str:
    return "mem" if kind == "memory" else "file"


def _limit(value: int) -> str:
    return "any number" if value < 0 else f"{value:,}"


def _place(kind: str) -> str:
    return "memory" if kind == "memory" else "files"


async def _stream(connection: NatsConnection, app: App, settings: Settings) -> list[Finding]:
    stream = settings.stream
    version = connection.connected_server_version
    wanted = wanted_config(app.name, stream, (version.major, version.minor))
    what = f"stream {wanted['name']}"
    try:
        answer = await find_config(connection, wanted["name"])
        if answer is None:
            if stream.existing in ("validate", "skip"):
                detail = f"it does not exist, and stream.existing = {stream.existing!r} never creates it"
                return [Finding("error", what, detail, "create it, or set stream.existing = 'create'")]
            return [Finding("ok", what, "it does not exist; the service creates it")]
        config, state = answer["config"], answer["state"]
        partitions = partitions_of(config)
        found = [Finding("ok", what, f"{state['messages']:,} commits in {partitions} partitions")]
    except LogError as error:
        return [Finding("error", what, str(error), "choose another stream.name, or correct the stream")]
    if stream.existing in ("create", "validate"):
        try:
            check_keeps_everything(config, stream.may_lose_events)
        except LogError as error:
            remedy = "correct the stream, or set stream.existing = 'update', which changes it"
            found.append(Finding("error", what, str(error), remedy))
    if partitions != stream.partitions and "partitions" in stream.model_fields_set:
        level: Severity = "error" if stream.existing == "validate" else "warning"
        remedy = "the number of partitions can't be changed"
        found.append(Finding(level, what, f"it has {partitions} partitions, not {stream.partitions}", remedy))
    for difference in differences(config, wanted):
        treatment, fails = treatment_of(difference, stream, state)
        severity: Severity = "error" if fails else "warning"
        found.append(Finding(severity, f"{what}, {difference.field}", str(difference), treatment))
    return found


def check_database(app: App, settings: Settings) -> list[Finding]:
    """Check that the database can be reached and written, and that its tables fit this program."""
    address = settings.database.url_in((settings.data / app.name).absolute())
    what = f"database {shown(address)}"
    try:
        url = database_url(address)
        file = sqlite_file(url)
        if url.get_backend_name() == "sqlite" and not (file is not None and file.exists()):
            # opening the database would create it
            folder = file.parent if file is not None else Path()
            return [check_directory(folder, what, "it does not exist; the service creates it")]
        engine = open_database(address, **settings.database.options())
    except SchemaError as error:
        return [Finding("error", what, str(error))]
    try:
        check_usable(engine)
        return [_schema(engine, what), _writable(engine, what)]
    except SchemaError as error:
        return [Finding("error", what, str(error))]
    except (DBAPIError, PoolTimeout) as error:
        return [Finding("error", what, str(error).splitlines()[0], "see database.url; is the database running?")]
    finally:
        engine.dispose()


def compare_database(app: App, settings: Settings) -> list[Finding]:
    """Check the database as `check_database` does, and compare it with the app's projections. Nothing is changed."""
    import migrations  # it loads slowly

    found = check_database(app, settings)
    if any(finding.level == "error" for finding in found):
        return found
    address = settings.database.url_in((settings.data / app.name).absolute())
    what, url = f"database {shown(address)}", database_url(address)
    if url.get_backend_name() == "sqlite" and not (url.database and Path(url.database).exists()):
        address = "sqlite://"  # the database that a start creates is as empty as this one
    engine = open_database(address, **settings.database.options())
    try:
        with engine.connect() as connection:
            migrations.upgrade_within(connection)
            owner = connection.scalar(select(stream.c.app).where(stream.c.app != app.name))
            if owner is not None:
                detail = f"it belongs to the app {owner!r}"
                return [*found, Finding("error", what, detail, "give each app its own database")]
            examination = schema.examine(connection, app.projections)
            connection.rollback()
    except (DBAPIError, PoolTimeout) as error:
        return [*found, Finding("error", what, str(error).splitlines()[0], "may its user create tables?")]
    finally:
        engine.dispose()
    found += [Finding("error", what, problem) for problem in examination.problems]
    found += [
        Finding("ok", f"projection {name}", "its tables are those that the model declares")
        for name in examination.equal
    ]
    found += [
        Finding("ok", f"projection {name}", f"the next start builds it from the log: {reason}")
        for name, reason in examination.to_build.items()
    ]
    for view, names in examination.dependents.items():
        detail = f"a new version must keep the columns that these use: {', '.join(names)}"
        found.append(Finding("ok", f"view {view}", detail))
    for orphan in examination.orphans:
        stale = f"; these views are not kept up to date: {', '.join(map(str, orphan.views))}" if orphan.views else ""
        detail = f"the app does not declare it{stale}"
        remedy = f"drop it with `eskernel projections drop {orphan.name}`, if no other version of the app needs it"
        found.append(Finding("warning", f"projection {orphan.name}", detail, remedy))
    return found


def _schema(engine: Engine, what: str) -> Finding:
    import migrations  # it loads slowly

    with reads(engine).connect() as connection:
        found = migrations.current(connection)
    try:
        migrations.check(found)
    except SchemaError as error:
        return Finding("error", what, str(error))
    if found is None:
        return Finding("ok", what, "reachable; the service creates its tables at start")
    if found != migrations.head():
        head = migrations.head()
        return Finding(
            "ok", what, f"reachable; tables of revision {found}; the service upgrades them to {head} at start"
        )
    return Finding("ok", what, f"reachable; tables of revision {found}, the newest")


def _writable(engine: Engine, what: str) -> Finding:
    with engine.connect() as connection:
        try:
            connection.execute(text("CREATE TABLE eskernel_check (one INTEGER)"))
        except DBAPIError as error:
            remedy = "allow the database user to create tables"
            return Finding("error", what, f"not writable: {str(error.orig).splitlines()[0]}", remedy)
        finally:
            connection.rollback()
    return Finding("ok", what, "writable")


def check_directory(path: Path, what: str = "", detail: str = "writable") -> Finding:
    """Check that files can be created in a directory, with a temporary file in it or in its nearest existing parent."""
    what = what or f"data directory {path.absolute()}"
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno or 0)
        return Finding("error", what, f"{existing}: {reason}", "see the setting data")
    return Finding("ok", what, detail)
