"""PostgreSQL: what the URL says about connections, and the settings of each session, through poolers too.

A session's settings are sent when a connection is made, as the startup parameter `options`. A pooler in transaction
mode refuses or ignores that parameter, because a connection to it is not a session of the server. Then each
transaction begins with a statement that sets them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL

from projections.errors import SchemaError

_KEEP_ALIVE = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
"""They detect a host that has disappeared after seconds instead of hours."""
_OURS = {
    # what is read back must not depend on the server's configuration
    "TimeZone": "UTC",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "standard_conforming_strings": "on",
}
_MARK = "eskernel.session"
"""A setting that the server does not know: a session that has it has got the others too."""
_OPTIONS_REFUSED = re.compile(r"startup parameter|command.line option", re.IGNORECASE)
_OPTION = re.compile(r"(?:\\.|[^\\\s])+", re.DOTALL)
_SETTING = re.compile(r"(?:-c|--)([\w.-]+)=(.*)", re.DOTALL)
_NEVER = {"", "none", "null", "off", "false", "no", "never"}
_OF_THE_PROGRAM = {"autocommit", "cursor_factory", "row_factory", "context", "client_encoding"}


def session_settings(url: URL, **defaults: str) -> tuple[dict[str, str], list[str]]:
    """Return the settings of each session, and those options of the URL that are not settings.

    Args:
        defaults: settings that `options` of the URL may replace.

    Raises:
        SchemaError: the options can't be read.
    """
    given = re.sub(r"(^|\s)-c\s+", r"\1-c", " ".join(_all(url, "options")))
    settings, others = dict(defaults), []
    for option in map(_unescape, _OPTION.findall(given)):
        found = _SETTING.fullmatch(option)
        if found is None:
            others.append(option)
            continue
        name = found[1].replace("-", "_")
        known = next((own for own in settings if own.lower() == name.lower()), name)
        settings[known] = found[2]
    ours = {name.lower() for name in _OURS}
    return {name: value for name, value in settings.items() if name.lower() not in ours} | _OURS, others


def _all(url: URL, name: str) -> list[str]:
    given = url.query.get(name, ())
    return [given] if isinstance(given, str) else list(given)


def _unescape(option: str) -> str:
    return re.sub(r"\\(.)", r"\1", option, flags=re.DOTALL)


def _escape(option: str) -> str:
    return re.sub(r"([\\\s])", r"\\\1", option)


def startup_options(settings: Mapping[str, str], others: Iterable[str] = ()) -> str:
    """Return the startup parameter `options`."""
    return " ".join([*(f"-c {_escape(f'{name}={value}')}" for name, value in settings.items()), *map(_escape, others)])


def connection_arguments(url: URL, connect_timeout: int) -> tuple[URL, dict[str, Any]]:
    """Return the URL and the driver's arguments. What the URL says goes before what the settings say.

    Raises:
        SchemaError: a value of the URL's query can't be used.
    """
    query = {name: value for name, value in url.query.items() if name != "options"}
    for name in query:
        if name in _OF_THE_PROGRAM and not (name == "client_encoding" and _is_utf8(_all(url, name))):
            raise SchemaError(f"database.url sets {name!r}, which eskernel sets itself; remove it from the URL")
    repeated = [name for name, value in query.items() if not isinstance(value, str) and name not in ("host", "port")]
    if repeated:
        raise SchemaError(f"database.url sets {repeated[0]!r} more than once; keep one")
    arguments: dict[str, Any] = {"connect_timeout": connect_timeout, **_KEEP_ALIVE, "client_encoding": "utf8"}
    arguments = {name: value for name, value in arguments.items() if name not in query or name == "client_encoding"}
    if "prepare_threshold" in query:
        arguments["prepare_threshold"] = _threshold(str(query["prepare_threshold"]))
    for name in ("connect_timeout", "keepalives", *_KEEP_ALIVE):
        if name in query and not re.fullmatch(r"-?\d+", str(query[name]).strip()):
            raise SchemaError(f"database.url sets {name}={query[name]}, which is not a whole number")
    own = ("prepare_threshold", "client_encoding")
    return url.set(query={name: value for name, value in query.items() if name not in own}), arguments


def _is_utf8(values: list[str]) -> bool:
    return all(value.lower().replace("-", "") in ("utf8", "unicode") for value in values)


def _threshold(text: str) -> int | None:
    """Return after how many executions the server prepares a statement; None is never, and so is 0."""
    text = text.strip().lower()
    if text in _NEVER:
        return None
    if not re.fullmatch(r"-?\d+", text):
        raise SchemaError(f"database.url sets prepare_threshold={text}: use a whole number, or none")
    return int(text) if int(text) > 0 else None


def check_parameters(engine: Engine) -> None:
    """Raise `SchemaError` if the URL has a parameter that the driver does not know."""
    driver: Any = engine.dialect.dbapi
    known = {option.keyword.decode() for option in driver.pq.Conninfo.get_defaults()}
    if unknown := sorted(set(engine.url.query) - known):
        raise SchemaError(f"database.url sets {unknown[0]!r}, which PostgreSQL's connections don't have; remove it")


def keeps_session(connection: Connection) -> bool:
    """Return whether all transactions of the connection are in one session of the server, as far as can be known."""
    found = connection.exec_driver_sql("SELECT current_setting(%s, true)", (_MARK,)).scalar()
    return bool(found == "1")


class Sessions:
    """Gives every session or transaction of an engine its settings.

    Attributes:
        pooled: True once it is known that a pooler lies between: each transaction then sets them itself.
    """

    def __init__(self, engine: Engine, settings: Mapping[str, str], others: list[str], prepares: bool) -> None:
        self._settings, self._others, self._prepares = dict(settings), others, prepares
        self._options = startup_options({**settings, _MARK: "1"}, others)
        self._statement = "SELECT " + ", ".join("set_config(%s, %s, true)" for _ in settings)
        self._values = tuple(part for setting in settings.items() for part in setting)
        self.pooled = False
        event.listen(engine, "do_connect", self._connect)
        event.listen(engine, "connect", self._connected)
        event.listen(engine, "begin", self._begin)

    def _connect(self, dialect: Any, _record: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
        if not self.pooled:
            try:
                return dialect.connect(*arguments, **{**keywords, "options": self._options})
            except dialect.dbapi.OperationalError as error:
                if not _OPTIONS_REFUSED.search(str(error)):
                    raise
            self._note_pooler()
        return dialect.connect(*arguments, **keywords)

    def _connected(self, connection: Any, _record: Any) -> None:
        if not self.pooled:
            connection.autocommit = True
            found = connection.execute("SELECT current_setting(%s, true)", [_MARK]).fetchone()
            connection.autocommit = False
            if found[0] != "1":
                self._note_pooler()
        if self.pooled and not self._prepares:
            # the next transaction may be at another session of the server, which has not prepared the statement
            connection.prepare_threshold = None

    def _note_pooler(self) -> None:
        if self._others:
            raise SchemaError(
                f"database.url leads to a pooler, which does not take the option {self._others[0]!r}: only settings "
                "work there, as in options=-c name=value"
            )
        self.pooled = True

    def _begin(self, connection: Connection) -> None:
        if self.pooled:
            connection.exec_driver_sql(self._statement, self._values)
