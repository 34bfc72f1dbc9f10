"""Run the soak: `python -m benchmarks.soak`. Exit code 1 where something grows or is missing, 130 when interrupted."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks import report
from benchmarks.soak import page, picture
from benchmarks.soak.load import Load
from benchmarks.soak.page import Check, Report
from benchmarks.soak.running import Failed, Service, service
from benchmarks.soak.sampling import Sampler
from benchmarks.soak.trend import GROWING, judge
from examples.bank import app
from kernel import Client
from kernel.transport.dial import connect

WARM_UP = 3.0
"""How much faster than the load the warm-up sends, so that memory for a peak is allocated before the measuring."""
SWEEP_S = 0.5
"""Seconds between two sweeps of a worker; the service's own setting."""
CATCH_UP_S = PATIENCE_S = 30.0
console = Console()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="Does anything grow under load?")
    parser.add_argument("--minutes", type=float, default=20.0, help="how long is measured (20)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (2)")
    parser.add_argument("--rate", type=float, default=500.0, help="commands per second (500)")
    parser.add_argument("--accounts", type=int, default=50_000, help="distinct aggregates (50,000)")
    parser.add_argument("--max-actors", type=int, default=500, help="live actors of a worker (500)")
    parser.add_argument("--idle", type=float, default=2.0, help="seconds until an actor is passivated (2)")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between samples (5)")
    parser.add_argument("--markdown", type=Path, help="write the report as Markdown")
    parser.add_argument("--picture", type=Path, help="write the picture, as SVG")
    parser.add_argument("--json", type=Path, help="write everything with all samples as JSON")
    return parser.parse_args()


