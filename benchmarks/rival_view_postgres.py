"""The same view on PostgreSQL. It has its own module because the library needs psycopg-pool for it."""

from __future__ import annotations

from typing import Any

from eventsourcing.persistence import Tracking
from eventsourcing.postgres import PostgresDatastore, PostgresTrackingRecorder
from psycopg.sql import SQL

from benchmarks.rival_view import TABLES, Statements


class PostgresView(PostgresTrackingRecorder):
    def __init__(self, datastore: PostgresDatastore, **more: Any) -> None:
        super().__init__(datastore, **more)
        self.sql_create_statements += [SQL(table).format() for table in TABLES]  # type: ignore[arg-type]

    def write(self, statements: Statements, tracking: Tracking) -> None:
        with self.datastore.transaction(commit=True) as cursor:
            self._insert_tracking(cursor, tracking)
            for statement, values in statements:
                cursor.execute(statement.replace("?", "%s"), values, prepare=True)
