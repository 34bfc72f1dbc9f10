"""`eskernel status`."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click
from sqlalchemy import Engine, func, select

from kernel.cli import EXIT_CODES
from kernel.cli.common import Target, Where, asynchronous, console, fail, print_json, target_options
from kernel.cli.exit_codes import UNREACHABLE
from kernel.log.subjects import Subjects
from kernel.settings.fields import shown
from kernel.transport.survey import survey
from projections.tables import checkpoint, dead_letter, projection


@click.command(epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def status(as_json: bool, where: Where) -> None:
    """Print what the workers are doing: health, who owns which partitions, position and lag, live actors, jobs.

    Exits with 1 when a worker is not ready or does not answer, or partitions have no owner.
    """
    target = where.find()
    report = await ask_workers(target)
    if target.database is not None:
        report["projections"] = await asyncio.to_thread(_projections, target.engine(read_only=True))
    if as_json:
        print_json(report)
    else:
        _tell(report)
    if not report["ready"]:
        sys.exit(1)


async def ask_workers(target: Target) -> dict[str, Any]:
    """Ask all workers at once; each names the others, so that a missing one is noticed."""
    app, url = target.app.name, shown(",".join(target.settings.connection.servers))
    subjects = Subjects(target.settings.stream.subject_prefix or app, 1)
    connection = await target.connection()
    try:
        workers, silent = await survey(connection, subjects.service("status"))
    finally:
        await connection.close()
    if not workers:
        fail(f"no service of {app!r} answers on {url}", UNREACHABLE)
    count = workers[0]["partition_count"]
    unowned = sorted(set(range(count)).difference(*(one["partitions"] for one in workers)))
    return {
        "app": app,
        "ready": not unowned and not silent and all(one["health"]["ready"] for one in workers),
        "workers": workers,
        "silent": silent,
        "unowned": unowned,
    }


def _projections(engine: Engine) -> list[dict[str, Any]]:
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
    workers = report["workers"]
    count = f"{len(workers)} workers" if len(workers) > 1 else "1 worker"
    console.print(f"{report['app']} is {'ready' if report['ready'] else 'NOT ready'} ({count})", style="bold")
    for name in report["silent"]:
        _line(f"  {name}: no answer; its partitions move when its lease has run out")
    if report["unowned"]:
        _line(f"  nobody owns the partitions {ranges(report['unowned'])}; they are taken within seconds")
    for one in report.get("projections", []):
        letters = f", {one['dead_letters']} dead letters" if one["dead_letters"] else ""
        _line(
            f"  {one['name']:<20}version {one['version']}, generation {one['generation']}, {one['state']}, "
            f"at {one['sequence']}{letters}"
        )
    for one in workers:
        _tell_worker(one)


def _tell_worker(one: dict[str, Any]) -> None:
    live = one["projection"]
    owned = f"partitions {ranges(one['partitions'])}" if one["partitions"] else "no partitions"
    console.print(f"{one['worker']} (process {one['pid']})", style="bold", highlight=False)
    _line(f"  {len(one['partitions'])} of {one['partition_count']}: {owned}")
    _line(f"  projected up to {live['position']}, {live['behind']} commits behind")
    _line(f"  {one['actors']} aggregates live, {one['commands_pending']} commands under way")
    for name, lane in one["limits"]["lanes"].items():
        if lane["why"]:
            _line(f"  {name} slowed to {lane['present']:.4g}/s: {lane['why']}")
    for name, component in one["health"]["components"].items():
        _line(f"  {name:<12}{'ok' if component['ok'] else 'FAILING':<9}{component['detail']}")
    for job in one["jobs"]:
        failed = f", failing: {job['error']}" if job["error"] else ""
        _line(
            f"  job {job['name']:<16}every {job['interval']:.3g} s, {job['runs']} runs, last took "
            f"{job['duration'] * 1000:.1f} ms{failed}"
        )


def _line(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def ranges(numbers: list[int]) -> str:
    """Return sorted numbers as people write them: `0-3, 7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
