"""The rows about commands."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import account, clients, rival
from benchmarks.places import Postgres, fsync_ms
from benchmarks.report import Row
from benchmarks.rounds import in_turns, medians, percentiles, rounded
from examples.bank import app as bank

SECONDS, RIVAL_SECONDS, RIVAL_ACCOUNTS = 1.5, 0.6, 200
AS_IT_COMES = "as_it_comes"
KINDS: dict[str, tuple[dict[str, str], str]] = {
    AS_IT_COMES: ({}, ""),
    "cached": (rival.FAST_FORWARD, " with its cache"),
    "without_loading": (rival.NO_LOADING, " with its cache, for a single process: it doesn't load"),
}
"""The rival's settings, and their descriptions. The aim is for load-decide-save; its caches are shown too."""
SURVIVES = {
    ("PostgreSQL", True): "power cut (all)",
    ("PostgreSQL", False): "process crash (all; PostgreSQL: synchronous_commit=off)",
    ("SQLite", True): "power cut (all; SQLite: synchronous=FULL, as the library sets it)",
    ("SQLite", False): "process crash (all; SQLite: synchronous=NORMAL)",
}


async def measure(path: Path, pg: Postgres) -> list[Row]:
    """Measure commands with a wait for the disk at each commit, and without."""
    rows: list[Row] = []
    for sync in (True, False):
        rows += await _measure(path / ("synced" if sync else "plain"), pg, sync)
    return rows


async def _measure(path: Path, pg: Postgres, sync: bool) -> list[Row]:
    word = "a sync per commit" if sync else "no sync per commit"
    took: dict[str, list[float]] = {}
    disk: list[float] = []
    with contextlib.ExitStack() as stack:
        if not sync:
            stack.enter_context(rival.relaxed_sqlite())
        rivals: dict[str, rival.Commands] = {}
        for name in ("PostgreSQL", "SQLite"):
            if name == "PostgreSQL" and find_spec("psycopg_pool") is None:
                print("  the rival on PostgreSQL is left out: it needs the package psycopg-pool", flush=True)
                continue
            for kind, (settings, _) in KINDS.items():
                database = f"commands-{kind}"
                where = (
                    rival.postgres(pg.database(database, relaxed=not sync))
                    if name == "PostgreSQL"
                    else rival.sqlite(path / f"{database}.db")
                )
                rivals[f"{name} {kind}"] = made = rival.Commands({**where, **settings}, RIVAL_ACCOUNTS)
                stack.callback(made.close)
        async with clients.load(account.app, "benchmarks.account:app", path / "data", sync=sync) as (load, durability):

            async def ours() -> float:
                disk.append(fsync_ms(path))
                rate, took["ours"] = await load.full(SECONDS)
                return rate

            def theirs(name: str, commands: rival.Commands) -> Callable[[], Awaitable[float]]:
                async def run() -> float:
                    rate, took[name] = commands.run(RIVAL_SECONDS)
                    return rate

                return run

            ways = {"ours": ours, **{name: theirs(name, commands) for name, commands in rivals.items()}}
            figures = await in_turns(f"commands, {word}", ways)
            found = medians(figures)
            half = percentiles(await load.paced(found["ours"] / 2, SECONDS))
    with_projection = await _with_projection(path / "projected", sync)
    extra: dict[str, Any] = {
        "fsync_ms": median(disk),
        **percentiles(took["ours"]),
        **{f"half_load_{name}": value for name, value in half.items()},
        "with_projection": round(with_projection),
        "rounds": rounded(figures),
    }
    rows = []
    for name, aim in (("PostgreSQL", 20), ("SQLite", 5)):
        for kind, (_, words) in KINDS.items():
            rate = found.get(f"{name} {kind}")
            if rate is None and kind != AS_IT_COMES:
                continue
            rows.append(
                Row(
                    f"commands: client, service, receipt; 256 in flight, {word}; rival on {name}{words}",
                    "commands/s",
                    found["ours"],
                    rival=rate,
                    aim_rival=aim if kind == AS_IT_COMES else None,
                    durability=SURVIVES[name, sync],
                    rival_is=f"eventsourcing: load, decide, save{words}",
                    extra={"durability_of_ours": durability, **extra} if kind == AS_IT_COMES else {},
                )
            )
            if rate is not None:
                times = percentiles(took[f"{name} {kind}"])
                rows[-1].extra |= {f"rival_{key}": value for key, value in times.items()}
    return rows


async def _with_projection(path: Path, sync: bool) -> float:
    """Measure once more with the example's projection beside the commands, which the rival doesn't have."""
    async with clients.load(bank, "examples.bank:app", path, sync=sync) as (load, _):
        rate, _ = await load.full(SECONDS)
    print(f"  commands with the projection of the example: {rate:,.0f}", flush=True)
    return rate
