"""The command line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

try:
    import click

    from kernel.packages import enter, reserve
except KeyboardInterrupt:  # Ctrl-C while Python is still importing
    raise SystemExit(130) from None

EXIT_CODES: Final = (
    "Exit codes: 0 done, 1 refused or failed, 2 wrong usage or declarations, 3 nothing running or reachable."
)

INTERRUPTED: Final = 128 + 2
"""Exit code after Ctrl-C, as shells have it."""

_COMMANDS: Final = {
    "run": ("run", "Run an app until SIGTERM or Ctrl-C."),
    "check": ("run", "Check an app's declarations and list them."),
    "config": ("config", "Show the settings, or check them against the running servers."),
    "send": ("send", "Send a command to one aggregate."),
    "query": ("query", "Query the projection database."),
    "show": ("show", "Print an aggregate's state and events, now or at an earlier time."),
    "blame": ("blame", "Print the events that have made a row, and what each of them changed."),
    "trace": ("trace", "Find what an id stands for: commands, their events, and what followed."),
    "rebuild": ("rebuild", "Rebuild a projection's tables from the log."),
    "rehearse": ("rehearse", "Replay the log through a new program, and compare with the tables of now."),
    "prepare": ("prepare", "Build what a new program needs, beside the running service."),
    "projections": ("projections", "List projections and their versions; build, verify, roll back, pause, drop them."),
    "snapshots": ("snapshots", "List the snapshots of aggregates, compare them with the log, or delete them."),
    "dead-letters": ("dead_letters", "List, show, retry, skip or export events that could not be handled."),
    "policies": ("reactions", "List, pause or resume policies, and list what was rejected."),
    "effects": ("reactions", "List, pause, resume or replay effects."),
    "timers": ("reactions", "List or cancel the timers of policies."),
    "limits": ("limits", "Show rates and limits, or change them while the service runs."),
    "backlog": ("backlog", "Print how far the projections are behind, and the pressure on publishing."),
    "jobs": ("jobs", "Print the regular jobs of the workers, and their last runs."),
    "status": ("status", "Print health, positions, lag, jobs."),
}


class _LazyGroup(click.Group):
    """Imports a command when it is used: most need a fraction of what a service needs."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Any:
        """Run a command as the program of this process. Whatever happens to it, the user gets no traceback of ours."""
        if args is not None:
            return super().main(args, *more, **options)
        try:
            reserve()  # the folder of the project may be on the path already
            from kernel.cli import streams

            streams.prepare()
            try:
                super().main(args, *more, **options)
            finally:
                # a signal that comes now must not interrupt the interpreter while it ends
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                streams.finish()
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    def invoke(self, ctx: click.Context) -> Any:
        enter(Path.cwd())  # before a command is imported: this folder may be on the path already
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(f"kernel.cli.{_COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_) for name, (_, help_) in _COMMANDS.items()])


@click.group(
    cls=_LazyGroup,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="eskernel", prog_name="eskernel", message="%(prog)s %(version)s")
def main() -> None:
    """An event-sourcing kernel on NATS JetStream.

    \b
    eskernel run examples.bank:app                      in one terminal
    eskernel send Account alice Deposit cents=500       in another
    eskernel query "select * from balances"
    eskernel show Account alice --history
    eskernel rebuild Balances
    eskernel dead-letters list
    eskernel limits set commands=500
    eskernel backlog --watch
    eskernel jobs
    eskernel status

    Commands find the service that runs on the data directory (.eskernel in this folder); --nats, --database and
    --app name another one.
    """
