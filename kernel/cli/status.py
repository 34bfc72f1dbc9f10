"""`eskernel status`."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import click

from kernel.cli import EXIT_CODES
from kernel.cli.common import Target, Where, asynchronous, console, fail, print_json, target_options
from kernel.cli.exit_codes import UNREACHABLE

if TYPE_CHECKING:
    from sqlalchemy import Engine


@click.command(epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True)
@target_options
@asynchronous
async def status(as_json: bool, where: Where) -> None:
    """Print the state of the workers: health, partitions, position and lag, live aggregates, limits and jobs.

    Exits with 1 if a worker is not ready or does not answer, or if a partition has no owner.
    """
    target = where.find()
    report = await survey_workers(target)
    if target.database is not None:
        report["projections"] = await asyncio.to_thread(_projections, target.engine(read_only=True))
        declared = {known.name for known in target.app.projections}
        for made in report["projections"]:
            made["declared"] = made["name"] in declared
            made["end"] = max(worker["end"] for worker in report["workers"])
            made["kept"] = any(
                worker["deployment"]["declares"].get(made["name"]) == made["version"] for worker in report["workers"]
            )
    if as_json:
        print_json(report)
    else:
        _print(report)
    if not report["ready"]:
        sys.exit(1)


async def survey_workers(target: Target) -> dict[str, Any]:
    """Return the status of all workers, of missing workers and of partitions without an owner."""
    from kernel.log.subjects import subjects_of
    from kernel.settings.fields import shown
    from kernel.transport.survey import survey

    app, url = target.app.name, shown(",".join(target.settings.connection.servers))
    connection = await target.connection()
    try:
        workers, silent = await survey(connection, subjects_of(app, target.settings).service("status"))
    finally:
        await connection.close()
    if not workers:
        fail(f"no service of {app!r} answers on {url}", UNREACHABLE)
    count = workers[0]["partition_count"]
    unowned = sorted(set(range(count)).difference(*(worker["partitions"] for worker in workers)))
    return {
        "app": app,
        "ready": not unowned and not silent and all(worker["health"]["ready"] for worker in workers),
        "workers": workers,
        "silent": silent,
        "unowned": unowned,
    }


def _projections(engine: Engine) -> list[dict[str, Any]]:
    from projections.standing import read_standing

    with engine.connect() as connection:
        found = read_standing(connection)
    engine.dispose()
    return [made for generations in found.values() for made in generations]


def _print(report: dict[str, Any]) -> None:
    workers = report["workers"]
    count = f"{len(workers)} workers" if len(workers) > 1 else "1 worker"
    console.print(f"{report['app']} is {'ready' if report['ready'] else 'NOT ready'} ({count})", style="bold")
    for name in report["silent"]:
        _line(f"  {name}: no answer; its partitions move when its leases expire")
    if report["unowned"]:
        _line(f"  the partitions {ranges(report['unowned'])} have no owner; workers acquire them within seconds")
    for made in report.get("projections", []):
        letters = f", {made['dead_letters']} dead letters" if made["dead_letters"] else ""
        _line(
            f"  {made['name']:<20}version {made['version']}, generation {made['generation']}, {made['state']}, "
            f"at {made['sequence']}{letters}{_undeclared(made)}"
        )
    for worker in workers:
        _print_worker(worker)


def _undeclared(made: dict[str, Any]) -> str:
    if not made["declared"]:
        return f"; not in the app, and not kept up to date: eskernel projections drop {made['name']}"
    paused = "; paused: eskernel projections resume" if made["paused"] else ""
    if made["kept"] or made["state"] != "live":
        return paused
    behind = max(0, made["end"] - made["lowest"])
    return f"; readers see it, and no running program declares it: {behind} stream sequences behind{paused}"


def _print_worker(worker: dict[str, Any]) -> None:
    live = worker["projection"]
    owned = f"partitions {ranges(worker['partitions'])}" if worker["partitions"] else "no partitions"
    console.print(f"{worker['worker']} (process {worker['pid']})", style="bold", highlight=False)
    _line(f"  {len(worker['partitions'])} of {worker['partition_count']}: {owned}")
    _line(f"  projected up to {live['position']}, {live['behind']} commits behind")
    _line(f"  {worker['actors']} aggregates live, {worker['commands_pending']} commands in progress")
    if build := worker["deployment"]["build"]:
        _line(f"  {build['told']}")
    for name, version in worker["deployment"]["behind"].items():
        _line(f"  readers see version {version} of {name}, and this program declares an older one")
    for unknown in worker.get("unknown_aggregates", []):
        _line(f"  {unknown['aggregate']} is not declared: {unknown['commits']} commits are passed over")
    for waiting in worker.get("waiting_aggregates", []):
        _line(f"  {waiting['aggregates']} of {waiting['aggregate']} wait for a newer program: {waiting['why']}")
    for reaction in worker.get("reactions", []):
        timers = reaction["timers"]
        late = f", {timers['late']} overdue" if timers["late"] else ""
        pending = f", {timers['pending']} timers{late}" if timers["pending"] else ""
        parked = f", {reaction['parked']} aggregates parked" if reaction["parked"] else ""
        state = f"{reaction['state']}, {reaction['behind']} behind"
        _line(f"  {reaction['kind']} {reaction['name']}: {state}{parked}{pending}")
    for name, lane in worker["limits"]["lanes"].items():
        if lane["why"]:
            _line(f"  {name} slowed to {lane['present']:.4g}/s: {lane['why']}")
    for name, component in worker["health"]["components"].items():
        _line(f"  {name:<12}{'ok' if component['ok'] else 'FAILING':<9}{component['detail']}")
    for job in worker["jobs"]:
        failed = f", failing: {job['error']}" if job["error"] else ""
        _line(
            f"  job {job['name']:<20}every {job['interval']:.3g} s, {job['runs']} runs, last took "
            f"{job['duration'] * 1000:.1f} ms{failed}"
        )


def _line(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def ranges(numbers: list[int]) -> str:
    """Return sorted numbers as ranges, such as `0-3, 7`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
