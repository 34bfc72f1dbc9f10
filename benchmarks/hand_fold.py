"""The flights' projections by hand: fold into lists and dictionaries, one statement per table and batch."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import orjson
import psycopg

LONG_DELAY_MINUTES = 180

TABLES = """
CREATE TABLE aircraft (tail {text} PRIMARY KEY, flights integer, cancellations integer, diversions integer,
    air_minutes integer, miles integer, delay_minutes integer, last_airport {text});
CREATE TABLE airport_days (airport {text}, day {text}, departures integer, arrivals integer, cancellations integer,
    delay_minutes integer, PRIMARY KEY (airport, day));
CREATE TABLE long_delays (tail {text}, flight {text}, airport {text}, minutes integer, PRIMARY KEY (tail, flight));
CREATE TABLE checkpoint (id integer PRIMARY KEY, sequence bigint);
INSERT INTO checkpoint VALUES (1, 0)
"""
FLEET = """
INSERT INTO aircraft {rows} ON CONFLICT (tail) DO UPDATE SET flights = excluded.flights,
    cancellations = excluded.cancellations, diversions = excluded.diversions, air_minutes = excluded.air_minutes,
    miles = excluded.miles, delay_minutes = excluded.delay_minutes, last_airport = excluded.last_airport
"""
DAYS = """
INSERT INTO airport_days {rows} ON CONFLICT (airport, day) DO UPDATE SET
    departures = airport_days.departures + excluded.departures, arrivals = airport_days.arrivals + excluded.arrivals,
    cancellations = airport_days.cancellations + excluded.cancellations,
    delay_minutes = airport_days.delay_minutes + excluded.delay_minutes
"""
DELAYS = "INSERT INTO long_delays {rows}"
SHAPES = {FLEET: "tiiiiiit", DAYS: "ttiiii", DELAYS: "ttti"}
KINDS = {"t": "text", "i": "integer"}

Write = list[tuple[str, list[Any]]]


class Fold:
    """The state of all three projections, and which parts of it have changed."""

    def __init__(self) -> None:
        self.fleet: dict[str, list[Any]] = {}
        self._forget()

    def _forget(self) -> None:
        self.changed: dict[str, list[Any]] = {}
        self.days: dict[tuple[str, str], list[Any]] = {}
        self.delays: list[list[Any]] = []

    def take(self, payloads: list[bytes]) -> int:
        """Fold commits; return how many events they held."""
        fleet, changed, days = self.fleet, self.changed, self.days
        count = 0
        for payload in payloads:
            for event in orjson.loads(payload):
                count += 1
                tail, kind, data = event["subject"], event["type"], event["data"]
                row = fleet.get(tail)
                if row is None:
                    row = fleet[tail] = [tail, 0, 0, 0, 0, 0, 0, None]
                changed[tail] = row
                if kind == "Diverted":
                    row[3] += 1
                    continue
                airport = data["airport"] if kind == "Arrived" else data["origin"]
                day = days.get((airport, data["day"]))
                if day is None:
                    day = days[airport, data["day"]] = [airport, data["day"], 0, 0, 0, 0]
                if kind == "Departed":
                    row[1] += 1
                    row[5] += data["miles"]
                    row[7] = airport
                    day[2] += 1
                    day[5] += data["delay"]
                elif kind == "Arrived":
                    delay = data["delay"] or 0
                    row[4] += data["air_minutes"] or 0
                    row[6] += delay
                    row[7] = airport
                    day[3] += 1
                    if delay >= LONG_DELAY_MINUTES:
                        self.delays.append([tail, data["flight"], airport, delay])
                else:
                    row[2] += 1
                    day[4] += 1
        return count

    def write(self, prepare: Callable[[list[list[Any]]], list[Any]]) -> Write:
        """Return what has changed, ready for the driver, and start afresh."""
        groups = ((FLEET, self.changed), (DAYS, self.days), (DELAYS, self.delays))
        ready = [
            (statement, prepare(list(rows.values()) if isinstance(rows, dict) else rows))
            for statement, rows in groups
            if rows
        ]
        self._forget()
        return ready


class Sqlite:
    """The driver, with the settings that the kernel uses."""

    def __init__(self, path: str) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.executescript(
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA cache_size=-65536;" + TABLES.format(text="text")
        )
        self._statements = {
            # WHERE true: otherwise SQLite reads ON CONFLICT as a join condition
            statement: statement.format(
                rows=f"SELECT {', '.join(f'value->>{n}' for n in range(len(shape)))} FROM json_each(?) WHERE true"
            )
            for statement, shape in SHAPES.items()
        }

    @staticmethod
    def prepare(rows: list[list[Any]]) -> list[Any]:
        return [orjson.dumps(rows).decode()]

    def commit(self, write: Write, sequence: int) -> None:
        execute = self._connection.execute
        execute("BEGIN IMMEDIATE")
        execute("UPDATE checkpoint SET sequence = ?", (sequence,))
        for statement, values in write:
            execute(self._statements[statement], values)
        execute("COMMIT")

    def close(self) -> None:
        self._connection.close()


class Postgresql:
    """The driver, with the settings that the kernel uses."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, options="-c synchronous_commit=off")
        for statement in TABLES.format(text="text").split(";"):
            self._connection.execute(statement)
        self._connection.commit()
        self._statements = {
            statement: statement.format(
                rows=f"SELECT * FROM unnest({', '.join(f'%s::{KINDS[kind]}[]' for kind in shape)})"
            )
            for statement, shape in SHAPES.items()
        }

    @staticmethod
    def prepare(rows: list[list[Any]]) -> list[Any]:
        return [list(column) for column in zip(*rows, strict=True)]

    def commit(self, write: Write, sequence: int) -> None:
        execute = self._connection.execute
        execute("UPDATE checkpoint SET sequence = %s", (sequence,))
        for statement, values in write:
            execute(self._statements[statement], values)
        self._connection.commit()

    def close(self) -> None:
        self._connection.close()
