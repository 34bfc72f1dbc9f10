"""Deadlocks: the database ends one of the transactions that stood in each other's way. It is tried again at once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import Engine, event
from sqlalchemy.exc import DBAPIError

T = TypeVar("T")
ATTEMPTS = 20
"""After so many failures the error is the caller's, who waits longer."""
AT_ONCE = 3
"""Attempts without a pause before them."""
PAUSE_S = 0.05
"""Longest pause before a later attempt. It is random, so that two transactions don't meet again."""
_STATES = ("40P01", "40001")
"""SQLSTATE of a deadlock, and of a serialization failure."""


def is_contention(error: BaseException | None) -> bool:
    """Return whether the database ended a transaction since it stood in another one's way."""
    return isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) in _STATES


def outlast_contention(work: Callable[[], T]) -> T:
    """Do some work in a transaction of its own, again if a deadlock ends it.

    Raises:
        sqlalchemy.exc.DBAPIError: the database failed in another way, or ended the transaction `ATTEMPTS` times.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return work()
        except DBAPIError as error:
            if not is_contention(error):
                raise
        if attempt >= AT_ONCE:
            time.sleep(random.uniform(0, PAUSE_S))
    return work()


def count_contention(engine: Engine, count: Callable[[], None]) -> None:
    """Have each deadlock of an engine's transactions counted."""

    @event.listens_for(engine, "handle_error")
    def _failed(context: Any) -> None:
        if is_contention(context.sqlalchemy_exception):
            count()
