"""The format of log lines: text for people, or one JSON object per line.

The kernel's modules and the app's own code log with the standard library. The values of `extra` become fields.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import MutableMapping
from copy import copy
from types import TracebackType
from typing import TYPE_CHECKING, Any

import orjson

from kernel.settings import Logging

if TYPE_CHECKING:
    from kernel.log.repeats import Repeats

logger = logging.getLogger("eskernel.telemetry")
LIBRARIES = ("aiohttp", "alembic", "apscheduler", "asyncio", "nats", "opentelemetry", "sqlalchemy", "thespian")
"""Libraries whose messages are logged from the level `warning` on, whatever the configured level."""


def about(aggregate: str, aggregate_id: str, **more: object) -> dict[str, object]:
    """Return the fields of a line about an aggregate, for `extra`, without empty fields."""
    named = {name: value for name, value in more.items() if value not in (None, "")}
    return {"aggregate": aggregate, "aggregate_id": aggregate_id, **named}


class _Lines(logging.StreamHandler[Any]):
    """The one handler of the process, on standard error. Warnings of the kernel that repeat become one a minute."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__(sys.stderr)
        self.as_json = as_json
        self._repeats: Repeats | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING and record.name.startswith("eskernel"):
            if self._repeats is None:
                from kernel.log.repeats import Repeats  # with its room come libraries that a plain command can spare

                self._repeats = Repeats()
            # numbers with a fraction are measurements: they differ, and the line is the same
            given = record.args if isinstance(record.args, tuple) else (record.args,)
            same = [record.name, record.msg, *(part for part in given if not isinstance(part, float))]
            if (more := self._repeats.due(" ".join(map(str, same)))) is None:
                return
            if more:
                record = copy(record)
                record.msg, record.args = record.getMessage() + more, None
        super().emit(record)


def writes_json() -> bool:
    """Return whether log lines are JSON, so that programs read standard error."""
    return any(isinstance(handler, _Lines) and handler.as_json for handler in logging.getLogger().handlers)


def set_up(settings: Logging, app: str = "", worker: int = 0) -> None:
    """Configure this process to write log lines to standard error. It may be called again when the app is known.

    Args:
        app: name of the app, once it is loaded.
        worker: number of the worker; 0 for a service without workers and for the supervisor.
    """
    import structlog  # it loads slowly, and clients don't need it
    from structlog.dev import ConsoleRenderer, plain_traceback
    from structlog.processors import TimeStamper, UnicodeDecoder, format_exc_info
    from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_log_level, add_logger_name

    as_json = settings.format == "json"

    extra = ExtraAdder()

    def gather(logger: Any, method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        message = fields["event"]
        fields = extra(logger, method, fields)
        if fields["event"] is not message:
            # the app uses `event` as a field: in a line that is the key of the message
            fields["event"], fields["event_"] = message, fields["event"]
        if as_json and app:
            fields["app"] = app
        if as_json or worker:
            fields["worker"] = worker
        return fields

    colours = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    rendering: list[structlog.typing.Processor] = (
        [format_exc_info, UnicodeDecoder(), _render]
        if as_json
        else [ConsoleRenderer(colors=colours, exception_formatter=plain_traceback)]
    )
    handler = _Lines(as_json=as_json)
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=[gather, add_log_level, add_logger_name, TimeStamper(fmt="iso", utc=True)],
            processors=[ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    logging.captureWarnings(capture=True)
    sys.excepthook = _uncaught


def _render(_logger: object, _method: str, fields: MutableMapping[str, Any]) -> str:
    first = {name: fields.pop(name) for name in ("timestamp", "level", "event")}
    line = {**first, **fields}
    try:
        return orjson.dumps(line, default=repr, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:
        # orjson refuses some integers and texts; the line must be written all the same
        return json.dumps(line, default=repr, skipkeys=True)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, Exception):
        logger.critical("%s: %s", kind.__name__, error, exc_info=(kind, error, trace))
    else:
        sys.__excepthook__(kind, error, trace)
