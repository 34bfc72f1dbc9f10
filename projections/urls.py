"""Database URLs: reading what people write, and naming a database without its credentials."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from projections.errors import SchemaError

_FORMS = "use sqlite:///file.db or postgresql://user:password@host/name"
_DRIVERS = {"sqlite": "pysqlite", "postgresql": "psycopg"}
_SCHEME = re.compile(r"\s*([A-Za-z][\w+.-]*)://(.*)", re.DOTALL)
_OF_THE_PROGRAM = {"check_same_thread", "detect_types", "isolation_level"}
_OF_SQLITE, _NUMBERS = {"uri", "timeout", "cached_statements"}, {"timeout", "cached_statements"}
_LOCAL = ("", "localhost", "127.0.0.1", "::1")


def database_url(text: str) -> URL:
    """Return the URL with an explicit driver.

    A URL of SQLite holds a path, with `%3F` for a question mark and `%25` for a percent sign; with `?uri=true` it holds
    a URI of SQLite, `sqlite:///file:/path?uri=true`. A URL of PostgreSQL may name several hosts, separated by commas.

    Raises:
        SchemaError: the text is not a URL, or the database or its driver is not supported.
    """
    found = _SCHEME.fullmatch(text.rstrip("\n"))
    if found is None:
        raise SchemaError(f"database.url is not a URL; {_FORMS}")
    backend, _, driver = found[1].lower().partition("+")
    backend = "postgresql" if backend == "postgres" else backend
    if backend not in _DRIVERS:
        raise SchemaError(f"{backend!r} is not supported; {_FORMS}")
    if driver not in ("", _DRIVERS[backend]):
        raise SchemaError(
            f"database.url names the driver {driver!r}, and eskernel uses {_DRIVERS[backend]}: write {backend}://..."
        )
    return _sqlite_url(found[2]) if backend == "sqlite" else _postgresql_url(found[2])


def _sqlite_url(rest: str) -> URL:
    path, _, query = rest.partition("?")
    if path and not path.startswith("/"):
        raise SchemaError(
            "database.url names a host, and SQLite is a file: write sqlite:///file.db, or sqlite:////folder/file.db "
            "with an absolute path"
        )
    options = dict(parse_qsl(query, keep_blank_values=True))
    is_uri = path[1:].startswith("file:")
    if is_uri and options.get("uri", "").lower() not in ("true", "1", "yes", "on"):
        raise SchemaError("database.url is a URI of SQLite; add `uri=true` to it: sqlite:///file:...?uri=true")
    for name, value in options.items():
        if name in _OF_THE_PROGRAM or (name not in _OF_SQLITE and not is_uri):
            raise SchemaError(f"database.url sets {name!r}, which has no use here; remove it from the URL")
        if name in _NUMBERS and not re.fullmatch(r"\d+(\.\d+)?", value):
            raise SchemaError(f"database.url sets {name}={value}, which is not a number")
    # SQLite decodes its URIs itself
    database = path[1:] if is_uri else unquote(path[1:])
    return URL.create("sqlite", database=database or None, query=options)


def _postgresql_url(rest: str) -> URL:
    place, mark, more = re.fullmatch(r"([^/?]*)([/?]?)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr]
    who, at, hosts = place.rpartition("@")
    text = f"postgresql+psycopg://{who.replace('@', '%40')}{at}"
    several: list[tuple[str, str]] = []
    if "," in hosts:
        several = [("host", host.strip()) for host in hosts.split(",")]
    else:
        text += unquote(hosts) if hosts.startswith("[") else hosts
    try:
        url = make_url(f"{text}{mark}{more}")
    except (ArgumentError, ValueError) as error:
        why = "the port is not a number" if isinstance(error, ValueError) else "it can't be parsed"
        raise SchemaError(f"database.url is not a URL, {why}; {_FORMS}") from None
    if url.host and url.host.lower().startswith("%2f"):
        # libpq's form of a socket's folder
        url = url.update_query_dict({"host": unquote(url.host)})._replace(host=None)
    if several:
        url = url.update_query_pairs(several, append=True)
    return url


def sqlite_file(url: URL) -> Path | None:
    """Return the file of an SQLite database, or None if it is in memory, or not SQLite."""
    name = url.database or ""
    if url.get_backend_name() != "sqlite" or name in ("", ":memory:") or url.query.get("mode") == "memory":
        return None
    if name.startswith("file:"):
        name = unquote(re.sub(r"^file:(//[^/]*)?", "", name))
        if name in ("", ":memory:"):
            return None
    return Path(name).absolute()


def read_only_url(url: URL) -> URL:
    """Return the URL of the same SQLite database, which then can't be written."""
    file = sqlite_file(url)
    if file is None:
        return url
    return url.set(database=f"file:{quote(str(file))}", query={**url.query, "uri": "true", "mode": "ro"})


def readable_name(url: URL) -> str:
    """Return a name of the database for people: its host and name, or its file and machine, and no credentials."""
    here = socket.gethostname()
    if url.get_backend_name() == "sqlite":
        file = sqlite_file(url)
        return f"{file} on {here}" if file is not None else f"a database in memory on {here}"
    given = url.query.get("host")
    hosts = [given] if isinstance(given, str) else list(given or [url.host or ""])
    if url.host and url.port:
        hosts = [f"{url.host}:{url.port}"]
    shown = ",".join(host for host in hosts if host)
    local = all(host.rsplit(":", 1)[0] in _LOCAL or host.startswith("/") for host in hosts)
    name = url.database or url.username or ""
    return f"{shown}/{name} on {here}" if local else f"{shown}/{name}"
