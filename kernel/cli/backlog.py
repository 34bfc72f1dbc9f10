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
from kernel.cli.status import ask_workers

LEVELS = ("ok", "warn", "critical")
_STYLES = {"warn": "yellow", "critical": "red", "high": "yellow"}
WATCH_S = 1.0


@click.command(epilog=EXIT_CODES)
@click.option("--watch", is_flag=True, help="Look again every second, until Ctrl-C.")
@click.option("--partitions", "most", type=click.IntRange(0, 20), default=3, show_default=True, help="Shown of each.")
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def backlog(watch: bool, most: int, as_json: bool, where: Where) -> None:
    """Print how far every projection is behind, its worst partitions, and the pressure on publishing.

    Behind are commits in the log that are not in the projection's tables, old is the oldest of them, and drained is
    when nothing would be left at the present rate. Exits with 1 when anything is critical.
    """
    target = where.find()
    if watch and not as_json:
        await _watch(target, most)
        return
    found = summary(await ask_workers(target))
    if as_json:
        print_json(found)
    else:
        console.print(shown(found, most))
    if found["level"] == "critical":
        sys.exit(1)


async def _watch(target: Target, most: int) -> None:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(shown(summary(await ask_workers(target)), most), refresh=True)
            await asyncio.sleep(WATCH_S)


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Return the backlog of the whole app, from what its workers tell of their own partitions."""
    projections: dict[str, dict[str, Any]] = {}
    publishing = []
    for worker in report["workers"]:
        publishing.append({"worker": worker["worker"], **worker["pressure"]})
        for one in worker["backlog"]["projections"]:
            known = projections.setdefault(
                one["projection"],
                {
                    "projection": one["projection"],
                    "level": "ok",
                    "behind": 0,
                    "age": 0.0,
                    "drain": 0.0,
                    "warn": 0,
                    "critical": 0,
                    "partitions": [],
                },
            )
            known["level"] = max(known["level"], one["level"], key=LEVELS.index)
            known["age"] = max(known["age"], one["age"])
            known["drain"] = None if None in (known["drain"], one["drain"]) else max(known["drain"], one["drain"])
            for name in ("behind", "warn", "critical"):
                known[name] += one[name]
            known["partitions"] += [{**partition, "worker": worker["worker"]} for partition in one["partitions"]]
    for known in projections.values():
        known["partitions"].sort(key=lambda one: (-LEVELS.index(one["level"]), -one["age"], -one["behind"]))
    levels = [one["level"] for one in projections.values()] + [one["level"] for one in publishing]
    return {
        "app": report["app"],
        "level": "critical" if "critical" in levels else "warn" if {"warn", "high"} & set(levels) else "ok",
        "projections": sorted(projections.values(), key=lambda one: (-LEVELS.index(one["level"]), one["projection"])),
        "publishing": publishing,
        "silent": report["silent"],
        "unowned": report["unowned"],
    }


def shown(found: dict[str, Any], most: int) -> RenderableType:
    """Return a summary for people."""
    table = Table(box=None, pad_edge=False)
    for title in ("projection", "level", "behind", "old", "drained in", "partitions"):
        table.add_column(title, overflow="fold")
    for one in found["projections"]:
        counts = ", ".join(f"{one[name]} {name}" for name in ("critical", "warn") if one[name]) or "all ok"
        _add(table, one["projection"], one, counts)
        for partition in one["partitions"][:most]:
            _add(table, f"  partition {partition['partition']}", partition, partition["worker"])
    lines: list[RenderableType] = [
        Text(f"{found['app']} at {datetime.now(UTC):%H:%M:%S} UTC: {found['level']}", style="bold"),
        table if found["projections"] else Text("no projections"),
    ]
    for one in found["publishing"]:
        text = f"publishing ({one['worker']}): pressure {one['level']}"
        if "in_flight" in one:
            text += (
                f", {one['queued']} appends waiting, {one['in_flight']} of {one['max_in_flight']} in flight, "
                f"{one['commands_pending']} of {one['max_commands_pending']} commands under way, "
                f"appends take up to {one['latency'] * 1000:.0f} ms"
            )
        lines.append(Text(text + (f"; {one['refusal']}" if one.get("refusal") else "")))
    lines += [Text(f"{name}: no answer", style="red") for name in found["silent"]]
    if found["unowned"]:
        lines.append(Text(f"{len(found['unowned'])} partitions have no owner: nobody projects them", style="red"))
    return Group(*lines)


def _add(table: Table, name: str, one: dict[str, Any], more: str) -> None:
    drain = "never, it stands still" if one["drain"] is None else f"{one['drain']:.1f} s" if one["drain"] else "-"
    level = Text(one["level"], style=_STYLES.get(one["level"], "green"))
    age = f"{one['age']:.1f} s" if one["behind"] else "-"
    table.add_row(Text(name), level, f"{one['behind']:,.0f}", age, drain, Text(more))
