"""Finds the refused ones of many rows: each row is written alone, and the database is called once for all of them.

On PostgreSQL a block of PL/pgSQL writes them, on SQLite the driver, which runs in this process. To ask about ever
smaller parts takes more statements where many rows are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import orjson
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from projections.bulk import CHUNK, Bulk
from projections.database import FAULTS_OF_DATA
from projections.row_codec import Row

How = Literal["upsert", "add", "put"]
"""`put` deletes the row first if the table `replaces`."""
_ACCEPTED = "ESOK0"
"""SQLSTATE with which the block takes a row back that it was only to try."""
_BLOCK = """
DO $eskernel$
#variable_conflict use_column
DECLARE
    eskernel_row json; eskernel_place int := -1; eskernel_refused json[];
    eskernel_state text; eskernel_message text; eskernel_detail text;
BEGIN
    FOR eskernel_row IN SELECT value FROM json_array_elements(CAST(current_setting('eskernel.rows') AS json)) LOOP
        eskernel_place := eskernel_place + 1;
        BEGIN
            {statements}
        EXCEPTION WHEN OTHERS THEN
            IF SQLSTATE <> '{accepted}' THEN
                IF left(SQLSTATE, 2) NOT IN ({blamed}) THEN RAISE; END IF;
                GET STACKED DIAGNOSTICS eskernel_state = RETURNED_SQLSTATE,
                    eskernel_message = MESSAGE_TEXT, eskernel_detail = PG_EXCEPTION_DETAIL;
                eskernel_refused := array_append(eskernel_refused, json_build_array(
                    eskernel_place, eskernel_state, eskernel_message, eskernel_detail));
            END IF;
        END;
    END LOOP;
    PERFORM set_config('eskernel.refused', CAST(coalesce(array_to_json(eskernel_refused), '[]') AS text), true);
END $eskernel$"""


def refused_rows(
    connection: Connection, bulk: Bulk, rows: Sequence[Row], how: How, *, keep: bool = True
) -> dict[int, Exception]:
    """Write each row alone. Return by place the rows that the database refuses, and why; nothing is left of them.

    Args:
        keep: leave the other rows written. Otherwise each is taken back before the next one is tried.

    Raises:
        sqlalchemy.exc.DBAPIError: the database failed, or no data is to blame.
    """
    cursor: Any = connection.connection.cursor()
    if connection.dialect.name != "postgresql":
        return _on_sqlite(connection, cursor, bulk, rows, how, keep)
    refused: dict[int, Exception] = {}
    for start in range(0, len(rows), CHUNK):
        found = _on_postgresql(connection, cursor, bulk, rows[start : start + CHUNK], how, keep)
        refused |= {start + place: error for place, error in found.items()}
    return refused


def _on_postgresql(
    connection: Connection, cursor: Any, bulk: Bulk, rows: Sequence[Row], how: How, keep: bool
) -> dict[int, Exception]:
    statements = [f"{bulk.insert_one} {bulk.conflicts['add' if how == 'add' else 'upsert']};"]
    if how == "put" and bulk.replaces:
        statements.insert(0, f"{bulk.delete_one};")
    if not keep:
        statements.append(f"RAISE EXCEPTION USING ERRCODE = '{_ACCEPTED}';")
    blamed = ", ".join(f"'{state}'" for state in FAULTS_OF_DATA)
    block = _BLOCK.format(statements="\n".join(statements), accepted=_ACCEPTED, blamed=blamed)
    driver = connection.dialect.loaded_dbapi
    try:
        cursor.execute("SELECT set_config('eskernel.rows', %s, true)", (orjson.dumps(rows).decode(),))
        cursor.execute(block)
        cursor.execute("SELECT current_setting('eskernel.refused'), set_config('eskernel.rows', '', true)")
    except driver.Error as error:
        raise _wrapped(error, block, connection) from error
    found: dict[int, Exception] = {}
    for place, state, message, detail in orjson.loads(cursor.fetchone()[0]):
        kind = driver.errors.lookup(state)
        found[place] = _wrapped(kind(f"{message}\nDETAIL:  {detail}" if detail else message), block, connection)
    return found


def _on_sqlite(
    connection: Connection, cursor: Any, bulk: Bulk, rows: Sequence[Row], how: How, keep: bool
) -> dict[int, Exception]:
    insert = f"{bulk.insert_one} {bulk.conflicts['add' if how == 'add' else 'upsert']}"
    delete = bulk.delete_one if how == "put" and bulk.replaces else ""
    # in the form in which statements for many rows carry them
    carried = orjson.loads(orjson.dumps(rows))
    if delete or not keep:
        return _each_undone(connection, cursor, carried, delete, bulk.codec.columns.keys, insert, keep)
    driver = connection.dialect.loaded_dbapi
    refused: dict[int, Exception] = {}
    place = -1

    def given() -> Iterator[Row]:
        nonlocal place
        for place, row in enumerate(carried):  # noqa: B007 - the place at which the driver stops
            yield row

    left = given()
    while len(refused) <= len(rows):
        try:
            # each row is a statement of its own: one that fails leaves nothing behind, and those before it stay
            cursor.executemany(insert, left)
            break
        except driver.Error as error:
            refused[place] = _refusal(connection, cursor, insert, error)
    return refused


def _each_undone(
    connection: Connection, cursor: Any, rows: Sequence[Row], delete: str, keys: int, insert: str, keep: bool
) -> dict[int, Exception]:
    """Write rows of which nothing is left if they are refused, or if none is to be kept."""
    driver = connection.dialect.loaded_dbapi
    refused: dict[int, Exception] = {}
    for place, row in enumerate(rows):
        cursor.execute("SAVEPOINT one_row")
        try:
            if delete:
                cursor.execute(delete, row[:keys])
            cursor.execute(insert, row)
        except driver.Error as error:
            refused[place] = _refusal(connection, cursor, insert, error)
        if not keep or place in refused:
            cursor.execute("ROLLBACK TO SAVEPOINT one_row")
        cursor.execute("RELEASE SAVEPOINT one_row")
    return refused


def _refusal(connection: Connection, cursor: Any, statement: str, error: Exception) -> Exception:
    wrapped = _wrapped(error, statement, connection)
    if not cursor.connection.in_transaction:
        raise wrapped from error  # a trigger of the app's has rolled back everything
    return wrapped


def _wrapped(error: Exception, statement: str, connection: Connection) -> Exception:
    base: type[Exception] = connection.dialect.loaded_dbapi.Error
    return DBAPIError.instance(statement, None, error, base, dialect=connection.dialect)
