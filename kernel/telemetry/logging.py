"""How log lines are written: for people, or one JSON object a line.

Modules, and the app's own code, log with the standard library; what they give as `extra` becomes fields of the line.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import MutableMapping
from types import TracebackType
from typing import Any

import orjson

from kernel.settings import Logging

logger = logging.getLogger("eskernel.telemetry")
LIBRARIES = ("aiohttp", "alembic", "apscheduler", "asyncio", "nats", "opentelemetry", "sqlalchemy", "thespian")
"""Heard from warnings upwards, whatever the level: their information is about themselves."""


def about(aggregate: str, aggregate_id: str, **more: object) -> dict[str, object]:
    """Return the fields of a line about one aggregate, for `extra`; those that are empty are left out."""
    named = {name: value for name, value in more.items() if value not in (None, "")}
    return {"aggregate": aggregate, "aggregate_id": aggregate_id, **named}


class _Lines(logging.StreamHandler[Any]):
    """The one handler of the process, on standard error."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__(sys.stderr)
        self.as_json = as_json


def writes_json() -> bool:
    """Say whether standard error is read by programs."""
    return any(isinstance(one, _Lines) and one.as_json for one in logging.getLogger().handlers)


def set_up(settings: Logging, app: str = "", worker: int = 0) -> None:
    """Have this process write its log lines to standard error; may be called again when more is known.

    Args:
        app: name of the app, once it is loaded.
        worker: number of the worker in its group; 0 is a process on its own, or the group's parent.
    """
    import structlog  # takes its time to load, and clients do without
    from structlog.dev import ConsoleRenderer, plain_traceback
    from structlog.processors import TimeStamper, UnicodeDecoder, format_exc_info
    from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_log_level, add_logger_name

    as_json = settings.format == "json"

    extra = ExtraAdder()

    def gather(logger: Any, method: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        message = fields["event"]
        fields = extra(logger, method, fields)
        if fields["event"] is not message:
            # an app may well name a field so; in a line that is the message's name
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
        # an integer or a text that orjson does not take must not cost the line
        return json.dumps(line, default=repr, skipkeys=True)


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, Exception):
        logger.critical("%s: %s", kind.__name__, error, exc_info=(kind, error, trace))
    else:
        sys.__excepthook__(kind, error, trace)
