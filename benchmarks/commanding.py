"""The rows about commands."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from benchmarks import account, clients, rival
from benchmarks.places import Postgres
from benchmarks.report import Row
from benchmarks.rounds import in_turns, medians, percentiles, rounded
from examples.bank import app as bank

SECONDS, RIVAL_SECONDS, RIVAL_ACCOUNTS = 1.5, 0.7, 200
FUNCTIONS = {"POSTGRES_ENABLE_DB_FUNCTIONS": "y"}
POSTGRES_SURVIVES = {True: "power cut (fsync per commit)", False: "process crash (synchronous_commit=off)"}
SQLITE_SURVIVES = {True: "power cut (synchronous=FULL, the library's)", False: "process crash (synchronous=NORMAL)"}


async def measure(path: Path, pg: Postgres) -> list[Row]:
    """Measure commands with a wait for the disk at each commit, and without."""
    rows: list[Row] = []
    for sync in (True, False):
        rows += await _measure(path / ("synced" if sync else "plain"), pg, sync)
    return rows


async def _measure(path: Path, pg: Postgres, sync: bool) -> list[Row]:
    word = "a sync per commit" if sync else "no sync per commit"
    took: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        if not sync:
            stack.enter_context(rival.relaxed_sqlite())
        loaded, kept = {}, {}
        for name, settings in (
            ("PostgreSQL", lambda kind: rival.postgres(pg.database(f"commands-{kind}", relaxed=not sync), **FUNCTIONS)),
            ("SQLite", lambda kind: rival.sqlite(path / f"{kind}.db")),
        ):
            loaded[name] = rival.Commands({**settings("loaded"), **rival.FAST_FORWARD}, RIVAL_ACCOUNTS)
            stack.callback(loaded[name].close)
            kept[name] = rival.Commands({**settings("kept"), **rival.CACHED}, RIVAL_ACCOUNTS)
            stack.callback(kept[name].close)
        async with clients.load(account.app, "benchmarks.account:app", path / "data", sync=sync) as (load, durability):

            async def ours() -> float:
                rate, took["ours"] = await load.full(SECONDS)
                return rate

            def theirs(name: str, commands: rival.Commands) -> Callable[[], Awaitable[float]]:
                async def run() -> float:
                    rate, took[name] = commands.run(RIVAL_SECONDS)
                    return rate

                return run

            ways = {"ours": ours}
            for name, commands in [*loaded.items(), *((f"{name} kept", one) for name, one in kept.items())]:
                ways[name] = theirs(name, commands)
            figures = await in_turns(f"commands, {word}", ways)
            found = medians(figures)
            half = percentiles(await load.paced(found["ours"] / 2, SECONDS))
    with_projection = await _with_projection(path / "projected", sync)
    extra: dict[str, Any] = {
        **percentiles(took["ours"]),
        **{f"half_load_{name}": value for name, value in half.items()},
        "with_projection": round(with_projection),
        "rounds": rounded(figures),
    }
    return [
        Row(
            f"commands: client, service, receipt; 256 in flight, {word}; rival on {name}",
            "commands/s",
            found["ours"],
            rival=found[name],
            aim_rival=aim,
            durability=f"ours: {durability}; rival: {survives[sync]}",
            rival_is="eventsourcing, load-decide-save, cache with fast-forward",
            extra={
                **extra,
                **{f"rival_{key}": value for key, value in percentiles(took[name]).items()},
                "rival_without_loading": round(found[f"{name} kept"]),
                "ratio_to_rival_without_loading": round(found["ours"] / found[f"{name} kept"], 2),
            },
        )
        for name, aim, survives in (("PostgreSQL", 20, POSTGRES_SURVIVES), ("SQLite", 5, SQLITE_SURVIVES))
    ]


async def _with_projection(path: Path, sync: bool) -> float:
    """Measure once more with the example's projection beside the commands, which the rival doesn't have."""
    async with clients.load(bank, "examples.bank:app", path, sync=sync) as (load, _):
        rate, _ = await load.full(SECONDS)
    print(f"  commands with the projection of the example: {rate:,.0f}", flush=True)
    return rate
