"""The rows about projecting: live from a backlog, rebuild, and growth."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from benchmarks import backlog, hand_fold, hand_projection, our_projection, places, rival, rival_projection, rival_view
from benchmarks.places import Postgres
from benchmarks.report import Row
from benchmarks.rounds import in_turns, medians, rounded
from examples.bank import app as bank
from examples.flights import app as flights
from kernel.log import JetStreamLog, open_log
from kernel.settings.sources import settings_of
from kernel.transport.connection import NatsConnection
from kernel.transport.dial import connect

SAMPLE = 2_000
SURVIVES = {
    "SQLite": "process crash; after a power cut the rest is folded again (all; synchronous=NORMAL)",
    "PostgreSQL": "process crash; after a power cut the rest is folded again (all; synchronous_commit=off)",
}
GROWTH_ACCOUNTS, GROWTH_EACH = 2_000, 8


class Bench:
    """The backlog and the databases."""

    def __init__(self, path: Path, pg: Postgres, connection: NatsConnection, log: JetStreamLog) -> None:
        self.path, self.pg, self.connection, self.log = path, pg, connection, log
        self._number = itertools.count()

    def url(self, database: str) -> str:
        """Return the URL of an empty database."""
        if database == "PostgreSQL":
            return self.pg.database("projection", relaxed=True)
        return f"sqlite:///{self.file()}"

    def file(self) -> Path:
        """Return an unused path."""
        return self.path / f"{next(self._number)}.db"

    async def by_hand(self, database: str, plain: bool = False) -> float:
        """Project by hand."""
        last = (await self.log.info()).last
        if database == "PostgreSQL":
            target: hand_fold.Sqlite | hand_fold.Postgresql = hand_fold.Postgresql(self.url(database))
        else:
            target = hand_fold.Sqlite(str(self.file()))
        with closing(target):
            return await hand_projection.run(self.connection, flights.name, last, target, plain=plain)

    def rival(self, database: str, sample: list[object]) -> float:
        """Project a sample with the other library."""
        if database == "PostgreSQL":
            from benchmarks.rival_view_postgres import PostgresView

            settings = rival.postgres(self.url(database))
            return rival_projection.run(settings, PostgresView, sample, beforehand=True)
        with rival.relaxed_sqlite():
            return rival_projection.run(rival.sqlite(self.file()), rival_view.SQLiteView, sample, beforehand=False)


async def measure(path: Path, pg: Postgres, months: int) -> list[Row]:
    """Measure live projection and rebuild of the first months' flights on both databases."""
    sample = rival_projection.events(backlog.flight_commands(1), SAMPLE)
    async with places.nats(path / "nats") as url:
        connection = await connect(url, name="bench")
        log = await open_log(connection, flights.name, settings_of({"jetstream.group_commit": "never"}))
        try:
            count = await backlog.fill(flights, log, backlog.flight_commands(months))
            bench = Bench(path, pg, connection, log)
            rows: list[Row] = []
            for database in ("SQLite", "PostgreSQL"):
                rows += await _database(bench, database, sample, f"{count:,} events, {_months(months)}")
        finally:
            await log.close()
            await connection.close()
    return sorted(rows, key=lambda row: row.name.startswith("rebuild"))


def _months(months: int) -> str:
    return {12: "the flights of a year", 3: "the flights of a quarter (--year for all)"}.get(
        months, f"the flights of {months} months"
    )


