"""`eskernel backlog`."""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kernel.cli import EXIT_CODES
from kernel.cli.common import Target, Where, asynchronous, console, print_json, target_options
from kernel.cli.status import survey_workers

LEVELS = ("ok", "warn", "critical")
_STYLES = {"warn": "yellow", "critical": "red", "high": "yellow"}
WATCH_S = 1.0


@click.command(epilog=EXIT_CODES)
@click.option("--watch", is_flag=True, help="Update every second, until Ctrl-C.")
@click.option(
    "--partitions",
    "most",
    type=click.IntRange(0, 20),
    default=3,
    show_default=True,
    help="Number of partitions to show for each projection.",
)
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def backlog(watch: bool, most: int, as_json: bool, where: Where) -> None:
    """Print the backlog of every projection, its worst partitions, and the pressure on publishing.

    The columns: `behind` is the number of commits that are not in the projection's tables yet, `old` is the age of the
    oldest of them, and `drained in` is the time to catch up at the current rate. Exits with 1 if a level is critical.
    """
    target = where.find()
    if watch and not as_json:
        await _watch(target, most)
        return
    found = summary(await survey_workers(target))
    if as_json:
        print_json(found)
    else:
        console.print(shown(found, most))
    if found["level"] == "critical":
        sys.exit(1)


async def _watch(target: Target, most: int) -> None:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(shown(summary(await survey_workers(target)), most), refresh=True)
            await asyncio.sleep(WATCH_S)


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Return the backlog of the whole app, summed over the reports of its workers."""
    projections: dict[str, dict[str, Any]] = {}
    publishing = []
    for worker in report["workers"]:
        publishing.append({"worker": worker["worker"], **worker["pressure"]})
        for part in worker["backlog"]["projections"]:
            total = projections.setdefault(
                part["projection"],
                {
                    "projection": part["projection"],
                    "level": "ok",
                    "behind": 0,
                    "age": 0.0,
                    "drain": 0.0,
                    "warn": 0,
                    "critical": 0,
                    "partitions": [],
                },
            )
            total["level"] = max(total["level"], part["level"], key=LEVELS.index)
            total["age"] = max(total["age"], part["age"])
            total["drain"] = None if None in (total["drain"], part["drain"]) else max(total["drain"], part["drain"])
            for name in ("behind", "warn", "critical"):
                total[name] += part[name]
            total["partitions"] += [{**partition, "worker": worker["worker"]} for partition in part["partitions"]]
    for total in projections.values():
        total["partitions"].sort(key=lambda part: (-LEVELS.index(part["level"]), -part["age"], -part["behind"]))
    levels = [item["level"] for item in (*projections.values(), *publishing)]
    worst_first = sorted(projections.values(), key=lambda total: (-LEVELS.index(total["level"]), total["projection"]))
    return {
        "app": report["app"],
        "level": "critical" if "critical" in levels else "warn" if {"warn", "high"} & set(levels) else "ok",
        "projections": worst_first,
        "publishing": publishing,
        "silent": report["silent"],
        "unowned": report["unowned"],
    }


def shown(found: dict[str, Any], most: int) -> RenderableType:
    """Return a summary as a table and lines of text."""
    table = Table(box=None, pad_edge=False)
    for title in ("projection", "level", "behind", "old", "drained in", "partitions"):
        table.add_column(title, overflow="fold")
    for total in found["projections"]:
        counts = ", ".join(f"{total[name]} {name}" for name in ("critical", "warn") if total[name]) or "all ok"
        _add(table, total["projection"], total, counts)
        for partition in total["partitions"][:most]:
            _add(table, f"  partition {partition['partition']}", partition, partition["worker"])
    lines: list[RenderableType] = [
        Text(f"{found['app']} at {datetime.now(UTC):%H:%M:%S} UTC: {found['level']}", style="bold"),
        table if found["projections"] else Text("no projections"),
    ]
    for pressure in found["publishing"]:
        text = f"publishing ({pressure['worker']}): pressure {pressure['level']}"
        if "in_flight" in pressure:
            text += (
                f", {pressure['queued']} appends waiting, "
                f"{pressure['in_flight']} of {pressure['max_in_flight']} in flight, "
                f"{pressure['commands_pending']} of {pressure['max_commands_pending']} commands in progress, "
                f"appends take up to {pressure['latency'] * 1000:.0f} ms"
            )
        lines.append(Text(text + (f"; {pressure['refusal']}" if pressure.get("refusal") else "")))
    lines += [Text(f"{name}: no answer", style="red") for name in found["silent"]]
    if found["unowned"]:
        lines.append(Text(f"{len(found['unowned'])} partitions have no owner and are not projected", style="red"))
    return Group(*lines)


def _add(table: Table, name: str, part: dict[str, Any], more: str) -> None:
    level = Text(part["level"], style=_STYLES.get(part["level"], "green"))
    age = f"{part['age']:.1f} s" if part["behind"] else "-"
    table.add_row(Text(name), level, f"{part['behind']:,.0f}", age, _drain(part["drain"]), Text(more))


def _drain(seconds: float | None) -> str:
    if seconds is None:
        return "never: no progress"
    return f"{seconds:.1f} s" if seconds else "-"
