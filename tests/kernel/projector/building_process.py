"""A process that builds what a program of `tests.ledgers` lacks, and says how far it is: it is there to be killed."""

from __future__ import annotations

import asyncio
import time
from multiprocessing.connection import Connection

from kernel import Client
from kernel.governance.pace import Pace
from kernel.governance.rates import TokenBucket
from kernel.projector.deployment import build_missing
from kernel.projector.replay import RebuildProgress
from projections.database import open_database
from tests.ledgers import ledger

RATE = 1_500.0
"""Commits per second: so slow that a kill finds it at work."""


def build(nats: str, database: str, name: str, version: int, told: Connection) -> None:
    """Build, and send phase and number of commits after each step."""

    async def run() -> None:
        app = ledger(name, version)
        engine = open_database(database)
        pace = Pace(TokenBucket(RATE, 50.0, time.monotonic()), "rebuild", 0.05)

        def progress(step: RebuildProgress) -> None:
            told.send((step.phase, step.done))

        async with await Client.connect(app, nats=nats) as client:
            await build_missing(app, client.log, engine, progress, pace)
        engine.dispose()

    told.send(("begun", 0))
    asyncio.run(run())
    told.send(("done", 0))
