"""The command line."""

from __future__ import annotations

import click

from kernel.cli.common import EXIT_CODES
from kernel.cli.query import query, show
from kernel.cli.rebuild import rebuild
from kernel.cli.run import check, run
from kernel.cli.send import send
from kernel.cli.status import status


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="eskernel")
def main() -> None:
    """An event-sourcing kernel on NATS JetStream.

    \b
    eskernel run examples.bank:app                      in one terminal
    eskernel send Account alice Deposit cents=500       in another
    eskernel query "select * from balances"
    eskernel show Account alice --history
    eskernel rebuild Balances
    eskernel status

    Commands find the service that runs on the data directory (.eskernel in this folder); --nats, --database and
    --app name another one.
    """


for command in (run, check, send, query, show, rebuild, status):
    main.add_command(command)
