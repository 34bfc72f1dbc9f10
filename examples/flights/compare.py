"""Comparing every number in the projections with a group-by over the CSV that does not use the kernel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

from sqlalchemy import Engine, select

from examples.flights import LONG_DELAY_MINUTES, AircraftTotals, AirportDay, LongDelay

Table = dict[tuple[Any, ...], tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One column of one table: its sum, or count of distinct values, on both sides, and how many rows differ in it."""

    table: str
    column: str
    rows: int
    projected: Any
    expected: Any
    different: int


def expected(rows: Iterable[dict[str, str]]) -> dict[str, Table]:
    """Return the expected content of the tables, by table and key, from the file's rows alone."""
    fleet: dict[str, list[Any]] = defaultdict(lambda: [0, 0, 0, 0, 0, 0, None])
    latest: dict[str, tuple[datetime, int]] = {}
    days: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    late: Table = {}
    for number, row in enumerate(rows):
        tail = row["tailnum"]
        if tail in ("", "NA"):
            continue
        day = f"{row['year']}-{int(row['month']):02}-{int(row['day']):02}"
        numbers = fleet[tail]
        origin, destination = row["origin"], row["dest"]
        if row["dep_time"] in ("", "NA"):
            numbers[1] += 1
            days[origin, day][2] += 1
            continue
        numbers[0] += 1
        numbers[4] += int(row["distance"])
        days[origin, day][0] += 1
        days[origin, day][3] += int(row["dep_delay"])
        left = datetime.fromisoformat(row["time_hour"]) + timedelta(minutes=int(row["minute"]) + int(row["dep_delay"]))
        _latest(numbers, latest, tail, origin, (left, number * 2))
        if row["arr_time"] in ("", "NA"):
            numbers[2] += 1
            continue
        in_air = 0 if row["air_time"] in ("", "NA") else int(row["air_time"])
        delay = 0 if row["arr_delay"] in ("", "NA") else int(row["arr_delay"])
        numbers[3] += in_air
        numbers[5] += delay
        days[destination, day][1] += 1
        _latest(numbers, latest, tail, destination, (left + timedelta(minutes=in_air + 20), number * 2 + 1))
        if delay >= LONG_DELAY_MINUTES:
            key = f"{row['carrier']}{row['flight']}-{origin}-{day[5:7]}{day[8:]}-{row['sched_dep_time']}"
            late[tail, key] = (destination, delay)
    return {
        "aircraft": {(tail,): tuple(numbers) for tail, numbers in fleet.items()},
        "airport_days": {key: tuple(numbers) for key, numbers in days.items()},
        "long_delays": late,
    }


def _latest(
    numbers: list[Any], latest: dict[str, tuple[datetime, int]], tail: str, airport: str, at: tuple[datetime, int]
) -> None:
    if tail not in latest or at > latest[tail]:
        latest[tail] = at
        numbers[6] = airport


def projected(engine: Engine) -> dict[str, Table]:
    """Return the content of the tables, read with plain SQLAlchemy."""
    found: dict[str, Table] = {}
    with engine.connect() as connection:
        for model, keys in ((AircraftTotals, 1), (AirportDay, 2), (LongDelay, 2)):
            rows = connection.execute(select(model.__table__))
            found[model.__tablename__] = {tuple(map(_plain, row[:keys])): tuple(row[keys:]) for row in rows}
    return found


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, date) else value


def compare(engine: Engine, rows: Iterable[dict[str, str]]) -> list[Comparison]:
    """Compare projected with expected tables, column by column, over all keys that either side has."""
    want, have = expected(rows), projected(engine)
    found = []
    for model, keys in ((AircraftTotals, 1), (AirportDay, 2), (LongDelay, 2)):
        name = model.__tablename__
        columns = [column.name for column in model.__table__.columns][keys:]
        every = want[name].keys() | have[name].keys()
        for place, column in enumerate(columns):
            left = {key: have[name][key][place] for key in have[name]}
            right = {key: want[name][key][place] for key in want[name]}
            different = sum(1 for key in every if left.get(key, "-") != right.get(key, "-"))
            found.append(Comparison(name, column, len(every), _total(left), _total(right), different))
    return found


def _total(values: dict[Any, Any]) -> Any:
    numbers = [value for value in values.values() if isinstance(value, int)]
    return sum(numbers) if numbers else len({value for value in values.values() if value is not None})
