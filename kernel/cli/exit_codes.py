"""The exit codes of the command line: each class of errors has one."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Final

from aggregates import DeclarationError, EskernelError, InvalidId, InvalidMessage
from kernel.errors import (
    AlreadyRunning,
    AppNotFound,
    CommandTimeout,
    LimitsError,
    LogError,
    NoDatabase,
    NotDeclared,
    NotRunning,
    QueryTimeout,
    SettingsError,
    WorkersFailed,
)

FAILED: Final = 1
"""The request was refused, or failed."""
USAGE: Final = 2
"""The usage, the settings or the declarations are wrong."""
UNREACHABLE: Final = 3
"""No service is running, or it does not answer."""

_CODES: Final[list[tuple[type[BaseException], int]]] = [
    *((kind, USAGE) for kind in (AppNotFound, SettingsError, LimitsError, NotDeclared, NoDatabase)),
    *((kind, USAGE) for kind in (DeclarationError, InvalidId, InvalidMessage)),
    *((kind, UNREACHABLE) for kind in (NotRunning, AlreadyRunning, WorkersFailed, CommandTimeout, QueryTimeout)),
    *((kind, UNREACHABLE) for kind in (LogError, ConnectionError, TimeoutError)),
    *((kind, FAILED) for kind in (EskernelError, OSError)),
]


def exit_code_of(error: type[BaseException]) -> int | None:
    """Return the exit code of a class of errors, or None if it is a bug, which is reported with a traceback."""
    if is_database_error(error):
        return FAILED
    return next((code for kind, code in _CODES if issubclass(error, kind)), None)


def exit_code_of_worker(kinds: Collection[str]) -> int:
    """Return the exit code of a worker's error, as one worker alone would have it, from the names of its classes."""
    if not kinds:
        return UNREACHABLE
    return next((code for kind, code in _CODES if kind.__name__ in kinds), FAILED)


def is_database_error(error: type[BaseException]) -> bool:
    """Return whether SQLAlchemy raises this class of errors for what a database answered."""
    # code that raises such an error has imported SQLAlchemy; other commands must not wait for that import
    loaded = sys.modules.get("sqlalchemy.exc")
    return loaded is not None and issubclass(error, loaded.DBAPIError)
