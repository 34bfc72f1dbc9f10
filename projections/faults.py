"""What the database says when it refuses a row."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError

_SCHEMA = {"42P01", "42703", "3F000", "42P10"}
"""SQLSTATE of a table, a column, a schema or a key that isn't there."""
_UNIQUE, _FOREIGN_KEY = "23505", "23503"
_SQLITE_UNIQUE, _SQLITE_FOREIGN_KEY = {1555, 2067}, {787}


def is_about_schema(error: BaseException) -> bool:
    """Return whether a table, a column or a key is missing: no data is to blame."""
    if not isinstance(error, DBAPIError):
        return False
    return getattr(error.orig, "sqlstate", None) in _SCHEMA or str(error.orig).startswith("no such ")


def _is(error: BaseException | None, state: str, codes: set[int]) -> bool:
    if not isinstance(error, DBAPIError):
        return False
    found = getattr(error.orig, "sqlstate", None), getattr(error.orig, "sqlite_errorcode", None)
    return found[0] == state or found[1] in codes


def may_pass(error: BaseException | None) -> bool:
    """Return whether a value is another row's at present, which may give it up when its own events are folded."""
    return _is(error, _UNIQUE, _SQLITE_UNIQUE)


def is_about_reference(error: BaseException) -> bool:
    """Return whether a row refers to one that isn't there, and may be written later."""
    return _is(error, _FOREIGN_KEY, _SQLITE_FOREIGN_KEY)
