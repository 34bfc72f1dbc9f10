"""`eskernel prepare`: build what a new program needs, before its service starts."""

from __future__ import annotations

import asyncio
import signal
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from kernel.cli import EXIT_CODES
from kernel.cli.common import Where, asynchronous, console, target_options
from kernel.cli.progress import progress_bar

if TYPE_CHECKING:
    from kernel.projector.deployment import BuildStatus


@click.command(epilog=EXIT_CODES)
@click.argument("program", metavar="NEW:APP")
@click.option("--no-follow", is_flag=True, help="Exit as soon as everything is built.")
@click.option("--quiet", is_flag=True, help="Print no progress bar.")
@target_options
@asynchronous
async def prepare(program: str, no_follow: bool, quiet: bool, where: Where) -> None:
    """Build the tables that the program NEW:APP needs, beside the running service, and keep them up to date.

    Readers go on seeing the tables of the running service. When a service of NEW:APP starts, it finds its tables ready:
    it shows them within milliseconds, and this command ends. So a deployment is: prepare; start the new service, or
    replace the workers one by one; and `eskernel projections rollback` if it was a mistake.

    If it is interrupted, what was built stays, and the next `prepare` goes on with it. With --no-follow it ends as soon
    as everything is built, as a job before a rollout: then the start of the service folds what has come meanwhile.

    \b
    eskernel prepare bank:app
    eskernel prepare bank:app --no-follow
    """
    from kernel.preparation import Preparation, check_running

    target = replace(where, app=program).find()
    check_running(target.settings)
    names = ", ".join(declared.name for declared in target.app.projections)
    with progress_bar("preparing", quiet=quiet) as show:
        from kernel.projector.replay import RebuildProgress

        def told(status: BuildStatus | None) -> None:
            if status is None:
                _line(f"{names}: what {program} needs is ready; start its service")
            elif status.total:
                seconds = status.done / status.rate if status.rate else 0.0
                show(RebuildProgress(status.done, status.total, status.done, seconds, status.phase))

        preparation = asyncio.ensure_future(Preparation(target.app, target.settings, told).run(follow=not no_follow))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, preparation.cancel)
        try:
            taken_over = await preparation
        except asyncio.CancelledError:
            _line("stopped: what was built stays, and the next `eskernel prepare` goes on with it")
            sys.exit(0)
    if taken_over:
        _line(f"a service of {program} runs: it has taken over")


def _line(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
