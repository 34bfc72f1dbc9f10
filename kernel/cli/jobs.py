"""`eskernel jobs`."""

from __future__ import annotations

from typing import Any

import click
from rich.table import Table

from kernel.cli import EXIT_CODES
from kernel.cli.common import Where, asynchronous, console, print_json, target_options
from kernel.cli.status import survey_workers


@click.command(epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def jobs(as_json: bool, where: Where) -> None:
    """Print the scheduled jobs of every worker: interval, last run, duration, last error and next run."""
    report = await survey_workers(where.find())
    found = [
        {"worker": worker["worker"], "jobs": sorted(worker["jobs"], key=lambda job: job["name"])}
        for worker in report["workers"]
    ]
    if as_json:
        print_json(found)
        return
    for worker in found:
        console.print(worker["worker"], style="bold", highlight=False)
        console.print(_table(worker["jobs"]))
    for name in report["silent"]:
        console.print(f"{name}: no answer", highlight=False)


def _table(found: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("job", "every", "runs", "failed", "last run", "took", "next run", "last error"):
        table.add_column(title, overflow="fold")
    for job in found:
        took = f"{job['duration'] * 1000:.1f} ms"
        table.add_row(
            job["name"],
            f"{job['interval']:.3g} s",
            str(job["runs"]),
            str(job["failures"]),
            _clock(job["last"]) or "never",
            f"running for {job['running']:.1f} s" if job["running"] else took,
            _clock(job["next_run"]),
            job["error"],
        )
    return table


def _clock(moment: str) -> str:
    """Return the time of day of an ISO 8601 moment."""
    return moment[11:19]
