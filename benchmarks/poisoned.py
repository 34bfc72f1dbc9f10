"""The rows about a bad deploy: what a program costs that fails at many aggregates, against one that fails at none."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from statistics import median

from sqlalchemy import CheckConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import Aggregate, applies, event
from aggregates.commit import Decision, encode, timestamp
from aggregates.context import uuid7
from aggregates.declaration import EventType
from benchmarks import our_projection
from benchmarks.places import Postgres
from benchmarks.report import Row
from benchmarks.rounds import in_turns, rounded
from kernel import App
from kernel.log.base import EventLog
from kernel.log.memory import MemoryLog
from projections import Rows, Tallies, Tally, dead_letters
from projections.database import open_database
from projections.retrying import retry_all

AGGREGATES, EVENTS, EACH = 20_000, 2, 10
"""Every tenth aggregate is poisoned."""
CHUNK = 5_000
HARMLESS, RAISES, REFUSED = "harmless", "raises", "refused"


@event
class Measured:
    value: int
    odd: bool = False


class Sensor(Aggregate):
    @applies
    def measured(self, event: Measured) -> None:
        pass


class Base(DeclarativeBase):
    pass


class Level(Base):
    __tablename__ = "levels"
    __table_args__ = (CheckConstraint("value >= 0"),)
    sensor: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int] = mapped_column(default=0)


class Total(Base):
    __tablename__ = "totals"
    value: Mapped[int] = mapped_column(primary_key=True)
    times: Mapped[int]


class Levels(Rows[Level], of=Sensor):
    """Fails at odd events in the way that `does` says."""

    does = HARMLESS

    @applies
    def measured(self, row: Level, event: Measured) -> None:
        if event.odd and Levels.does == RAISES:
            raise ValueError("this program is bad")
        refused = Levels.does == REFUSED and (event.odd or row.value < 0)
        row.value = -1 if refused else event.value


class Totals(Tallies[Total], of=Sensor):
    @applies
    def measured(self, tally: Tally[Total], event: Measured) -> None:
        tally[event.value % 100].times += 1


app = App("sensors", aggregates=[Sensor], projections=[Levels, Totals])


async def fill(log: EventLog, each: int = EACH) -> None:
    """Append the events. The first event of every `each`-th sensor is odd."""
    event_type = EventType(Measured, "Measured", 1)
    last = dict.fromkeys(range(AGGREGATES), 0)
    for version in range(EVENTS):
        futures = []
        for number in last:
            name = f"sensor-{number}"
            measured = event_type.encode(Measured(number, odd=number % each == 0 and version == 0))
            payload = encode("/sensors/Sensor", name, [Decision(uuid7(), [measured])], version, timestamp())
            subject = log.subjects.address("Sensor", name).subject
            futures.append(log.append(subject, last[number], payload))
            if len(futures) % CHUNK == 0:
                await asyncio.gather(*futures[-CHUNK:], return_exceptions=True)
        last = dict(zip(last, await asyncio.gather(*futures), strict=True))


class Bench:
    """The logs and the databases."""

    def __init__(self, path: Path, pg: Postgres) -> None:
        self._path, self._pg, self._number = path, pg, count()
        self.logs: dict[int, MemoryLog] = {}

    async def log(self, each: int) -> MemoryLog:
        """Return the log in which every `each`-th aggregate is odd."""
        if each not in self.logs:
            self.logs[each] = MemoryLog("sensors")
            await fill(self.logs[each], each)
        return self.logs[each]

    def url(self, database: str) -> str:
        """Return the URL of an empty database."""
        if database == "PostgreSQL":
            return self._pg.database("poisoned", relaxed=True)
        return f"sqlite:///{self._path / f'{next(self._number)}.db'}"

    async def project(self, how: str, does: str, database: str, each: int = EACH) -> float:
        """Return the events per second of a live projection or a build."""
        run = our_projection.live if how == "live" else our_projection.rebuild
        log = await self.log(each)
        with _doing(does):
            return await run(app, log, self.url(database))

    async def retry(self, database: str) -> float:
        """Return the parked events per second of a retry after the program was corrected."""
        url = self.url(database)
        with _doing(RAISES):
            await our_projection.rebuild(app, await self.log(EACH), url)
        engine = open_database(url)
        try:
            parked = await asyncio.to_thread(dead_letters.waiting, engine)
            started = time.perf_counter()
            done = await asyncio.to_thread(retry_all, engine, app.plan(engine.dialect), parked)
            took = time.perf_counter() - started
        finally:
            engine.dispose()
        assert not sum(retried.left for retried in done)
        return sum(retried.folded for retried in done) / took


@contextmanager
def _doing(does: str) -> Iterator[None]:
    Levels.does = does
    # log lines are made, and go nowhere
    nowhere = Path(os.devnull).open("w")  # noqa: SIM115 - closed below
    handler = logging.StreamHandler(nowhere)
    logger = logging.getLogger("eskernel")
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        Levels.does = HARMLESS
        logger.propagate = True
        logger.removeHandler(handler)
        nowhere.close()


async def measure(path: Path, pg: Postgres) -> list[Row]:
    """Measure live projection and build with none and a tenth of the aggregates poisoned, and a retry."""
    path.mkdir(parents=True, exist_ok=True)
    bench = Bench(path, pg)
    return [row for database in ("SQLite", "PostgreSQL") for row in await _database(bench, database)]


async def _database(bench: Bench, database: str) -> list[Row]:
    ways: dict[str, Callable[[], Awaitable[float]]] = {}
    for how in ("live", "build"):
        for does in (HARMLESS, RAISES, REFUSED):
            ways[f"{how}, {does}"] = lambda how=how, does=does: bench.project(how, does, database)  # type: ignore[misc]
    ways["retry"] = lambda: bench.retry(database)
    figures = await in_turns(f"poisoned on {database}", ways)
    what = f"{AGGREGATES // EACH:,} of {AGGREGATES:,} aggregates"
    rows = []
    for how, of in (("live", "live"), ("build", "build")):
        for does, failing in ((RAISES, "fail in a handler"), (REFUSED, "have rows that the database refuses")):
            rows.append(_row(f"{how} on {database}: {what} {failing}", figures, f"{how}, {does}", f"{of}, {HARMLESS}"))
    rows.append(_row(f"retry of {what} on {database}", figures, "retry", f"build, {HARMLESS}"))
    return rows


def _row(name: str, figures: dict[str, list[float]], ours: str, limit: str) -> Row:
    return Row(
        name,
        "events/s",
        median(figures[ours]),
        limit=median(figures[limit]),
        aim_limit=0.5,
        durability="process crash",
        limit_is=f"{limit}: the same events, of which none fails",
        extra={"rounds": rounded({ours: figures[ours], limit: figures[limit]})},
    )
