"""`eskernel status`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import click
import nats.errors
import orjson
from sqlalchemy import func, select

from kernel.cli import EXIT_CODES
from kernel.cli.common import UNREACHABLE, asynchronous, console, fail, find_target, print_json, target_options
from kernel.log.wire import connect
from projections.database import open_database
from projections.tables import checkpoint, dead_letter, projection


@click.command(epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def status(as_json: bool, app: str | None, data: Path, nats: str | None, database: str | None) -> None:
    """Print what the service is doing: health, position and lag of the projections, live actors, jobs.

    Exits with 1 when the service is not ready.
    """
    target = find_target(app, data, nats, database)
    report = await _ask(target.app.name, target.nats)
    if target.database is not None:
        report["projections"] = await asyncio.to_thread(_projections, target.database)
    if as_json:
        print_json(report)
    else:
        _tell(report)
    if not report["health"]["ready"]:
        sys.exit(1)


async def _ask(app: str, url: str) -> dict[str, Any]:
    wire = await connect(url, name="eskernel status")
    try:
        answer = await wire.request(f"{app}.svc.status", b"", timeout=5)
    except (nats.errors.NoRespondersError, nats.errors.TimeoutError):
        fail(f"no service of {app!r} answers on {url}", UNREACHABLE)
    finally:
        await wire.close()
    report: dict[str, Any] = orjson.loads(answer.data)
    return report


def _projections(url: str) -> list[dict[str, Any]]:
    engine = open_database(url, read_only=True)
    with engine.connect() as connection:
        rows = connection.execute(
            select(
                projection.c.name,
                projection.c.version,
                projection.c.generation,
                projection.c.state,
                func.max(checkpoint.c.sequence).label("sequence"),
            )
            .join(
                checkpoint,
                (checkpoint.c.projection == projection.c.name) & (checkpoint.c.generation == projection.c.generation),
            )
            .group_by(projection.c.name, projection.c.version, projection.c.generation, projection.c.state)
            .order_by(projection.c.name, projection.c.generation)
        )
        found = [{str(name): value for name, value in row.items()} for row in rows.mappings()]
        letters = select(dead_letter.c.projection, dead_letter.c.generation, func.count()).group_by(
            dead_letter.c.projection, dead_letter.c.generation
        )
        counted = {(row[0], row[1]): row[2] for row in connection.execute(letters)}
    engine.dispose()
    for one in found:
        one["dead_letters"] = counted.get((one["name"], one["generation"]), 0)
    return found


def _tell(report: dict[str, Any]) -> None:
    ready = report["health"]["ready"]
    console.print(f"{report['app']} is {'ready' if ready else 'NOT ready'} (process {report['pid']})", style="bold")
    for name, one in report["health"]["components"].items():
        state = "ok" if one["ok"] else "FAILING"
        console.print(f"  {name:<12}{state:<9}{one['detail']}", highlight=False, markup=False, soft_wrap=True)
    live = report["projection"]
    console.print(
        f"  {report['actors']} aggregates live, {report['commands_pending']} commands under way", highlight=False
    )
    console.print(f"  projected up to {live['position']}, {live['behind']} commits behind", highlight=False)
    for one in report.get("projections", []):
        letters = f", {one['dead_letters']} dead letters" if one["dead_letters"] else ""
        console.print(
            f"  {one['name']:<20}version {one['version']}, generation {one['generation']}, {one['state']}, "
            f"at {one['sequence']}{letters}",
            highlight=False,
        )
    for job in report["jobs"]:
        failed = f", failing: {job['error']}" if job["error"] else ""
        console.print(
            f"  job {job['name']:<16}every {job['interval']:g} s, {job['runs']} runs, last took "
            f"{job['duration'] * 1000:.1f} ms{failed}",
            highlight=False,
            markup=False,
        )
