"""`eskernel limits`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import click
import orjson
from rich.table import Table

from kernel.cli import EXIT_CODES
from kernel.cli.common import Target, Where, asynchronous, console, errors, fail, print_json, target_options
from kernel.cli.exit_codes import FAILED, UNREACHABLE, USAGE
from kernel.errors import LimitsError
from kernel.governance.limits import Values, override, parse
from kernel.log.subjects import subjects_of
from kernel.settings.fields import shown
from kernel.transport.connection import NatsConnection
from kernel.transport.survey import survey

Answers = list[dict[str, Any]]


@click.group(invoke_without_command=True, epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True, help="All that every worker says.")
@click.pass_context
@target_options
def limits(ctx: click.Context, as_json: bool, where: Where) -> None:
    """Show how fast work is let in, and what slows it; or change the limits while the service runs.

    \b
    eskernel limits                                     what is set, and what holds at present
    eskernel limits set commands=500 commands.burst=800
    eskernel limits set per_aggregate.Account=100 per_key=20
    eskernel limits set live=20000 rebuild=none
    eskernel limits reset                               as the settings say

    Three lanes are slowed by themselves while the service is in distress, and come back by themselves: commands,
    live projection, rebuilds. A limit is so much a second, for the whole app; the burst may come at once. What is set
    here lasts until the service restarts; the settings section `rates` lasts longer.
    """
    if ctx.invoked_subcommand is None:
        asynchronous(_show)(as_json, where)
    elif as_json or where != Where(None, None, None, None, None):
        raise click.UsageError(f"give options behind `{ctx.invoked_subcommand}`")


@limits.command("set", epilog=EXIT_CODES)
@click.argument("words", metavar="NAME=VALUE...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="All that every worker says.")
@target_options
@asynchronous
async def set_(words: tuple[str, ...], as_json: bool, where: Where) -> None:
    """Change limits on the running service: all that is named, on all workers, or nothing.

    NAME is commands, live, rebuild, per_key, or per_aggregate.TYPE; with .burst behind it, what may come at once
    instead of how much a second. VALUE is a number, or none for no limit.

    \b
    eskernel limits set commands=500 commands.burst=800
    eskernel limits set per_aggregate.Account=100 rebuild=none

    It lasts until the service restarts; workers that start meanwhile take it over from the others.
    """
    try:
        values = parse(words)
    except LimitsError as error:
        fail(str(error), USAGE)
    await _change(where, values, as_json)


@limits.command(epilog=EXIT_CODES)
@click.option("--json", "as_json", is_flag=True, help="All that every worker says.")
@target_options
@asynchronous
async def reset(as_json: bool, where: Where) -> None:
    """Go back to the limits of the settings."""
    await _change(where, None, as_json)


async def _show(as_json: bool, where: Where) -> None:
    target = where.find()
    connection = await target.connection()
    try:
        workers, silent = await _ask(target, connection, {})
    finally:
        await connection.close()
    _tell(workers, silent, as_json)


async def _change(where: Where, values: Values | None, as_json: bool) -> None:
    """Add to what was set before, or (None) take all of it back."""
    target = where.find()
    connection = await target.connection()
    try:
        workers, _ = await _ask(target, connection, {})
        newest = max((one["limits"]["overrides"] for one in workers), key=lambda one: float(one["at"]))
        overrides = {**newest["values"], **values} if values is not None else {}
        try:
            override(target.settings.rates, overrides, target.app)
        except LimitsError as error:
            fail(str(error), USAGE)
        await _ask(target, connection, {"overrides": overrides, "check": True})
        # clocks of two machines differ, and the later one counts
        at = max(time.time(), newest["at"] + 1e-3)
        workers, silent = await _ask(target, connection, {"overrides": overrides, "at": at})
    finally:
        await connection.close()
    _tell(workers, silent, as_json)


async def _ask(target: Target, connection: NatsConnection, what: dict[str, Any]) -> tuple[Answers, list[str]]:
    """Ask all workers; if one of them refuses, or none is there, that is the end."""
    subject = subjects_of(target.app.name, target.settings).service("limits")
    workers, silent = await survey(connection, subject, orjson.dumps(what))
    if not workers:
        url = shown(",".join(target.settings.connection.servers))
        fail(f"no service of {target.app.name!r} answers on {url}", UNREACHABLE)
    if refused := [one for one in workers if "error" in one]:
        fail("\n".join(f"{one['worker']}: {one['error']}" for one in refused), FAILED)
    return workers, silent


def _tell(workers: Answers, silent: Sequence[str], as_json: bool) -> None:
    if as_json:
        print_json({"workers": workers, "silent": silent})
        return
    limits = workers[0]["limits"]
    table = Table("limit", "a second", "burst", "at present", box=None, header_style="bold")
    for name, lane in limits["lanes"].items():
        table.add_row(name, _number(lane["rate"]), _burst(lane), _present(workers, name))
    for name, limit in limits["fixed"].items():
        table.add_row(name, _number(limit["rate"]), _burst(limit), _number(limit["rate"]))
    console.print(table)
    for one in workers:
        for name, lane in one["limits"]["lanes"].items():
            if lane["why"]:
                _line(f"{one['worker']} has slowed {name} to {_number(lane['present'])}/s: {lane['why']}")
    if values := limits["overrides"]["values"]:
        names = ", ".join(f"{name}={_number(value)}" for name, value in values.items())
        _line(f"set while running, until the service restarts: {names}")
    for name in silent:
        errors.print(f"{name}: no answer; it asks the others when it is back", markup=False, highlight=False)


def _present(workers: Answers, name: str) -> str:
    """What all workers together let in: each its part, but for rebuilds, of which there is one for all."""
    rates = [one["limits"]["lanes"][name]["present"] for one in workers]
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