async def _database(bench: Bench, database: str, sample: list[object], what: str) -> list[Row]:
    ways: dict[str, Callable[[], Awaitable[float]]] = {
        "own wire": lambda: bench.by_hand(database),
        "live": lambda: our_projection.live(flights, bench.log, bench.url(database)),
        "rebuild": lambda: our_projection.rebuild(flights, bench.log, bench.url(database)),
        "verify": lambda: our_projection.verify(flights, bench.log, bench.url(database)),
        "rehearse": lambda: our_projection.verify(flights, bench.log, bench.url(database), same=False),
        "limit": lambda: bench.by_hand(database, plain=True),
    }
    if database == "SQLite" or find_spec("psycopg_pool") is not None:
        ways["rival"] = lambda: asyncio.to_thread(bench.rival, database, sample)
    figures = await in_turns(f"projection on {database}", ways)
    found = medians(figures)
    common = {
        "limit": found["limit"],
        "durability": SURVIVES[database],
        "limit_is": "nats-py subscription and pulls, orjson, fold in dicts, one statement per table and 20,000 events",
        "extra": {"rounds": rounded(figures)},
    }
    # the same loop on the kernel's own connection: a stricter limit than the aim asks for
    own_wire = common | {
        "limit": found["own wire"],
        "limit_is": "the same loop, pulling with kernel.transport.connection instead of a nats-py subscription",
    }
    source = "stored there" if database == "PostgreSQL" else "from memory (it can't subscribe to SQLite)"
    return [
        Row(
            f"live projection from a backlog on {database}: {what}",
            "events/s",
            found["live"],
            rival=found.get("rival"),
            aim_limit=0.5,
            aim_rival=20,
            rival_is=f"eventsourcing ProjectionRunner with tracking, {len(sample):,} events {source}",
            **common,  # type: ignore[arg-type]
        ),
        Row(
            f"rebuild on {database}: {what}",
            "events/s",
            found["rebuild"],
            aim_limit=0.8,
            **common,  # type: ignore[arg-type]
        ),
        *(
            Row(
                f"{kind} on {database}: {what}",
                "events/s",
                found[kind],
                limit=found["rebuild"],
                aim_limit=0.8 if kind == "verify" else None,
                limit_is="the rebuild above",
                durability="nothing is written",
                extra={"rounds": rounded({kind: figures[kind], "rebuild": figures["rebuild"]})},
            )
            for kind in ("verify", "rehearse")
        ),
        *(
            Row(f"{kind} on {database}, against a loop on our own wire", "events/s", found[kind], **own_wire)  # type: ignore[arg-type]
            for kind in ("live", "rebuild")
        ),
    ]


async def growth(path: Path) -> list[Row]:
    """Measure live projection of a small log and of one with ten times the events and aggregates."""
    sizes = {"small": GROWTH_ACCOUNTS, "large": 10 * GROWTH_ACCOUNTS}
    logs: dict[str, JetStreamLog] = {}
    wires: list[NatsConnection] = []
    numbers = itertools.count()
    async with places.nats(path / "small") as small, places.nats(path / "large") as large:
        try:
            for (name, accounts), url in zip(sizes.items(), (small, large), strict=True):
                wires.append(await connect(url, name="bench"))
                logs[name] = await open_log(wires[-1], bank.name, settings_of({"jetstream.group_commit": "never"}))
                await backlog.fill(bank, logs[name], backlog.deposits(accounts, GROWTH_EACH))
            run = our_projection

            def database() -> str:
                return f"sqlite:///{path / f'{next(numbers)}.db'}"

            figures = await in_turns(
                "growth",
                {
                    "live, small": lambda: run.live(bank, logs["small"], database()),
                    "live, large": lambda: run.live(bank, logs["large"], database()),
                    "rebuild, small": lambda: run.rebuild(bank, logs["small"], database()),
                    "rebuild, large": lambda: run.rebuild(bank, logs["large"], database()),
                },
            )
        finally:
            for log in logs.values():
                await log.close()
            for connection in wires:
                await connection.close()
    return [_growth(kind, figures) for kind in ("live", "rebuild")]


def _growth(kind: str, figures: dict[str, list[float]]) -> Row:
    small, large = figures[f"{kind}, small"], figures[f"{kind}, large"]
    what = "live projection" if kind == "live" else "rebuild"
    return Row(
        f"growth: {what} of {10 * GROWTH_ACCOUNTS * GROWTH_EACH:,} events, {10 * GROWTH_ACCOUNTS:,} aggregates",
        "events/s",
        median(large),
        limit=median(small),
        aim_limit=0.85,
        aim=">= 0.85 of the same at a tenth of the size",
        durability=SURVIVES["SQLite"],
        limit_is="ours at a tenth of the events and aggregates",
        extra={"rounds": rounded({"small": small, "large": large})},
    )
