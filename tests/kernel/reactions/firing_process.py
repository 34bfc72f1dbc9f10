"""A process that runs the shop by a clock that is ahead: it is there to be killed."""

from __future__ import annotations

import asyncio
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import kernel.assembly
from kernel import Service
from tests.conftest import settings_for
from tests.shops import shop


def serve(nats: str, database: str, name: str, folder: str, ahead: float, told: Connection) -> None:
    """Run the shop until the other end of the pipe is closed.

    Args:
        ahead: seconds by which the clock of its timers is ahead.
    """
    kernel.assembly.time = SimpleNamespace(time=lambda: time.time() + ahead)  # type: ignore[attr-defined]

    async def run() -> None:
        app = shop(name, orders=False)
        async with Service(app, settings_for(Path(folder), nats=nats, database=database)):
            told.send("ready")
            while not told.poll():
                await asyncio.sleep(0.05)

    asyncio.run(run())
