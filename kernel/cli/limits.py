"""`eskernel limits`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
import orjson
from rich.table import Table

from kernel.cli import EXIT_CODES
from kernel.cli.common import Target, Where, asynchronous, console, errors, fail, print_json, target_options
from kernel.cli.exit_codes import FAILED, UNREACHABLE, USAGE
from kernel.errors import LimitsError

if TYPE_CHECKING:
    from kernel.governance.limits import Values
    from kernel.transport.connection import NatsConnection

Answers = list[dict[str, Any]]


@click.group(invoke_without_command=True, epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True, help="Print every worker's answer as JSON.")
@click.pass_context
@target_options
def limits(ctx: click.Context, as_json: bool, where: Where) -> None:
    """Show the rate limits and the current rates, or change the limits while the service runs.

    \b
    eskernel limits                                     show limits and current rates
    eskernel limits set commands=500 commands.burst=800
    eskernel limits set per_aggregate.Account=100 per_key=20
    eskernel limits set live=20000 rebuild=none
    eskernel limits reset                               restore the limits of the settings

    The service slows three lanes automatically while it is in distress: commands, live projection and rebuilds. A limit
    is a number per second for the whole app; its burst is the largest number at once. A change lasts until the service
    restarts. Set the section `rates` of the settings for permanent limits.
    """
    if ctx.invoked_subcommand is None:
        asynchronous(_show)(as_json, where)
    elif as_json or where != Where(None, None, None, None, None):
        raise click.UsageError(f"write the options behind `{ctx.invoked_subcommand}`")


@limits.command("set", epilog=EXIT_CODES)
@click.argument("words", metavar="NAME=VALUE...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print every worker's answer as JSON.")
@target_options
@asynchronous
async def set_(words: tuple[str, ...], as_json: bool, where: Where) -> None:
    """Change limits of the running service: all given limits on all workers, or none.

    NAME is commands, live, rebuild, per_key or per_aggregate.TYPE. NAME is the limit per second, NAME.burst the largest
    number at once. VALUE is a number, or none for no limit.

    \b
    eskernel limits set commands=500 commands.burst=800
    eskernel limits set per_aggregate.Account=100 rebuild=none

    The change lasts until the service restarts. A worker that starts meanwhile adopts it from the other workers.
    """
    from kernel.governance.limits import parse

    try:
        values = parse(words)
    except LimitsError as error:
        fail(str(error), USAGE)
    await _change(where, values, as_json)


@limits.command(epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True, help="Print every worker's answer as JSON.")
@target_options
@asynchronous
async def reset(as_json: bool, where: Where) -> None:
    """Restore the limits of the settings."""
    await _change(where, None, as_json)


async def _show(as_json: bool, where: Where) -> None:
    target = where.find()
    connection = await target.connection()
    try:
        workers, silent = await _request(target, connection, {})
    finally:
        await connection.close()
    _print(workers, silent, as_json)


async def _change(where: Where, values: Values | None, as_json: bool) -> None:
    """Add limits to the overrides of the workers, or remove all overrides if `values` is None."""
    from kernel.governance.limits import override

    target = where.find()
    connection = await target.connection()
    try:
        workers, _ = await _request(target, connection, {})
        known = [worker["limits"]["overrides"] for worker in workers]
        newest = max(known, key=lambda overrides: float(overrides["at"]))
        overrides = {**newest["values"], **values} if values is not None else {}
        try:
            override(target.settings.rates, overrides, target.app)
        except LimitsError as error:
            fail(str(error), USAGE)
        await _request(target, connection, {"overrides": overrides, "check": True})
        # workers adopt only later overrides, and this machine's clock may be behind
        at = max(time.time(), newest["at"] + 1e-3)
        workers, silent = await _request(target, connection, {"overrides": overrides, "at": at})
    finally:
        await connection.close()
    _print(workers, silent, as_json)


async def _request(target: Target, connection: NatsConnection, body: dict[str, Any]) -> tuple[Answers, list[str]]:
    """Send a request to all workers. Exit if a worker refuses it, or if no worker answers."""
    from kernel.log.subjects import subjects_of
    from kernel.settings.fields import shown
    from kernel.transport.survey import survey

    subject = subjects_of(target.app.name, target.settings).service("limits")
    workers, silent = await survey(connection, subject, orjson.dumps(body))
    if not workers:
        url = shown(",".join(target.settings.connection.servers))
        fail(f"no service of {target.app.name!r} answers on {url}", UNREACHABLE)
    if refusals := [worker for worker in workers if "error" in worker]:
        fail("\n".join(f"{refusal['worker']}: {refusal['error']}" for refusal in refusals), FAILED)
    return workers, silent


def _print(workers: Answers, silent: Sequence[str], as_json: bool) -> None:
    if as_json:
        print_json({"workers": workers, "silent": silent})
        return
    limits = workers[0]["limits"]
    table = Table("limit", "per second", "burst", "current rate", box=None, header_style="bold")
    for name, lane in limits["lanes"].items():
        table.add_row(name, _number(lane["rate"]), _burst(lane), _present(workers, name))
    for name, limit in limits["fixed"].items():
        table.add_row(name, _number(limit["rate"]), _burst(limit), _number(limit["rate"]))
    console.print(table)
    for worker in workers:
        for name, lane in worker["limits"]["lanes"].items():
            if lane["why"]:
                _line(f"{worker['worker']} has slowed {name} to {_number(lane['present'])}/s: {lane['why']}")
    if values := limits["overrides"]["values"]:
        names = ", ".join(f"{name}={_number(value)}" for name, value in values.items())
        _line(f"changed until the service restarts: {names}")
    for name in silent:
        errors.print(
            f"{name}: no answer; it adopts the limits of the other workers when it is back",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _present(workers: Answers, name: str) -> str:
    """Return the current rate of all workers together: the sum, but the minimum for rebuilds, which are one process."""
    rates = [worker["limits"]["lanes"][name]["present"] for worker in workers]
    limited = [rate for rate in rates if rate is not None]
    if not limited:
        return "no limit"
    rate = _number(min(limited) if name == "rebuild" else sum(limited))
    return rate if len(limited) == len(rates) else f"{rate} on {len(limited)} of {len(rates)} workers"


def _burst(limit: dict[str, Any]) -> str:
    if limit["rate"] is None:
        return ""
    return _number(max(1.0, limit["rate"]) if limit["burst"] is None else limit["burst"])


def _number(value: float | None) -> str:
    return "no limit" if value is None else f"{value:.6g}"


def _line(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