class ProgressLine:
    """A progress bar on a terminal; a plain line each minute anywhere else."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[more]}"))
        self.bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._printed = time.monotonic()

    def begin(self, what: str, total: float) -> TaskID:
        """Start a stage."""
        console.print(f"{what} ...", highlight=False)
        return self.bar.add_task(what, total=total, more="")

    def show(self, task: TaskID, done: float, more: str) -> None:
        """Show how far the stage is."""
        self.bar.update(task, completed=done, more=more)
        if not console.is_terminal and time.monotonic() - self._printed > 60:
            self._printed = time.monotonic()
            console.print(f"  {done:,.0f}: {more}", highlight=False)


async def _soak(arguments: argparse.Namespace) -> Report:
    progress = ProgressLine()
    date = datetime.now(UTC).date().isoformat()
    with progress.bar:
        async with (
            service(arguments.workers, arguments.max_actors, arguments.idle) as running,
            _client(running, arguments.accounts) as load,
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=4)) as http,
        ):
            connection = await connect(running.running.nats, name="soak")
            try:
                warm_up_s = await _warm_up(load, arguments.rate * WARM_UP, progress)
                swing = arguments.rate / arguments.workers * SWEEP_S
                sampler = Sampler(running, load, connection, http, swing)
                measured_s = await _measure(load, sampler, arguments, progress)
                await load.finish()
                checks = await _checks(load, sampler, running, http, arguments.idle)
            finally:
                await connection.close()
            complaints = running.troubles()
    checks.append(Check("lines of warnings and errors of the service", str(len(complaints))))
    return Report(
        options={name: value for name, value in vars(arguments).items() if not isinstance(value, Path | None)},
        machine=report.machine(),
        versions=report.versions(),
        series=judge(sampler.series),
        checks=checks,
        measured_s=measured_s,
        warm_up_s=warm_up_s,
        commands=load.answered,
        date=date,
        complaints=complaints,
    )


@asynccontextmanager
async def _client(running: Service, accounts: int) -> AsyncIterator[Load]:
    where = running.running
    async with await Client.connect(app, nats=where.nats, database=where.database) as client:
        yield Load(client, accounts)


async def _warm_up(load: Load, rate: float, progress: ProgressLine) -> float:
    """Write to every account once, faster than the load will: afterwards all subjects and addresses are known."""
    begin = time.monotonic()
    task = progress.begin(f"writing once to each of {load.accounts:,} accounts", load.accounts)
    driving = asyncio.create_task(load.drive(load.everyone(), rate))
    try:
        while not driving.done():
            progress.show(task, load.answered, f"{load.answered:,} written")
            await asyncio.wait({driving}, timeout=0.5)
        driving.result()
        await load.finish()
    finally:
        driving.cancel()
    progress.bar.remove_task(task)
    load.latencies()
    load.held_up = 0
    gc.collect()
    gc.freeze()
    return time.monotonic() - begin


async def _measure(load: Load, sampler: Sampler, arguments: argparse.Namespace, progress: ProgressLine) -> float:
    seconds = arguments.minutes * 60
    task = progress.begin(f"measuring for {arguments.minutes:g} minutes", seconds)
    driving = asyncio.create_task(load.drive(load.mixture(), arguments.rate))
    begin, number = time.monotonic(), 0
    try:
        while (passed := time.monotonic() - begin) < seconds + arguments.every / 2:
            await sampler.sample()
            number += 1
            progress.show(task, passed, _line(sampler, load))
            await asyncio.wait({driving}, timeout=max(0.0, begin + number * arguments.every - time.monotonic()))
            if driving.done():
                driving.result()
    finally:
        driving.cancel()
    progress.bar.remove_task(task)
    return passed


def _line(sampler: Sampler, load: Load) -> str:
    memory = [
        f"{series.group} {series.values[-1]:.0f}"
        for series in sampler.series
        if series.name == "memory" and series.group != "client"
    ]
    live = sum(int(series.values[-1]) for series in sampler.series if series.name == "actors live")
    failed = f", {sum(load.failures.values())} failed" if load.failures else ""
    return f"{load.answered:,} commands{failed}; {live} actors; MiB: {', '.join(memory)}"


async def _checks(
    load: Load, sampler: Sampler, running: Service, http: aiohttp.ClientSession, idle: float
) -> list[Check]:
    """Check that every acknowledged command is projected and that every actor is passivated."""
    deadline = time.monotonic() + CATCH_UP_S
    while True:
        rows = await load.client.query("select account, cents from balances")
        differences = load.differences({row["account"]: row["cents"] for row in rows})
        if not differences or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.5)
    acknowledged = sum(load.acknowledged.values())
    projected = sum(row["cents"] for row in rows)
    finding = (
        f"{acknowledged:,} acknowledged, {projected:,} in the projection, compared for each of {len(rows):,} accounts"
    )
    if differences:
        finding += f"; {len(differences)} differ: {'; '.join(differences[:3])}"
    failures = "; ".join(f"{count} x {what}" for what, count in load.failures.most_common(3))
    checks = [
        Check("commands", finding, bool(differences)),
        Check("commands that failed", failures or "0", bool(load.failures)),
        Check("times that the load's pace was given up", str(load.held_up)),
        Check("samples missed", str(sampler.missed)),
    ]
    if idle <= PATIENCE_S:
        live = await _left_live(running, http, idle)
        checks.append(Check("actors live when all was quiet", str(live), live != 0))
    for name, (first, last) in sorted(sampler.counts.items()):
        fatal = name in ("alerts of the kernel", "dead letters")
        checks.append(Check(name, f"{last - first:.0f}", last > first if fatal else None))
    return checks


async def _left_live(running: Service, http: aiohttp.ClientSession, idle: float) -> int:
    """Return how many actors stay live without load: such an actor is leaked."""
    deadline = time.monotonic() + idle + 10.0
    while True:
        async with http.get(f"{running.running.http}/metrics") as answer:
            families = text_string_to_metric_families(await answer.text())
        live = int(sum(s.value for family in families for s in family.samples if s.name == "eskernel_actors_live"))
        if not live or time.monotonic() > deadline:
            return live
        await asyncio.sleep(0.5)


def _show(found: Report) -> None:
    table = Table(title=found.subtitle())
    for name in ("what", "start", "end", "slope per hour", "of the mean", "verdict"):
        table.add_column(name, justify="left" if name in ("what", "verdict") else "right")
    for series, line in [*found.judged, *found.shown]:
        style = "red" if line.verdict == GROWING else "dim" if not series.judged else None
        table.add_row(*page.figures(series, line), line.verdict, style=style)
    wide = Console(width=max(120, console.width))
    wide.print(table)
    for check in found.checks:
        wide.print(
            f"{check.name}: {check.finding}", style="red" if check.failed else None, highlight=False, markup=False
        )
    for complaint in found.complaints[:10]:
        wide.print(f"the service: {complaint}", highlight=False, markup=False)
    wide.print(found.summary(), style="red" if found.failed else "green", highlight=False, markup=False)


def _write(found: Report, arguments: argparse.Namespace) -> None:
    if arguments.json is not None:
        report.write(found.as_json(), arguments.json)
    if arguments.picture is not None:
        arguments.picture.write_text(picture.draw(found.summary(), found.subtitle(), found.series))
    if arguments.markdown is not None:
        arguments.markdown.write_text(found.markdown(arguments.picture))


async def _run_until_terminated(arguments: argparse.Namespace) -> Report:
    soaking = asyncio.ensure_future(_soak(arguments))
    # cancelled, not killed, so that servers are stopped and folders are removed
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, soaking.cancel)
    return await soaking


def main() -> None:
    """Soak, print, write."""
    logging.basicConfig(level=logging.ERROR)
    arguments = _arguments()
    try:
        found = asyncio.run(_run_until_terminated(arguments))
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("interrupted; nothing is left of the service")
        sys.exit(130)
    except (Failed, ConnectionError) as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        sys.exit(1)
    _show(found)
    _write(found, arguments)
    sys.exit(1 if found.failed else 0)


if __name__ == "__main__":
    main()
