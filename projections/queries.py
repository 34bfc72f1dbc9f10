"""Reads the projection database for people: any SQL text, as rows by column name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Engine, text


def run_query(engine: Engine, sql: str, parameters: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return the rows of a query.

    Args:
        engine: opened with `read_only`.
        sql: a statement; parameters are written `:name`.

    Raises:
        sqlalchemy.exc.DBAPIError: the database refuses the statement, or can't be reached.
    """
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(text(sql), parameters or {}).mappings()]
