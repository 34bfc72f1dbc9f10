"""The flights' projections with the `eventsourcing` library: a view with tracking, on SQLite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eventsourcing.persistence import Tracking
from eventsourcing.sqlite import SQLiteDatastore, SQLiteTrackingRecorder

TABLES = (
    "CREATE TABLE IF NOT EXISTS aircraft (tail text PRIMARY KEY, flights integer DEFAULT 0, cancellations integer "
    "DEFAULT 0, diversions integer DEFAULT 0, air_minutes integer DEFAULT 0, miles integer DEFAULT 0, delay_minutes "
    "integer DEFAULT 0, last_airport text)",
    "CREATE TABLE IF NOT EXISTS airport_days (airport text, day text, departures integer DEFAULT 0, arrivals integer "
    "DEFAULT 0, cancellations integer DEFAULT 0, delay_minutes integer DEFAULT 0, PRIMARY KEY (airport, day))",
    "CREATE TABLE IF NOT EXISTS long_delays (tail text, flight text, airport text, minutes integer, "
    "PRIMARY KEY (tail, flight))",
)
_AIRCRAFT = "INSERT INTO aircraft (tail, {columns}) VALUES (?, {values}) ON CONFLICT (tail) DO UPDATE SET {changes}"
_DAY = (
    "INSERT INTO airport_days (airport, day, {columns}) VALUES (?, ?, {values}) "
    "ON CONFLICT (airport, day) DO UPDATE SET {changes}"
)


def _add(pattern: str, table: str, *columns: str, replace: Sequence[str] = ()) -> str:
    changes = [f"{name} = {table}.{name} + excluded.{name}" for name in columns]
    changes += [f"{name} = excluded.{name}" for name in replace]
    every = [*columns, *replace]
    return pattern.format(columns=", ".join(every), values=", ".join("?" * len(every)), changes=", ".join(changes))


DEPARTED = _add(_AIRCRAFT, "aircraft", "flights", "miles", replace=["last_airport"])
ARRIVED = _add(_AIRCRAFT, "aircraft", "air_minutes", "delay_minutes", replace=["last_airport"])
DIVERTED = _add(_AIRCRAFT, "aircraft", "diversions")
CANCELLED = _add(_AIRCRAFT, "aircraft", "cancellations")
DAY_DEPARTED = _add(_DAY, "airport_days", "departures", "delay_minutes")
DAY_ARRIVED = _add(_DAY, "airport_days", "arrivals")
DAY_CANCELLED = _add(_DAY, "airport_days", "cancellations")
LONG_DELAY = "INSERT INTO long_delays VALUES (?, ?, ?, ?)"

Statements = list[tuple[str, tuple[Any, ...]]]


class SQLiteView(SQLiteTrackingRecorder):
    def __init__(self, datastore: SQLiteDatastore, **more: Any) -> None:
        super().__init__(datastore, **more)
        self.create_table_statements += TABLES

    def write(self, statements: Statements, tracking: Tracking) -> None:
        with self.datastore.transaction(commit=True) as cursor:
            self._insert_tracking(cursor, tracking)
            for statement, values in statements:
                cursor.execute(statement, values)
